# SPDX-License-Identifier: Apache-2.0
"""Workers by measured memory: how many start, why no more, and what becomes of those that take too much."""

from __future__ import annotations

from pathlib import Path
from signal import SIGKILL, SIGTTIN, SIGTTOU
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from harness import MemoryGroup, Service, assert_invariants

from service.cpus import available

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
CORES = available().cores
grows = pytest.mark.skipif(CORES < 2, reason="`auto` starts no second worker on a single core")
GROWING: dict[str, Any] = {"workers": "auto", "max_workers": 2, "stub_scenario": "slow_load_slot_1"}
LEAKED_MUCH_MIB = 500e6 / MIB
"""What scenarios/leak_much.toml keeps at each pass over its word."""
GROWN = "it has grown to "
FORESEEN = "budget, by the boot of "
BEATS_S = 1.0
"""Ten heartbeats: whoever wanted to act on what it sees has done so."""


def ready_slots(service: Service) -> list[int]:
    return [slot for slot, state in service.states().items() if state == "ready"]


def settled(service: Service, count: int) -> list[int]:
    """Wait until so many workers are wanted and run, all of them READY for ten beats; return their slots."""

    def slots() -> list[int] | None:
        found = service.get("/workers").json()
        rows = [row for row in found["workers"] if row["state"] != "empty"]
        calm = all(row["state"] == "ready" and row["seconds_in_state"] > BEATS_S for row in rows)
        return [row["slot"] for row in rows] if calm and len(rows) == count == found["target"] else None

    found: list[int] = service.wait(slots, what=f"{count} workers are ready, and stay so")
    return found


def line(service: Service, name: str) -> dict[str, Any]:
    """Return one constraint of the sum."""
    return next(one for one in service.budget()["constraints"] if one["name"] == name)


class TestAuto:
    @grows
    def test_serves_from_the_scout_on_and_grows_by_steps(self) -> None:
        """READY, for good, with the first worker; the second is added while it serves; both are told."""
        with Service(**GROWING) as service:
            assert service.wait_ready()["ready_workers"] == 1
            service.wait_state(1, "loading")
            status, body = service.ready()
            assert (status, body["ready_workers"], body["target_workers"], body["planned_workers"]) == (
                200,
                1,
                2,
                2,
            )
            assert service.embed().ok
            assert settled(service, 2) == [0, 1]
            budget = service.budget()
            assert (budget["wanted"], budget["planned"], budget["fits"]) == ("auto", 2, 2)
            assert f"2 workers fit; {budget['binding']} allows no more" == budget["text"][-1]
            assert "max_workers 2: 2 fit" in budget["text"]
            metrics = service.metrics()
            assert metrics.total("warmfleet_planned_workers") == 2
            assert metrics.total("warmfleet_workers_fit", constraint="max_workers") == 2
            assert metrics.total("warmfleet_workers_fit", constraint="cores") == CORES
            assert metrics.total("warmfleet_resizes_total", direction="more") == 1
            assert metrics.total("warmfleet_resizes_total", direction="fewer") == 0
            assert metrics.total("warmfleet_worker_cost_bytes", part="host") == budget["sum"]["cost"]["host"]
            assert metrics.total("warmfleet_budget_headroom_bytes", constraint="host") > 0
            assert_invariants(service)

    @pytest.mark.skipif(CORES not in range(2, 9), reason="as many workers as cores: 2 to 8 are enough")
    def test_starts_no_more_workers_than_cores(self) -> None:
        """On a CPU the cores bind, where the memory does not, and the sum says so."""
        with Service(workers="auto") as service:
            service.wait_ready()
            assert len(settled(service, CORES)) == CORES
            budget = service.budget()
            assert (budget["planned"], budget["fits"], budget["binding"]) == (CORES, CORES, "cores")
            assert f"{CORES} cores / 1 thread a worker: {CORES} fit" in budget["text"]
            assert_invariants(service)

    def test_grows_no_further_than_max_workers(self) -> None:
        """`max_workers=1` leaves it at the scout."""
        with Service(workers="auto", max_workers=1) as service:
            service.wait_ready()
            assert settled(service, 1) == [0]
            assert (service.budget()["planned"], service.budget()["binding"]) == (1, "max_workers")
            assert "ttin" not in service.log
            assert_invariants(service)

    @grows
    def test_ttou_of_a_person_ends_the_growth(self) -> None:
        """Fewer workers, by TTOU amid the growth, stay fewer: neither a beat nor a respawn adds one."""
        with Service(**GROWING) as service:
            service.wait_ready()
            service.wait_state(1, "loading")
            service.signal(SIGTTOU)
            assert settled(service, 1) == [0]
            service.kill(0, SIGKILL)
            service.wait_state(0, "ready", generation=2)
            assert settled(service, 1) == [0]
            assert (service.budget()["planned"], service.budget()["fits"]) == (1, 2)
            assert service.metrics().total("warmfleet_planned_workers") == 1
            assert_invariants(service)

    @grows
    def test_ttin_is_clamped_to_what_fits(self) -> None:
        """A person's wish for one more than fits changes nothing, and the log says why; below, it does."""
        with Service(workers="auto", max_workers=2) as service:
            service.wait_ready()
            settled(service, 2)
            service.signal(SIGTTIN)
            service.wait_log("3 workers are wanted, 2 is the most: ")
            assert settled(service, 2) == [0, 1]
            service.signal(SIGTTOU)
            assert len(settled(service, 1)) == 1
            assert service.budget()["planned"] == 1
            service.signal(SIGTTIN)
            assert len(settled(service, 2)) == 2
            assert service.budget()["planned"] == 2
            assert_invariants(service)


