# SPDX-License-Identifier: Apache-2.0
"""CPUs: what cgroups and NUMA nodes leave to us, how many threads that is for, and who runs where."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import cpus, device, gpus, preflight
from service.cpus import Cpus, available, cpu_quota, threads_for
from service.fleet import Fleet
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GPU_A = "GPU-aaaa1111-0000-0000-0000-000000000000"
GPU_B = "GPU-bbbb2222-0000-0000-0000-000000000000"
MIG_B = "MIG-dddd4444-0000-0000-0000-000000000000"

V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1 = "33 32 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "34 32 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
HYBRID = "35 32 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"


def write(root: Path, files: dict[str, str]) -> Path:
    """Make the files of a tree; return its root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def cgroup2(root: Path, group: str, top: str = "/", **limits: str) -> Path:
    """Make a tree of version 2; limits are `cpu.max` by folder, `_` for `/` in its name."""
    folders = {f"sys/fs/cgroup/{name.replace('_', '/')}/cpu.max": text for name, text in limits.items()}
    proc = {"proc/self/cgroup": f"0::{group}", "proc/self/mountinfo": V2.format(top=top)}
    return write(root, proc | folders)


def cgroup1(root: Path, group: str, top: str = "/", **quotas: int) -> Path:
    """Make a tree of version 1, where another controller is elsewhere; quotas in µs of 100 ms."""
    proc = {
        "proc/self/cgroup": f"5:memory:/elsewhere\n4:cpu,cpuacct:{group}\n1:name=systemd:/init\n0::/unified",
        "proc/self/mountinfo": "\n".join([V1_MEMORY, V1.format(top=top), HYBRID]),
    }
    for name, quota in quotas.items():
        folder = f"sys/fs/cgroup/cpu,cpuacct/{name.replace('_', '/')}"
        proc |= {f"{folder}/cpu.cfs_quota_us": f"{quota}", f"{folder}/cpu.cfs_period_us": "100000"}
    return write(root, proc)


def nodes(root: Path, *cpulists: str) -> Path:
    """Make a machine with so many NUMA nodes."""
    return write(root, {f"sys/devices/system/node/node{n}/cpulist": cpus for n, cpus in enumerate(cpulists)})


def machine(*sizes: int, quota: float | None = None) -> Cpus:
    """Return a machine of NUMA nodes of these sizes, all of it allowed."""
    first = [sum(sizes[:node]) for node in range(len(sizes))]
    split = {n: frozenset(range(first[n], first[n] + size)) for n, size in enumerate(sizes)}
    return Cpus(frozenset(range(sum(sizes))), quota, split)


