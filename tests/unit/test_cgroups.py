# SPDX-License-Identifier: Apache-2.0
"""The host's memory: whose limit binds, what is used of it, and what the kernel has killed for it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from service.cgroups import HostReading, cgroup_folders, read_host

if TYPE_CHECKING:
    from pathlib import Path

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

MEMINFO = """\
MemTotal:       24684096 kB
MemFree:        21081672 kB
MemAvailable:   23378540 kB
Inactive(file):   622492 kB
Shmem:              9208 kB
HugePages_Total:       0"""
RAM = HostReading(24684096 * KIB, "RAM", (24684096 - 23378540) * KIB, shm_bytes=9208 * KIB)

V2_MOUNT = (
    "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid,nodev - cgroup2 cgroup rw,nsdelegate,memory_recursiveprot"
)
V2_STAT = (
    "anon {anon}\nfile 800000000\nkernel 34000000\nshmem {shmem}\ninactive_anon 0\ninactive_file {inactive}"
)
V2_EVENTS = "low 0\nhigh 0\nmax 31\noom 2\noom_kill {kills}\noom_group_kill 0"

# As on the machine this was written on: controllers apart, and an empty version 2 beside them.
HYBRID_GROUPS = "9:name=systemd:/\n4:memory:{group}\n2:cpuacct:/\n1:cpu:/\n0::/"
HYBRID_MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard,resv_strict,resuid=65534,resgid=65534
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"""
V1_STAT = """\
cache 9465856
shmem 7
inactive_file 11
hierarchical_memory_limit 9223372036854771712
total_cache 1767616512
total_shmem {shmem}
total_inactive_file {inactive}
total_active_file 1120833536"""
V1_NO_LIMIT = 9223372036854771712