class TestMemoryLimit:
    """A real limit, of a cgroup, in which 2 to 4 of 6 workers fit."""

    LIMIT = 600 * MIB
    WANTED: ClassVar[dict[str, Any]] = {"workers": 6, "stub_memory_mb": 60}

    def test_clamp_runs_what_fits(self) -> None:
        """Surplus workers leave, exactly so many; the log and /workers show the sum of the real limit."""
        with MemoryGroup.make(self.LIMIT) as group, Service(group=group, **self.WANTED) as service:
            service.wait(lambda: service.budget()["planned"], what="a worker was measured")
            host = line(service, "host")
            fits = host["budget"] // host["price"]
            assert 2 <= fits <= 4
            settled(service, fits)
            budget = service.budget()
            assert (budget["policy"], budget["wanted"]) == ("clamp", 6)
            assert (budget["planned"], budget["fits"], budget["binding"]) == (fits, fits, "host")
            assert host["terms"]["total"] == self.LIMIT
            assert f"6 workers are wanted, {fits} fit: host: 600 MiB * 0.9" in service.log
            assert f"; {fits} run\n" in service.log
            metrics = service.metrics()
            assert metrics.total("warmfleet_resizes_total", direction="fewer") == 6 - fits
            assert metrics.total("warmfleet_budget_bytes", constraint="host") == host["budget"]
            assert service.embed().ok
            assert group.oom_kills == 0
            assert_invariants(service)

    def test_refuse_ends_the_service(self) -> None:
        """Exit code 3, with the sum and a way out in the log."""
        settings = self.WANTED | {"budget_policy": "refuse"}
        with MemoryGroup.make(self.LIMIT) as group, Service(group=group, **settings) as service:
            assert service.wait_end() == 3
            assert "6 workers are wanted, " in service.log
            assert " fit: host: 600 MiB * 0.9" in service.log
            assert "; give more memory, lower the limits, or set budget_policy to " in service.log
            assert_invariants(service)

    def test_warn_runs_all(self) -> None:
        """The warning is all that becomes of it."""
        settings = self.WANTED | {"budget_policy": "warn"}
        with MemoryGroup.make(self.LIMIT) as group, Service(group=group, **settings) as service:
            service.wait_ready()
            assert settled(service, 6) == list(range(6))
            assert "6 workers are wanted, " in service.log
            assert service.budget()["planned"] == 6 > service.budget()["fits"]
            assert_invariants(service)

    @pytest.mark.parametrize("workers", [1, "auto"])
    def test_one_worker_runs_even_where_none_fits(self, workers: object) -> None:
        """The first worker is there, and works: it serves, and the log says that the sum allows none."""
        with MemoryGroup.make(self.LIMIT) as group, self.too_large(group, workers=workers) as service:
            service.wait_ready()
            assert settled(service, 1) == [0]
            assert "1 workers are wanted, 0 fit: host: 600 MiB * 0.3" in service.log
            assert service.embed().ok
            assert_invariants(service)

    def test_refuse_ends_a_single_worker_too(self) -> None:
        """Where none fits, `refuse` means it: exit code 3, and the sum."""
        with (
            MemoryGroup.make(self.LIMIT) as group,
            self.too_large(group, workers=1, budget_policy="refuse") as service,
        ):
            assert service.wait_end() == 3
            assert "1 workers are wanted, 0 fit: host: 600 MiB * 0.3" in service.log
            assert_invariants(service)

    def too_large(self, group: MemoryGroup, **settings: Any) -> Service:
        return Service(group=group, stub_memory_mb=100, host_memory_utilization=0.3, **settings)