class TestQuota:
    @pytest.mark.parametrize(
        ("limits", "expected"),
        [
            ({}, None),
            ({"a_b": "max 100000"}, None),
            ({"a_b": "150000 100000"}, 1.5),
            ({"a_b": "50000 200000"}, 0.25),
            ({"a_b": "max 100000", "a": "300000 100000"}, 3.0),
            ({"a_b": "400000 100000", "a": "250000 100000"}, 2.5),
            ({"a_b": "100000 100000", "a": "250000 100000"}, 1.0),
            ({"a_b": "nonsense"}, None),
        ],
    )
    def test_version_2_takes_the_least_on_the_way_up(
        self, tmp_path: Path, limits: dict[str, str], expected: float | None
    ) -> None:
        """Each cgroup around ours binds as well; `max` does not."""
        assert cpu_quota(cgroup2(tmp_path, "/a/b", **limits)) == expected

    def test_version_2_in_a_namespace_of_its_own(self, tmp_path: Path) -> None:
        """A container that sees itself as the root reads the limit there."""
        root = cgroup2(tmp_path, "/")
        assert cpu_quota(write(root, {"sys/fs/cgroup/cpu.max": "200000 100000"})) == 2.0

    @pytest.mark.parametrize(
        ("quotas", "expected"),
        [
            ({}, None),
            ({"a_b": -1}, None),
            ({"a_b": 150000, "a": -1}, 1.5),
            ({"a_b": -1, "a": 300000}, 3.0),
            ({"a_b": 400000, "a": 250000}, 2.5),
        ],
    )
    def test_version_1_takes_the_least_on_the_way_up(
        self, tmp_path: Path, quotas: dict[str, int], expected: float | None
    ) -> None:
        """The CPU controller has a tree of its own beside the others, and -1 is no limit."""
        assert cpu_quota(cgroup1(tmp_path, "/a/b", **quotas)) == expected

    def test_a_mount_of_our_own_group_is_its_root(self, tmp_path: Path) -> None:
        """Docker on version 1 mounts the container's group, and /proc still names it from the host's root."""
        root = cgroup1(tmp_path, "/docker/1234/inner", "/docker/1234", inner=300000)
        assert cpu_quota(root) == 3.0
        own = {"cpu.cfs_quota_us": "120000", "cpu.cfs_period_us": "100000"}
        write(root / "sys/fs/cgroup/cpu,cpuacct", own)
        assert cpu_quota(root) == 1.2

    @pytest.mark.parametrize("top", ["/other", "/../.."])
    def test_a_mount_of_another_group_says_nothing(self, tmp_path: Path, top: str) -> None:
        """Limits of groups that we are not in are not ours."""
        root = cgroup2(tmp_path, "/a", top)
        assert cpu_quota(write(root, {"sys/fs/cgroup/cpu.max": "100000 100000"})) is None

    def test_hybrid_reads_both(self, tmp_path: Path) -> None:
        """Where both versions are mounted, either may hold the CPU controller."""
        root = cgroup1(tmp_path, "/a", a=400000)
        assert cpu_quota(root) == 4.0
        unified = {"sys/fs/cgroup/unified/unified/cpu.max": "300000 100000"}
        assert cpu_quota(write(root, unified)) == 3.0

    def test_no_cgroups_no_limit(self, tmp_path: Path) -> None:
        """A kernel that shows none limits nothing that we could read."""
        assert cpu_quota(tmp_path) is None


class TestAvailable:
    @pytest.mark.parametrize(
        ("limit", "cores", "rationed"),
        [
            ("max 100000", 4, False),
            ("400000 100000", 4, False),
            ("800000 100000", 4, False),
            ("390000 100000", 3, True),
            ("150000 100000", 1, True),
            ("20000 100000", 1, True),
        ],
    )
    def test_cores_are_the_lesser_of_mask_and_quota(
        self, tmp_path: Path, limit: str, cores: int, *, rationed: bool
    ) -> None:
        """A part of a core is none, but one there always is."""
        found = available(cgroup2(tmp_path, "/a", a=limit), range(4))
        assert (found.cores, found.rationed) == (cores, rationed)

    def test_nodes_are_what_the_mask_leaves_of_them(self, tmp_path: Path) -> None:
        """A node whose CPUs are all forbidden, or that has none, is not there."""
        root = nodes(tmp_path, "0-3,8-11", "4-7,12-15", "", "16")
        found = available(root, [2, 3, 4, 8])
        assert found == Cpus(frozenset({2, 3, 4, 8}), None, {0: frozenset({2, 3, 8}), 1: frozenset({4})})

    def test_this_machine_has_at_least_one_core(self) -> None:
        """The real files can be read, whatever they say."""
        found = available()
        assert found.allowed == os.sched_getaffinity(0)
        assert 1 <= found.cores <= len(found.allowed)
        assert all(node <= found.allowed for node in found.nodes.values())

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("", set()), ("0", {0}), ("0-2", {0, 1, 2}), ("1,3-4,63", {1, 3, 4, 63})],
    )
    def test_cpulist(self, text: str, expected: set[int]) -> None:
        """Ranges include both ends."""
        assert cpus.parse_cpulist(text) == expected