def write(root: Path, files: dict[str, str]) -> Path:
    """Make the files of a tree; return its root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def version2(root: Path, group: str, top: str = "/") -> Path:
    """Make a machine of version 2 whose processes are in this group."""
    mounts = V2_MOUNT.format(top=top)
    files = {"self/cgroup": f"0::{group}", "self/mountinfo": mounts, "meminfo": MEMINFO}
    return write(root / "proc", files).parent


def version1(root: Path, group: str, top: str = "/") -> Path:
    """Make a machine of version 1 whose memory controller has us in this group."""
    texts = {
        "self/cgroup": HYBRID_GROUPS.format(group=group),
        "self/mountinfo": HYBRID_MOUNTS.format(top=top),
    }
    return write(root / "proc", texts | {"meminfo": MEMINFO}).parent


def group2(
    root: Path,
    folder: str,
    limit: object,
    *,
    current: int = 0,
    inactive: int = 0,
    shmem: int = 0,
    peak: int | None = None,
    kills: int = 0,
) -> None:
    """Write the files of a cgroup of version 2; the peak is in kernels since 5.19."""
    files = {
        "memory.max": f"{limit}",
        "memory.current": f"{current}",
        "memory.stat": V2_STAT.format(anon=1234, shmem=shmem, inactive=inactive),
        "memory.events": V2_EVENTS.format(kills=kills),
    }
    write(root / "sys/fs/cgroup" / folder, files | ({} if peak is None else {"memory.peak": f"{peak}"}))


def group1(
    root: Path,
    folder: str,
    limit: int,
    *,
    usage: int = 0,
    inactive: int = 0,
    shmem: int = 0,
    peak: int = 0,
    kills: int | None = None,
) -> None:
    """Write the files of a cgroup of version 1; kills are counted in kernels since 4.13."""
    counted = "" if kills is None else f"\noom_kill {kills}"
    files = {
        "memory.limit_in_bytes": f"{limit}",
        "memory.usage_in_bytes": f"{usage}",
        "memory.max_usage_in_bytes": f"{peak}",
        "memory.stat": V1_STAT.format(shmem=shmem, inactive=inactive),
        "memory.oom_control": f"oom_kill_disable 0\nunder_oom 0{counted}",
    }
    write(root / "sys/fs/cgroup/memory" / folder, files)


class TestVersion2:
    def test_own_limit_with_everything_around_it(self, tmp_path: Path) -> None:
        """A container's reading is its limit, its working set, its peak, its kills and its tmpfs."""
        root = version2(tmp_path, "/kube/pod/box")
        group2(root, "kube", "max", current=9 * GIB, kills=7)
        group2(root, "kube/pod", 8 * GIB, current=5 * GIB, kills=4)
        group2(
            root,
            "kube/pod/box",
            4 * GIB,
            current=3 * GIB,
            inactive=700 * MIB,
            shmem=64 * MIB,
            peak=GIB,
            kills=3,
        )
        assert read_host(root) == HostReading(
            total_bytes=4 * GIB,
            source="cgroup v2 limit of /sys/fs/cgroup/kube/pod/box",
            used_bytes=3 * GIB - 700 * MIB,
            peak_bytes=GIB,
            oom_kills=3,
            shm_bytes=64 * MIB,
        )

    def test_a_parents_limit_is_held_against_the_parents_usage(self, tmp_path: Path) -> None:
        """Siblings use up a limit that is set above us; their kills are not ours."""
        root = version2(tmp_path, "/pod/box")
        group2(root, "pod", 2 * GIB, current=1900 * MIB, inactive=100 * MIB, shmem=5, kills=9)
        group2(root, "pod/box", "max", current=200 * MIB, inactive=1, shmem=6, peak=300 * MIB, kills=1)
        assert read_host(root) == HostReading(
            total_bytes=2 * GIB,
            source="cgroup v2 limit of /sys/fs/cgroup/pod",
            used_bytes=1800 * MIB,
            peak_bytes=0,
            oom_kills=1,
            shm_bytes=5,
        )

    def test_of_equal_limits_the_outer_one_binds(self, tmp_path: Path) -> None:
        """A pod has the limit of its one container, and the pod's usage reaches it first."""
        root = version2(tmp_path, "/pod/box")
        group2(root, "pod", GIB, current=900 * MIB)
        group2(root, "pod/box", GIB, current=800 * MIB)
        found = read_host(root)
        assert (found.source, found.used_bytes) == ("cgroup v2 limit of /sys/fs/cgroup/pod", 900 * MIB)

    def test_in_a_namespace_of_its_own_the_root_has_the_limit(self, tmp_path: Path) -> None:
        """A container that sees itself as the root reads the files there."""
        root = version2(tmp_path, "/")
        group2(root, ".", 3 * GIB, current=GIB)
        found = read_host(root)
        assert (found.total_bytes, found.used_bytes) == (3 * GIB, GIB)
        assert found.source == "cgroup v2 limit of /sys/fs/cgroup"

    @pytest.mark.parametrize("limit", ["max", 25 * GIB, 0, "garbage", "", -1])
    def test_no_limit_below_the_ram_means_the_ram(self, tmp_path: Path, limit: object) -> None:
        """`max`, more than there is and nonsense do not bind; tmpfs is the machine's, kills stay ours."""
        root = version2(tmp_path, "/box")
        group2(root, "box", limit, current=GIB, shmem=5, peak=2 * GIB, kills=2)
        expected = HostReading(
            RAM.total_bytes, "RAM", RAM.used_bytes, peak_bytes=0, oom_kills=2, shm_bytes=RAM.shm_bytes
        )
        assert read_host(root) == expected

    def test_a_limit_of_all_the_ram_is_a_limit(self, tmp_path: Path) -> None:
        """Where /proc/meminfo shows the container's limit as the RAM, its cgroup says more about it."""
        root = version2(tmp_path, "/box")
        group2(root, "box", RAM.total_bytes, current=GIB)
        assert read_host(root).source == "cgroup v2 limit of /sys/fs/cgroup/box"

    def test_a_limit_of_strangers_is_none(self, tmp_path: Path) -> None:
        """A group beside ours, and a mount that does not contain ours, say nothing."""
        root = version2(tmp_path, "/box")
        group2(root, "other", GIB, kills=1)
        assert read_host(root) == RAM
        root = version2(tmp_path, "/box", "/elsewhere")
        group2(root, ".", GIB, kills=1)
        assert read_host(root) == RAM