class TestManifest:
    SETTINGS: ClassVar[dict[str, Any]] = {"workers": "auto", "max_workers": 2, "stub_load_ms": 700}

    def boot(self, folder: Path, group: MemoryGroup | None = None, **settings: Any) -> Service:
        return Service(cache_dir=folder, group=group, **self.SETTINGS | settings)

    def measured(self, folder: Path, service: Service, workers: int) -> Path:
        """Wait until a boot is over and its manifest is written; return the file."""
        settled(service, workers)
        service.wait(lambda: list(folder.glob("*.json")), what="a manifest is written")
        (file,) = folder.glob("*.json")
        return file

    @grows
    def test_second_boot_starts_all_workers_at_once(self, tmp_path: Path) -> None:
        """No scout, no steps: both workers are forked at the start, and /ready says how long it takes."""
        with self.boot(tmp_path) as service:
            service.wait_ready()
            self.measured(tmp_path, service, 2)
            assert service.log.count("Handling signal: ttin") == 1
            assert FORESEEN not in service.log
            assert_invariants(service)
        with self.boot(tmp_path) as service:

            def foretold() -> list[float]:
                rows = [row for row in service.ready()[1]["workers"] if row["state"] == "loading"]
                return [row["eta_seconds"] for row in rows if row["eta_seconds"]]

            service.wait(lambda: len(found := foretold()) == 2 and max(found) < 20, what="both have an ETA")
            assert service.wait_ready()["target_workers"] == 2
            assert settled(service, 2) == [0, 1]
            assert all(row["eta_seconds"] is None for row in service.ready()[1]["workers"])
            assert FORESEEN in service.log
            assert ": 2 workers fit, " in service.log
            assert "ttin" not in service.log
            assert service.metrics().total("warmfleet_resizes_total") == 0
            assert_invariants(service)

    @grows
    def test_less_memory_than_last_time_starts_fewer(self, tmp_path: Path) -> None:
        """What the last boot measured is held against the limit of today."""
        with MemoryGroup.make(800 * MIB) as group:
            with self.boot(tmp_path, group, stub_memory_mb=60) as service:
                service.wait_ready()
                self.measured(tmp_path, service, 2)
            group.limit(330 * MIB)
            with self.boot(tmp_path, group, stub_memory_mb=60) as service:
                service.wait_ready()
                assert settled(service, 1) == [0]
                assert service.log.count("Booting worker") == 1
                assert ": 1 workers fit, host binds" in service.log
                assert service.budget()["binding"] == "host"
                assert group.oom_kills == 0
                assert_invariants(service)

    @grows
    def test_a_corrupt_one_is_ignored_with_one_line(self, tmp_path: Path) -> None:
        """The boot measures anew, as if there were none, and writes a good one."""
        with self.boot(tmp_path) as service:
            service.wait_ready()
            file = self.measured(tmp_path, service, 2)
        file.write_bytes(file.read_bytes()[:100])
        with self.boot(tmp_path) as service:
            service.wait_ready()
            settled(service, 2)
            service.wait(lambda: file.stat().st_size > 100, what="it is written anew")
            assert service.log.count(f"the manifest {file} is ignored: ") == 1
            assert service.log.count("manifest") == service.log.count(str(tmp_path)) == 1
            assert_invariants(service)

    def test_a_folder_that_cannot_be_written_costs_one_line(self, tmp_path: Path) -> None:
        """A file in its place (which not even root can write into): the service runs, and says so once."""
        place = tmp_path / "file"
        place.touch()
        with self.boot(place, workers=2) as service:
            service.wait_ready()
            settled(service, 2)
            service.wait_log("cannot be opened: ")
            assert all(service.embed().ok for _ in range(10))  # shapes to be kept at the end
            assert_invariants(service)
            assert service.stop() == 0
            assert service.log.count(str(place)) == 1

    def test_shapes_of_traffic_are_warmed_at_the_next_boot(self, tmp_path: Path) -> None:
        """Traffic of 5 texts of 25 tokens, a stop, and the next boot warms that batch beside its own."""
        settings: dict[str, Any] = {"workers": 2, "stub_load_ms": 0, "stub_forward_ms": 5}

        def warmed(service: Service) -> list[set[tuple[int, int]]]:
            rows = service.workers().values()
            return [{(shape["texts"], shape["tokens"]) for shape in row["warmup_shapes"]} for row in rows]

        with self.boot(tmp_path, **settings) as service:
            service.wait_ready()
            self.measured(tmp_path, service, 2)
            assert all((5, 25) not in shapes for shapes in warmed(service))
            assert all(service.embed(["word " * 23] * 5).ok for _ in range(60))
            assert service.stop() == 0
            assert_invariants(service)
        with self.boot(tmp_path, **settings) as service:
            service.wait_ready()
            settled(service, 2)
            assert all((5, 25) in shapes for shapes in warmed(service))
            assert_invariants(service)