class TestThreads:
    @given(
        workers=st.integers(1, 256),
        mask=st.integers(1, 512),
        quota=st.none() | st.floats(0.01, 512),
        most=st.integers(1, 64),
    )
    def test_derived_threads_never_exceed_the_cores(
        self, workers: int, mask: int, quota: float | None, most: int
    ) -> None:
        """Workers times threads fit, whatever is thought best for one, unless the workers alone do not."""
        cores = Cpus(frozenset(range(mask)), quota).cores
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpus, "MOST_THREADS", most)
            threads = threads_for(workers, cores, None)
        assert 1 <= cores <= mask
        assert 1 <= threads <= most
        assert workers * threads <= cores or (threads == 1 and workers > cores)

    def test_one_is_the_default_and_the_users_word_is_kept(self) -> None:
        """More than one is measured to be worse; who asks for it gets it, fitting or not."""
        assert threads_for(2, 64, None) == 1
        assert threads_for(2, 64, 8) == 8
        assert threads_for(2, 2, 8) == 8

    @pytest.mark.parametrize(
        ("workers", "threads", "text"),
        [
            (2, 1, ""),
            (1, 2, ""),
            (3, 1, "3 workers on 2 cores slow each other down; lower WARMFLEET_WORKERS"),
            (
                2,
                4,
                "2 workers of 4 threads, 8 in all, on 2 cores slow each other down; lower WARMFLEET_THREADS",
            ),
        ],
    )
    def test_complaint_names_the_sum_and_the_cores(self, workers: int, threads: int, text: str) -> None:
        """What does not fit is said with the setting to change; what fits is not mentioned."""
        assert machine(2).complaint(workers, threads) == text

    @pytest.mark.parametrize(
        ("found", "threads", "text"),
        [
            (machine(2, quota=1.5), 1, "1 core (quota 1.5), 1 thread a worker"),
            (machine(4), 2, "4 cores, 2 threads a worker"),
            (machine(4, quota=8), 1, "4 cores (quota 8), 1 thread a worker"),
        ],
    )
    def test_description(self, found: Cpus, threads: int, text: str) -> None:
        """The log says what there is, why, and what a worker takes."""
        assert found.describe(threads) == text


