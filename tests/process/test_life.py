# SPDX-License-Identifier: Apache-2.0
"""Life after boot: what kills, resizes, rolls and stops a warm service, and what that costs its clients."""

from __future__ import annotations

import os
import re
import statistics
import time
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGSTOP, SIGTERM, SIGTTIN, SIGTTOU, SIGUSR2
from typing import TYPE_CHECKING, Any

import pytest
from harness import Load, Service, assert_invariants, process, runs, until

if TYPE_CHECKING:
    from collections.abc import Sequence

GRACE_S = 0.5
"""The product's own `drain_grace`: these tests count losses."""
CLIENTS = pytest.mark.parametrize("keepalive", [False, True], ids=["new-connections", "keep-alive"])


def serving(workers: int, **settings: Any) -> Service:
    """Return a service of so many workers, each forward pass taking a moment."""
    return Service(workers=workers, **{"drain_grace": GRACE_S, "stub_forward_ms": 20} | settings)


def all_ready(service: Service, slots: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Wait until exactly these slots are held, all of them by READY workers; return the rows."""

    def rows() -> dict[int, dict[str, Any]] | None:
        found = service.workers()
        states = {slot: row["state"] for slot, row in found.items()}
        return found if states == dict.fromkeys(slots, "ready") else None

    found: dict[int, dict[str, Any]] = service.wait(
        rows, what=f"slots {list(slots)} are ready, no others held"
    )
    return found


class TestSigkill:
    @CLIENTS
    def test_costs_only_what_the_worker_was_computing(self, *, keepalive: bool) -> None:
        """Requests in flight elsewhere are answered, the others carry on, the slot gets its next worker."""
        with serving(2) as service:
            service.wait_ready()
            before = service.workers()
            with service.load(clients=8, keepalive=keepalive) as load:
                counted = service.metrics().total("warmfleet_requests_total", slot="s0", endpoint="/embed")
                assert counted > 0
                killed_at = time.monotonic()
                pid = service.kill(0, SIGKILL)
                after = service.wait_state(0, "ready", generation=2)
                load.wait_for(50)
                scrape = service.metrics()
            assert (after["slot"], after["generation"]) == (0, 2)
            assert after["pid"] != pid == before[0]["pid"]
            assert after["failures_by_reason"] == {"killed": 1}
            assert after["last_error"] == "ready: killed by SIGKILL, perhaps out of memory"
            assert service.pids()[1] == before[1]["pid"]
            # It had at most one request of each client.
            assert len(load.lost) <= 8
            for outcome in load.lost:
                assert outcome.status is None, outcome
                assert outcome.sent < killed_at + 0.25 < outcome.sent + outcome.seconds + 0.5, outcome
            # The next worker goes on counting where the last one was killed.
            assert scrape.total("warmfleet_requests_total", slot="s0", endpoint="/embed") > counted
            assert scrape.total("warmfleet_worker_restarts_total", slot="s0") == 1
            assert scrape.total("warmfleet_worker_failures_total", slot="s0", reason="killed") == 1
            assert_invariants(service)

    def test_of_all_workers_at_once_is_survived(self) -> None:
        """Requests wait in the kernel's queue until the first respawn is warm; /ready tells of the gap."""
        with serving(2, stub_load_ms=500) as service:
            service.wait_ready()
            pids = service.pids()
            for pid in pids.values():
                os.kill(pid, SIGKILL)
            load = Load(service.url, clients=4, keepalive=False)
            try:
                status, body = service.wait(lambda: (answer := service.ready())[0] == 503 and answer)
                assert (status, body["status"], body["ready_workers"]) == (503, "degraded", 0)
                service.wait_ready()
                load.wait_for(20)
            finally:
                load.stop()
            service.outcomes += load.outcomes
            assert not load.lost
            rows = all_ready(service, [0, 1])
            assert [row["generation"] for row in rows.values()] == [2, 2]
            assert not set(pids.values()) & set(service.pids().values())
            assert_invariants(service)


class TestCrashLoop:
    def test_backs_off_alone_while_the_survivor_serves(self) -> None:
        """A slot that dies in every boot waits longer each time, and no request notices."""
        with serving(2, stub_scenario="crash_loop_slot_1") as service:
            service.wait_ready()
            survivor = service.pids()[0]
            service.kill(1, SIGKILL)
            pauses: dict[int, float] = {}
            with service.load(clients=2) as load:
                for generation in (3, 4):
                    row = service.wait_state(1, "backoff", generation)
                    pauses[generation] = row["retry_in_seconds"] + row["seconds_in_state"]
                    status, body = service.ready()
                    assert (status, body["ready_workers"]) == (200, 1)
                    assert "slot 1 is backoff" in body["detail"]
                load.wait_for(20)
            assert not load.lost
            assert pauses[3] == pytest.approx(2, abs=0.5)  # 0, 2, 4 … after a death in READY
            assert pauses[4] == pytest.approx(4, abs=0.5)
            assert service.pids()[0] == survivor
            assert service.worker(1)["failures_by_reason"] == {"killed": 3}
            booted = service.metrics().total("warmfleet_worker_boots_total", slot="s1")
            assert booted == service.log.count("Booting worker") - 1 == 4
            assert_invariants(service)


class TestHungForward:
    @pytest.mark.parametrize("scenario", ["hang_forward", "hold_gil_forward"])
    def test_ends_its_worker_and_nobody_else(self, scenario: str) -> None:
        """A pass beyond `forward_timeout` prints all stacks and ends its worker, be it without the GIL."""
        with serving(2, forward_timeout=1, stub_scenario=scenario) as service:
            service.wait_ready()
            pids = service.pids()
            outcome = service.embed(["hang"])
            assert outcome.status is None
            assert 0.5 < outcome.seconds < 10
            service.wait(lambda: service.pids() != pids and len(service.pids()) == 2)
            rows = all_ready(service, [0, 1])
            assert sorted(row["generation"] for row in rows.values()) == [1, 2]
            renewed = next(row for row in rows.values() if row["generation"] == 2)
            assert renewed["failures_by_reason"] == {"forward_timeout": 1}
            assert renewed["last_error"].startswith("ready: a forward pass took longer than forward_timeout")
            assert len(re.findall(r"^(Current t|T)hread 0x", service.log, re.MULTILINE)) >= 2
            assert "in strike" in service.log
            assert service.embed().ok
            assert_invariants(service)

    def test_does_not_hold_up_the_sibling(self) -> None:
        """While one worker hangs, the other answers; lost is only what the hanging one had accepted."""
        with serving(2, forward_timeout=3, stub_scenario="hang_forward") as service:
            service.wait_ready()
            pids = service.pids()
            with service.load(clients=4) as load:
                began = time.monotonic()
                assert not service.embed(["hang"]).ok
                ended = time.monotonic()
                service.wait(lambda: service.pids() != pids)
            answered = [o for o in load.outcomes if o.ok and began + 0.5 < o.sent < ended - 0.5]
            assert len(answered) > 20
            assert max(o.seconds for o in answered) < 1
            assert len(load.lost) <= 4  # one of each client
            all_ready(service, [0, 1])
            assert_invariants(service)


class TestSigtermOfAWorker:
    @CLIENTS
    def test_loses_nothing(self, *, keepalive: bool) -> None:
        """Under load a worker that is told to go finishes, moves its clients, and is replaced."""
        with serving(2) as service:
            service.wait_ready()
            with service.load(clients=6, keepalive=keepalive) as load:
                pid = service.kill(0, SIGTERM)
                until(lambda: not runs(pid), what="the worker ends")
                service.wait_state(0, "ready", generation=2)
                load.wait_for(50)
            assert not load.lost
            row = service.worker(0)
            assert (row["failures"], row["failures_by_reason"], row["last_error"]) == (0, {}, None)
            assert_invariants(service)

    @CLIENTS
    def test_loses_nothing_with_a_single_worker(self, *, keepalive: bool) -> None:
        """Without a sibling, connections wait until the next worker is warm."""
        with serving(1) as service:
            service.wait_ready()
            with service.load(clients=3, keepalive=keepalive) as load:
                service.kill(0, SIGTERM)
                service.wait_state(0, "ready", generation=2)
                load.wait_for(20)
            assert not load.lost
            assert_invariants(service)

    def test_waits_for_a_long_request(self) -> None:
        """A request in work when the worker is told to go is finished and answered."""
        with serving(2, stub_scenario="slow_forward") as service:
            service.wait_ready()
            answer = service.send(["slow"])
            slot = service.wait(lambda: [slot for slot, row in service.workers().items() if row["load"]])[0]
            pid = service.kill(slot, SIGTERM)
            service.wait_state(slot, "draining")
            assert answer().ok
            until(lambda: not runs(pid), what="the worker ends")
            all_ready(service, [0, 1])
            assert_invariants(service)


class TestResize:
    @CLIENTS
    def test_grows_and_shrinks_without_a_loss(self, *, keepalive: bool) -> None:
        """TTIN adds a slot, TTOU takes the newest worker away again; under load nobody notices."""
        with serving(2) as service:
            service.wait_ready()
            pids = service.pids()
            with service.load(clients=6, keepalive=keepalive) as load:
                service.signal(SIGTTIN)
                grown = all_ready(service, [0, 1, 2])
                assert service.ready()[1]["target_workers"] == 3
                load.wait_for(50)
                service.signal(SIGTTOU)
                all_ready(service, [0, 1])
                assert service.ready()[1]["target_workers"] == 2
                until(lambda: not runs(grown[2]["pid"]), what="the third worker ends")
                load.wait_for(50)
            assert not load.lost
            assert service.pids() == pids
            assert "shrinking to 2 workers: slots [2] leave" in service.log
            assert_invariants(service)

    def test_shrinks_to_one_and_no_further(self) -> None:
        """TTOU takes the newest first and stops at one worker, which serves on."""
        with serving(3) as service:
            service.wait_ready()
            rows = sorted(service.workers().values(), key=lambda row: -row["seconds_in_state"])
            first, second, _ = [row["slot"] for row in rows]  # which loads first is chance
            pid = service.pids()[first]
            with service.load(clients=4) as load:
                for left in ([first, second], [first], [first]):
                    service.signal(SIGTTOU)
                    all_ready(service, sorted(left))
                load.wait_for(20)
            assert not load.lost
            assert service.pids() == {first: pid}
            assert_invariants(service)

    def test_cold_worker_goes_first(self) -> None:
        """TTOU gives up a worker that still loads, and none of those that serve."""
        with serving(2, stub_scenario="slow_load_slot_2") as service:
            service.wait_ready()
            pids = service.pids()
            service.signal(SIGTTIN)
            service.wait_state(2, "loading")
            assert service.ready()[0] == 200
            service.signal(SIGTTOU)
            all_ready(service, [0, 1])
            assert service.pids() == pids
            assert_invariants(service)

    def test_newest_goes_first_whatever_its_slot(self) -> None:
        """Slots are places, not ages: after a respawn of slot 0 it is slot 0 that has served the shortest."""
        with serving(2) as service:
            service.wait_ready()
            service.kill(0, SIGTERM)
            service.wait_state(0, "ready", generation=2)
            kept = service.pids()[1]
            service.signal(SIGTTOU)
            service.wait(lambda: service.pids() == {1: kept})
            assert_invariants(service)

    def test_burst_of_signals_ends_where_it_should(self) -> None:
        """Ten signals at once leave as many workers as they add up to, each in a slot of its own."""
        with serving(2) as service:
            service.wait_ready()
            for _ in range(3):
                for signum in (SIGTTIN, SIGTTIN, SIGTTOU):
                    service.signal(signum)
                    time.sleep(0.05)  # a signal that is already pending is not delivered twice
            service.signal(SIGTTOU)
            service.wait(lambda: service.ready()[1]["target_workers"] == 4)
            all_ready(service, [0, 1, 2, 3])
            assert_invariants(service)


class TestRoll:
    @CLIENTS
    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_replaces_every_worker_without_a_loss(self, workers: int, *, keepalive: bool) -> None:
        """HUP renews all workers in their slots, one by one, and loses no request, not even with one."""
        with serving(workers, stub_load_ms=200) as service:
            service.wait_ready()
            pids = service.pids()
            away: list[int] = []

            def rolled() -> bool:
                rows = service.workers()
                away.append(sum(row["state"] != "ready" for row in rows.values()))
                return not away[-1] and not set(service.pids().values()) & set(pids.values())

            with service.load(clients=4, keepalive=keepalive) as load:
                service.signal(SIGHUP)
                service.wait(rolled, what="every worker is a new one and ready")
                load.wait_for(20)
            assert not load.lost
            assert max(away) == 1
            rows = all_ready(service, range(workers))
            for row in rows.values():
                assert (row["generation"], row["epoch"], row["failures"]) == (2, 1, 0)
            assert service.log.count("rolling to epoch 1") == workers
            assert_invariants(service)

    def test_keeps_the_number_of_workers(self) -> None:
        """HUP keeps what TTIN added; Gunicorn's own reload would forget it."""
        with serving(1) as service:
            service.wait_ready()
            service.signal(SIGTTIN)
            pids = {slot: row["pid"] for slot, row in all_ready(service, [0, 1]).items()}
            service.signal(SIGHUP)
            service.wait(lambda: not set(service.pids().values()) & set(pids.values()), what="all are new")
            all_ready(service, [0, 1])
            assert_invariants(service)

    def test_waits_for_a_sibling_that_is_away(self) -> None:
        """A roll takes no worker down while another one, that can be ready, is not."""
        with serving(2, stub_scenario="slow_respawn_slot_1") as service:
            service.wait_ready()
            service.kill(1, SIGKILL)
            service.wait_state(1, "loading", generation=2)
            away: list[int] = []

            def rolled() -> bool:
                rows = service.workers()
                away.append(sum(row["state"] != "ready" for row in rows.values()))
                return not away[-1] and all(row["epoch"] == 1 for row in rows.values())

            with service.load(clients=2) as load:
                service.signal(SIGHUP)
                service.wait_log("rolling restart: epoch 1")
                service.wait(rolled, what="every worker is of the new epoch and ready")
            assert max(away) == 1
            assert not load.lost
            assert_invariants(service)

    def test_second_hup_rolls_again(self) -> None:
        """A HUP during a roll is not lost: everybody ends in the newest epoch."""
        with serving(2) as service:
            service.wait_ready()
            service.signal(SIGHUP)
            service.wait_state(0, "ready", generation=1)
            service.wait_log("rolling to epoch 1")
            service.signal(SIGHUP)
            service.wait(lambda: [row["epoch"] for row in service.workers().values()] == [2, 2])
            all_ready(service, [0, 1])
            assert_invariants(service)


class TestUpgrade:
    def test_is_refused(self) -> None:
        """USR2 starts no second arbiter; the log says why, and nothing else happens."""
        with serving(2) as service:
            service.wait_ready()
            pids = service.pids()
            service.signal(SIGUSR2)
            service.wait_log("USR2 is refused: a second arbiter would double every model in memory")
            assert service.embed().ok
            assert service.pids() == pids
            assert_invariants(service)


class TestArbiterKilled:
    @pytest.mark.parametrize(
        "settings",
        [{}, {"stub_scenario": "slow_load"}, {"stub_scenario": "hold_gil_load_once", "load_timeout": 2}],
        ids=["ready", "loading", "loading-gil"],
    )
    def test_nothing_runs_on(self, settings: dict[str, Any]) -> None:
        """Without their arbiter workers end by themselves, whatever they were doing."""
        with serving(2, **settings) as service:
            service.wait(lambda: service.worker(0).get("state") in ("ready", "loading"))
            service.signal(SIGKILL)
            assert service.wait_end() == -SIGKILL
            service.assert_nothing_runs(10)
            assert_invariants(service)

    def test_requests_in_work_are_answered(self) -> None:
        """What the workers had taken on is finished before they go."""
        with serving(2, stub_scenario="slow_forward") as service:
            service.wait_ready()
            answer = service.send(["slow"])
            service.wait(lambda: any(row["load"] for row in service.workers().values()))
            service.signal(SIGKILL)
            assert answer().ok
            assert service.wait_end() == -SIGKILL
            service.assert_nothing_runs(10)
            assert_invariants(service)


class TestStop:
    @CLIENTS
    @pytest.mark.parametrize("signum", [SIGTERM, SIGINT, SIGQUIT])
    def test_answers_all_that_it_took_on(self, signum: int, *, keepalive: bool) -> None:
        """All is answered until the port is closed, /ready says `draining`, and the exit code is 0."""
        with serving(2) as service:
            service.wait_ready()
            with service.load(clients=6, keepalive=keepalive) as load:
                service.signal(signum)
                status, body = service.wait(lambda: (answer := service.ready())[0] == 503 and answer)
                assert (status, body["status"]) == (503, "draining")
                assert body["detail"] == "the service is stopping"
                assert service.wait_end() == 0
            lost = [outcome for outcome in load.lost if not outcome.refused]
            assert not lost, lost
            assert_invariants(service)

    def test_finishes_a_long_request(self) -> None:
        """A request of two seconds, in work when the stop comes, is answered."""
        with serving(2, stub_scenario="slow_forward") as service:
            service.wait_ready()
            answer = service.send(["slow"])
            service.wait(lambda: any(row["load"] for row in service.workers().values()))
            service.signal(SIGTERM)
            assert answer().ok
            assert service.wait_end() == 0
            assert_invariants(service)

    def test_ends_workers_that_boot(self) -> None:
        """A stop does not wait for loads."""
        with serving(2, stub_scenario="slow_warm") as service:
            service.wait(lambda: list(service.states().values()) == ["warming"] * 2)
            service.signal(SIGTERM)
            assert service.wait_end(3) == 0
            assert_invariants(service)

    def test_leaves_no_folder_behind(self) -> None:
        """The counter files go with the service."""
        with serving(1) as service:
            service.wait_ready()
            maps = process_files(service.pids()[0])
            folders = {path.rpartition("/")[0] for path in maps if "warmfleet-metrics-" in path}
            assert len(folders) == 1
            service.stop()
            assert not any(os.path.exists(folder) for folder in folders)  # noqa: PTH110
            assert_invariants(service)


class TestSigstop:
    def test_does_not_slow_the_siblings(self) -> None:
        """A worker that stands still takes no new connection; the others answer as fast as before."""
        with serving(3) as service:
            service.wait_ready()
            stopped = 0
            try:
                with service.load(clients=3) as load:
                    load.wait_for(50)
                    before = [o.seconds for o in load.outcomes]
                    stopped = service.kill(0, SIGSTOP)
                    at = time.monotonic()
                    service.wait(lambda: (answer := service.ready())[1]["ready_workers"] == 2 and answer)
                    assert service.ready()[0] == 200
                    assert "slot 0 has not been heard of for" in service.ready()[1]["detail"]
                    load.wait_for(60)
                    during = [o for o in load.outcomes if o.sent > at + 1]
                    os.kill(stopped, SIGCONT)
                    service.wait(lambda: service.ready()[1]["ready_workers"] == 3)
                assert not load.lost  # those it held were answered when it went on
                slowest = max(o.seconds for o in during)
                typical = statistics.median(o.seconds for o in during)
                assert typical < 2 * statistics.median(before) + 0.02
                assert slowest < 1
                assert service.pids()[0] == stopped
                assert_invariants(service)
            finally:
                if stopped and runs(stopped):
                    os.kill(stopped, SIGCONT)

    def test_stop_of_the_service_does_not_wait_for_ever(self) -> None:
        """A worker that stands still when the service stops is killed after `graceful_timeout`."""
        with serving(2, graceful_timeout=3, drain_grace=0.1) as service:
            service.wait_ready()
            service.kill(0, SIGSTOP)
            assert service.stop() == 0
            assert_invariants(service)


def process_files(pid: int) -> list[str]:
    """Return the files that a process has mapped."""
    assert process(pid)
    with open(f"/proc/{pid}/maps", encoding="utf-8") as lines:  # noqa: PTH123
        return [line.split(maxsplit=5)[5].strip() for line in lines if len(line.split(maxsplit=5)) == 6]