class TestVersion1:
    def test_own_limit_with_everything_around_it(self, tmp_path: Path) -> None:
        """The numbers come from the names of version 1, and from the sums over the groups below."""
        root = version1(tmp_path, "/docker/1234")
        group1(root, ".", V1_NO_LIMIT, usage=20 * GIB, peak=21 * GIB, kills=0)
        group1(root, "docker", V1_NO_LIMIT, usage=9 * GIB, kills=0)
        group1(
            root,
            "docker/1234",
            GIB,
            usage=900 * MIB,
            inactive=300 * MIB,
            shmem=32 * MIB,
            peak=1000 * MIB,
            kills=2,
        )
        assert read_host(root) == HostReading(
            total_bytes=GIB,
            source="cgroup v1 limit of /sys/fs/cgroup/memory/docker/1234",
            used_bytes=600 * MIB,
            peak_bytes=1000 * MIB,
            oom_kills=2,
            shm_bytes=32 * MIB,
        )

    def test_kills_by_a_parents_limit_are_found_where_the_victim_was(self, tmp_path: Path) -> None:
        """Version 1 counts a kill in the victim's own group, so the limiting parent's count stays 0."""
        root = version1(tmp_path, "/pod/box")
        group1(root, "pod", 2 * GIB, usage=GIB, kills=0)
        group1(root, "pod/box", V1_NO_LIMIT, usage=MIB, kills=5)
        found = read_host(root)
        assert (found.source, found.oom_kills) == ("cgroup v1 limit of /sys/fs/cgroup/memory/pod", 5)

    def test_a_kernel_that_does_not_count_kills_has_none(self, tmp_path: Path) -> None:
        """An oom_control of two lines is read as 0 kills."""
        root = version1(tmp_path, "/box")
        group1(root, "box", GIB, usage=MIB)
        assert read_host(root).oom_kills == 0

    def test_docker_mounts_the_group_itself(self, tmp_path: Path) -> None:
        """/proc names the group from the host's root, the mount begins at it."""
        root = version1(tmp_path, "/docker/1234", "/docker/1234")
        group1(root, ".", 2 * GIB, usage=GIB)
        found = read_host(root)
        assert (found.total_bytes, found.used_bytes) == (2 * GIB, GIB)
        assert found.source == "cgroup v1 limit of /sys/fs/cgroup/memory"

    @pytest.mark.parametrize("limit", [V1_NO_LIMIT, 1 << 60, (1 << 63) - (64 << 10)])
    def test_no_limit_is_a_number_too(self, tmp_path: Path, limit: int) -> None:
        """2^63 less a page of any size is no limit, whether or not the RAM is known."""
        root = version1(tmp_path, "/box")
        group1(root, "box", limit, usage=GIB)
        assert read_host(root) == RAM
        (root / "proc/meminfo").unlink()
        assert read_host(root) == HostReading(0, "RAM", 0)

    def test_without_the_ram_a_limit_is_still_one(self, tmp_path: Path) -> None:
        """A machine that hides /proc/meminfo may show the cgroup."""
        root = version1(tmp_path, "/box")
        group1(root, "box", GIB, usage=MIB)
        (root / "proc/meminfo").unlink()
        assert read_host(root).total_bytes == GIB


class TestHybrid:
    def test_as_on_the_machine_this_was_written_on(self, tmp_path: Path) -> None:
        """Memory is in version 1 without a limit, version 2 is mounted and empty: the RAM is all there is."""
        root = version1(tmp_path, "/process_api/e0d5cf5d")
        group1(root, ".", V1_NO_LIMIT, usage=2583535616, peak=14400192512, kills=0)
        group1(root, "process_api", V1_NO_LIMIT, kills=0)
        group1(root, "process_api/e0d5cf5d", V1_NO_LIMIT, kills=0)
        write(root, {"sys/fs/cgroup/unified/cgroup.procs": "1"})
        assert read_host(root) == RAM

    def test_the_tree_of_another_controller_is_not_looked_at(self, tmp_path: Path) -> None:
        """Each controller of version 1 has us in a group of its own; version 2 comes last, as mounted."""
        root = version1(tmp_path, "/a/b")
        memory, unified = root / "sys/fs/cgroup/memory", root / "sys/fs/cgroup/unified"
        folders = [memory / "a/b", memory / "a", memory, unified]
        assert list(cgroup_folders(root, "memory")) == folders
        assert list(cgroup_folders(root, "cpu")) == [root / "sys/fs/cgroup/cpu", unified]