class TestSpread:
    """Workers on CPU."""

    def test_slots_take_turns_on_equal_nodes(self) -> None:
        """Each worker is bound to all CPUs of one node, never to single ones."""
        found = machine(4, 4)
        bound = [found.spread(slot, 4, 1) for slot in range(4)]
        assert bound == [found.nodes[0], found.nodes[1]] * 2

    def test_larger_nodes_take_more(self) -> None:
        """Two nodes of 2 and 4 CPUs share six workers by their sizes."""
        found = machine(2, 4)
        count = Counter(found.spread(slot, 6, 1) for slot in range(6))
        assert count == {found.nodes[0]: 2, found.nodes[1]: 4}

    @given(
        sizes=st.lists(st.integers(1, 40), min_size=2, max_size=8),
        threads=st.integers(1, 6),
        workers=st.integers(1, 100),
    )
    def test_no_node_gets_more_threads_than_cpus(self, sizes: list[int], threads: int, workers: int) -> None:
        """Either all workers are bound, each within a node that has room for it, or none is."""
        found = machine(*sizes)
        bound = [found.spread(slot, workers, threads) for slot in range(workers)]
        for cpu_set, count in Counter(bound).items():
            if cpu_set is None:
                assert count == workers
                assert workers > sum(size // threads for size in sizes)
            else:
                assert cpu_set in found.nodes.values()
                assert count * threads <= len(cpu_set)

    @pytest.mark.parametrize(
        ("found", "workers", "threads"),
        [
            (machine(8), 2, 1),
            (Cpus(frozenset(range(8))), 2, 1),
            (machine(4, 4, quota=7.5), 2, 1),
            (machine(4, 4), 9, 1),
            (machine(3, 3), 3, 2),
            (machine(4, 4), 1, 8),
        ],
        ids=["one node", "no nodes", "rationed", "too many", "would split a worker's threads", "too wide"],
    )
    def test_nobody_is_bound_where_it_gains_nothing_or_costs(
        self, found: Cpus, workers: int, threads: int
    ) -> None:
        """On one node, on shared time, and where not all fit, the kernel places the workers."""
        assert [found.spread(slot, workers, threads) for slot in range(workers)] == [None] * workers

    def test_spare_slots_go_round_again(self) -> None:
        """A slot beyond the room, which a drain may make for a while, is bound as well."""
        found = machine(2, 2)
        assert [found.spread(slot, 4, 1) for slot in (4, 5)] == [found.nodes[0], found.nodes[1]]


class TestNear:
    """Workers on GPUs."""

    @pytest.mark.parametrize(
        ("node", "workers", "expected"),
        [(0, 2, 0), (1, 8, 1), (1, 9, None), (None, 1, None), (7, 1, None)],
        ids=["first", "just fits", "too small", "unknown", "forbidden"],
    )
    def test_a_gpus_node_if_it_is_known_and_large_enough(
        self, node: int | None, workers: int, expected: int | None
    ) -> None:
        """All workers together must have a CPU each on the node, or they keep to all CPUs."""
        found = machine(4, 8)
        assert found.near(node, workers) == (None if expected is None else found.nodes[expected])

    def test_a_quota_does_not_matter(self) -> None:
        """Near a GPU memory is what counts, and a worker there computes little."""
        found = machine(4, 8, quota=2)
        assert found.near(0, 2) == found.nodes[0]

    def test_the_only_node_is_no_bond(self) -> None:
        """Binding to all there is would only stand in the way of a container that grows."""
        assert machine(4).near(0, 1) is None

    @pytest.mark.parametrize(("text", "node"), [("0", 0), ("1", 1), ("-1", None), ("", None)])
    def test_node_of_a_pci_address(self, tmp_path: Path, text: str, node: int | None) -> None:
        """-1 is the kernel's word for unknown, as on most virtual machines."""
        root = write(tmp_path, {"sys/bus/pci/devices/0000:10:00.0/numa_node": text})
        assert cpus.gpu_node("0000:10:00.0", root) == node
        assert cpus.gpu_node("0000:20:00.0", root) is None

    def test_tokens_find_their_node(self, tmp_path: Path) -> None:
        """Indices, prefixes, UUIDs and MIG instances do, as far as the driver and the kernel tell."""
        places = {"0000:10:00.0": "0", "0000:20:00.0": "1", "0000:30:00.0": "-1"}
        root = write(tmp_path, {f"sys/bus/pci/devices/{at}/numa_node": n for at, n in places.items()})
        two = {GPU_A: "0000:10:00.0", GPU_B: "0000:20:00.0"}
        assert device.numa_nodes(("1", "GPU-aaaa"), two, root) == {"1": 1, "GPU-aaaa": 0}
        assert device.numa_nodes((GPU_A,), {GPU_A: "0000:30:00.0"}, root) == {}
        assert device.numa_nodes((GPU_A,), {GPU_A: ""}, root) == {}
        mig = {GPU_A: "0000:10:00.0", MIG_B: "0000:20:00.0"}
        assert device.numa_nodes((MIG_B, "GPU-cccc"), mig, root) == {MIG_B: 1}

    def test_preflight_knows_the_nodes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The arbiter asks the driver once, for the GPUs and for where they are."""

        def list_gpus(*, addresses: dict[str, str]) -> list[str]:
            addresses |= {GPU_A: "0000:10:00.0", GPU_B: "0000:20:00.0"}
            return [GPU_A, GPU_B]

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(gpus, "list_gpus", list_gpus)
        monkeypatch.setattr(cpus, "gpu_node", lambda address, _root: int(address[5]) - 1)
        monkeypatch.setattr(preflight, "_check_free", lambda *_: None)
        found = preflight.check.__wrapped__(Settings(backend="stub", devices="1"))
        assert (found.devices, found.gpu_nodes) == ((GPU_B,), {GPU_B: 1})

    @pytest.mark.parametrize("token", ["cpu", "0", GPU_A])
    def test_without_a_list_no_node_is_known(self, token: str) -> None:
        """On CPU, and where the driver did not answer, there is nothing to look up."""
        assert device.numa_nodes((token,), {}) == {}


class TestBind:
    @pytest.fixture
    def said(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What is logged, level first."""
        lines: list[str] = []

        def note(level: str) -> Callable[..., None]:
            return lambda text, *values: lines.append(f"{level}: {text % values}")

        for level in ("info", "warning"):
            monkeypatch.setattr(cpus.LOG, level, note(level))
        return lines

    def test_binds_the_process_and_its_threads(self, fork: Any) -> None:
        """In a real fork the mask is what was asked for, also for a thread that starts later."""
        mine = os.sched_getaffinity(0)
        one = frozenset({min(mine)})

        def child() -> list[int]:
            cpus.bind(one)
            from threading import Thread

            seen: list[int] = []
            thread = Thread(target=lambda: seen.extend(os.sched_getaffinity(0)))
            thread.start()
            thread.join()
            return seen

        assert fork(child).said == repr(sorted(one)).encode()
        assert os.sched_getaffinity(0) == mine

    def test_none_leaves_the_process_alone(self, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
        """Who is not to be bound is not bound to everything either."""
        monkeypatch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("called"))
        cpus.bind(None)
        assert said == []

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM])
    def test_failure_is_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, said: list[str], number: int
    ) -> None:
        """A worker that may not be bound serves all the same."""

        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "sched_setaffinity", refuse)
        cpus.bind(frozenset({0, 1}))
        assert said == [f"warning: not bound to the 2 CPUs of a NUMA node: {os.strerror(number)}"]