class TestGrownWorker:
    def test_is_replaced_first_where_there_is_room(self) -> None:
        """READY workers are never fewer than before, no request is lost, and the reason is counted."""
        with (
            MemoryGroup.make(800 * MIB) as group,
            Service(
                workers=3,
                group=group,
                stub_scenario="leak_much",
                drain_grace=0.5,
                host_memory_utilization=0.7,
            ) as service,
        ):
            service.wait_ready()
            settled(service, 3)
            host = line(service, "host")
            assert host["fits"] > 3, "the sizes of this test do not show it"
            leaked = LEAKED_MUCH_MIB * MIB + 3 * host["terms"]["private"]
            assert host["budget"] < leaked, "the sizes of this test do not show it"
            with service.load(clients=3) as load:
                assert service.embed(["leak"]).ok
                assert sorted(fewest_ready(service, lambda: replaced(service))) == [3, 3]
                load.wait_for(20)
            assert not load.lost
            assert "a replacement comes first: " in service.log
            slots = settled(service, 3)
            assert 3 in slots  # beside the three that there were
            rows = service.workers()
            (grown,) = [row for row in rows.values() if row["failures_by_reason"]]
            assert grown["failures_by_reason"] == {"grew": 1}
            assert grown["slot"] not in slots
            assert GROWN in grown["last_error"]
            assert service.budget()["planned"] == 3
            assert service.metrics().total("warmfleet_worker_failures_total", reason="grew") == 1
            assert service.metrics().total("warmfleet_worker_failures_total") == 1
            assert group.oom_kills == 0
            assert_invariants(service)

    def test_leaves_alone_where_there_is_none(self) -> None:
        """Without room for a replacement it leaves when the other can do without it, and loses no request."""
        with (
            MemoryGroup.make(620 * MIB) as group,
            Service(
                workers=2,
                group=group,
                stub_scenario="leak",
                drain_grace=0.5,
                stub_memory_mb=120,
                ready_floor=1,
            ) as service,
        ):
            service.wait_ready()
            settled(service, 2)
            assert service.budget()["fits"] == 2, service.budget()["text"]
            with service.load(clients=2) as load:
                assert service.embed(["leak"]).ok
                service.wait(lambda: replaced(service), what="the grown worker is replaced")
                load.wait_for(20)
            assert not load.lost
            assert "a replacement comes first" not in service.log
            assert settled(service, 2) == [0, 1]
            assert sorted(row["generation"] for row in service.workers().values()) == [1, 2]
            assert service.metrics().total("warmfleet_worker_failures_total", reason="grew") == 1
            assert group.oom_kills == 0
            assert_invariants(service)