class TestOddFiles:
    def test_no_cgroups_no_limit(self, tmp_path: Path) -> None:
        """A kernel that shows no cgroup leaves the RAM; one that shows nothing, zeros."""
        assert read_host(tmp_path) == HostReading(0, "RAM", 0)
        assert read_host(write(tmp_path, {"proc/meminfo": MEMINFO})) == RAM

    def test_odd_lines_of_meminfo_are_passed_over(self, tmp_path: Path) -> None:
        """A number that is none is unknown, and the others are read."""
        odd = MEMINFO.replace("9208 kB", "-5 kB") + "\nDirectMap: 1 2 kB\nWhat\n\n: kB"
        found = read_host(write(tmp_path, {"proc/meminfo": odd}))
        assert found == HostReading(RAM.total_bytes, "RAM", RAM.used_bytes, shm_bytes=0)

    @pytest.mark.parametrize(
        "text", ["", ":", "0:", "::::", "a b c", "\x00\xff", " - ", "1 2 3 4 5 - cgroup2"]
    )
    def test_garbage_is_passed_over(self, tmp_path: Path, text: str) -> None:
        """Lines that are not what they should be hide neither the RAM nor the lines that are."""
        root = version2(tmp_path, "/box")
        group2(root, "box", GIB, current=MIB)
        for name in ("cgroup", "mountinfo"):
            path = root / "proc/self" / name
            path.write_text(f"{text}\n{path.read_text()}", encoding="latin-1")
        assert read_host(root).total_bytes == GIB
        write(root / "proc/self", {"cgroup": text, "mountinfo": text})
        assert read_host(root) == RAM

    @pytest.mark.parametrize("name", ["memory.current", "memory.stat", "memory.events", "memory.peak"])
    @pytest.mark.parametrize("text", [None, "", "garbage", "inactive_file\nshmem x y\noom_kill -1", "\xff"])
    def test_what_cannot_be_read_is_zero(self, tmp_path: Path, name: str, text: str | None) -> None:
        """A missing or odd file takes away its own numbers, no others."""
        root = version2(tmp_path, "/box")
        group2(root, "box", GIB, current=9 * MIB, inactive=MIB, shmem=2 * MIB, peak=99, kills=3)
        path = root / "sys/fs/cgroup/box" / name
        path.unlink() if text is None else path.write_text(text, encoding="latin-1")
        expected = {"used_bytes": 8 * MIB, "peak_bytes": 99, "oom_kills": 3, "shm_bytes": 2 * MIB}
        expected |= {
            "memory.current": {"used_bytes": 0},
            "memory.stat": {"used_bytes": 9 * MIB, "shm_bytes": 0},
            "memory.events": {"oom_kills": 0},
            "memory.peak": {"peak_bytes": 0},
        }[name]
        found = read_host(root)
        assert found == HostReading(GIB, "cgroup v2 limit of /sys/fs/cgroup/box", **expected)

    def test_more_cache_than_usage_is_no_debt(self, tmp_path: Path) -> None:
        """The two files are read one after the other; what is used is never below 0."""
        root = version2(tmp_path, "/box")
        group2(root, "box", GIB, current=MIB, inactive=2 * MIB)
        assert read_host(root).used_bytes == 0

    def test_an_old_meminfo_leaves_the_usage_unknown(self, tmp_path: Path) -> None:
        """Kernels before 3.14 have no MemAvailable: 0 is unknown, rather than all."""
        root = write(tmp_path, {"proc/meminfo": "MemTotal: 1000 kB\nMemFree: 500 kB"})
        assert read_host(root) == HostReading(1000 * KIB, "RAM", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the real files")
def test_this_machine_has_memory_and_uses_some() -> None:
    """The real files can be read, whichever version they are of."""
    found = read_host()
    assert found.total_bytes > found.used_bytes > 0
    assert found.used_bytes >= found.shm_bytes >= 0
    assert found.source == "RAM" or found.source.startswith(("cgroup v1 limit of /", "cgroup v2 limit of /"))