class TestFleet:
    @pytest.fixture
    def fleet(self, stub_settings: Settings) -> Callable[..., Fleet]:
        """Return a maker of fleets on a machine that is not this one."""

        def make(found: Cpus, devices: tuple[str, ...] = ("cpu",), **gpu_nodes: int) -> Fleet:
            made = Fleet.make(stub_settings, devices, 2, gpu_nodes=gpu_nodes)
            for slot in range(2):
                made.board.spawn(slot, devices[slot % len(devices)], 1.0)
            return dataclasses.replace(made, cpus=found)

        return make

    def test_workers_on_cpu_are_spread(self, fleet: Callable[..., Fleet]) -> None:
        """Each slot has its node; a fleet that has outgrown the CPUs binds nobody."""
        found = machine(2, 2)
        made = fleet(found)
        assert made.threads == 1
        assert [made.cpu_set(slot) for slot in range(2)] == [found.nodes[0], found.nodes[1]]
        made.board.header.target = 5
        assert made.cpu_set(0) is None

    def test_workers_on_gpus_are_near_them(self, fleet: Callable[..., Fleet]) -> None:
        """A slot follows its device, not its number; a device of unknown place leaves it where it is."""
        found = machine(4, 4)
        made = fleet(found, ("A", "B"), A=1)
        assert [made.cpu_set(slot) for slot in range(2)] == [found.nodes[1], None]

    @pytest.mark.parametrize(("asked", "threads"), [(None, 1), (3, 3)])
    def test_the_threads_in_effect_are_the_fleets(
        self, stub_settings: Settings, asked: int | None, threads: int
    ) -> None:
        """What a backend computes on is known before the fork."""
        settings = stub_settings.model_copy(update={"threads": asked})
        assert Fleet.make(settings, ("cpu",), 2).threads == threads