def replaced(service: Service) -> bool:
    """Say whether a worker has grown, and another is READY in its place."""
    rows = service.workers().values()
    target = service.get("/workers").json()["target"]
    grown = any(row["failures_by_reason"].get("grew") for row in rows)
    live = [row["state"] for row in rows if row["state"] != "empty"]
    fresh = max(row["generation"] for row in rows) > 1 or len(rows) > target
    return grown and fresh and live == ["ready"] * target


def fewest_ready(service: Service, done: Callable[[], bool]) -> tuple[int, int]:
    """Wait; return the least number of READY workers meanwhile, and the last."""
    seen: list[int] = []

    def look() -> bool:
        seen.append(service.ready()[1]["ready_workers"])
        return done()

    service.wait(look, what="the grown worker is replaced")
    return min(seen), seen[-1]


class TestOomKill:
    def test_is_counted_and_raises_the_price_of_a_worker(self) -> None:
        """The kernel kills one worker; the fleet serves on, the slot gets its next, each counts for more."""
        with (
            MemoryGroup.make(330 * MIB) as group,
            Service(workers=2, group=group, stub_scenario="leak", host_memory_utilization=1) as service,
        ):
            service.wait_ready()
            settled(service, 2)
            before, arbiter = service.pids(), service.arbiter
            price = line(service, "host")["price"]
            assert service.embed(["leak"]).status is None
            service.wait(lambda: service.metrics().total("warmfleet_oom_kills_total"), what="it is counted")
            settled(service, 2)
            assert group.oom_kills == 1
            assert service.metrics().total("warmfleet_oom_kills_total") == 1
            budget = service.budget()
            assert (budget["oom_kills"], budget["sum"]["cost"]["raised"]) == (1, pytest.approx(1.1))
            assert line(service, "host")["price"] == pytest.approx(1.1 * price, rel=1e-3)
            assert any(text.count(") * 1.1: ") for text in budget["text"])
            rows = service.workers().values()
            assert sorted(row["generation"] for row in rows) == [1, 2]
            (killed,) = [row for row in rows if row["generation"] == 2]
            assert killed["failures_by_reason"] == {"killed": 1}
            assert len(set(before.values()) & set(service.pids().values())) == 1
            assert Path(f"/proc/{arbiter}").exists()
            assert service.embed().ok
            assert_invariants(service)

    def test_shrinks_a_fleet_that_no_longer_fits(self) -> None:
        """Where the raised price leaves room for fewer, fewer run; what serves is never refused."""
        with (
            MemoryGroup.make(430 * MIB) as group,
            Service(
                workers=2,
                group=group,
                stub_scenario="leak",
                stub_memory_mb=40,
                budget_policy="refuse",
            ) as service,
        ):
            service.wait_ready()
            settled(service, 2)
            host = line(service, "host")
            assert host["fits"] == 2
            assert host["budget"] // int(1.1 * host["price"]) == 1, "the sizes of this test do not show it"
            assert service.embed(["leak"]).status is None
            settled(service, 1)
            assert group.oom_kills == 1
            assert (service.budget()["planned"], service.budget()["fits"]) == (1, 1)
            assert "2 workers are wanted, 1 fit: " in service.log
            assert service.embed().ok
            assert_invariants(service)
