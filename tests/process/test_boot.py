# SPDX-License-Identifier: Apache-2.0
"""From `gunicorn -c gunicorn_conf.py` to READY, and every way in which that can fail."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from itertools import pairwise
from signal import SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from harness import PATIENCE_S, Service, assert_invariants, process, runs, until

if TYPE_CHECKING:
    from pathlib import Path

JOURNEY = ["empty", "spawned", "pinned", "backoff", "waiting", "loading", "warming", "ready"]

SLOW_IMPORT = '''
"""Found on PYTHONPATH: makes the preload import of the arbiter last."""
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "service.backends.stub":
            print("importing slowly", flush=True)
            time.sleep(float(SECONDS))

sys.meta_path.insert(0, Slow())
'''


def ready_bodies(service: Service) -> list[tuple[int, dict[str, Any]]]:
    """Ask /ready over and over until it says yes or the service has ended; return every answer."""
    answers: list[tuple[int, dict[str, Any]]] = []

    def decided() -> bool:
        with suppress(httpx.TransportError):
            answers.append(service.ready())
        return not runs(service.arbiter) or bool(answers and answers[-1][0] == 200)

    until(decided, what="ready, or ended")
    return answers


@pytest.fixture
def slow_import(tmp_path: Path) -> dict[str, str]:
    """An environment in which the arbiter imports for three seconds."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT.replace("SECONDS", "3"), encoding="utf-8")
    return {"PYTHONPATH": str(tmp_path)}


class TestReady:
    def test_goes_from_503_to_200_along_the_journey(self) -> None:
        """/ready says no until all are ready, and shows each slot on its way, never a step backwards."""
        with Service(workers=2, concurrent_loads=1, stub_scenario="slow_boot") as service:
            answers = ready_bodies(service)
            codes = [status for status, _ in answers]
            assert set(codes[:-1]) == {503}
            assert codes[-1] == 200
            seen: dict[int, list[str]] = {0: [], 1: []}
            for _, body in answers:
                for row in body["workers"]:
                    seen[row["slot"]].append(row["state"])
            for states in seen.values():
                steps = [JOURNEY.index(state) for state in states]
                assert steps == sorted(steps)
                assert {"loading", "warming", "ready"} <= set(states)
            assert "waiting" in seen[1]  # one load permit
            first, last = answers[0][1], answers[-1][1]
            assert [row["slot"] for row in first["workers"]] == [0, 1]  # also before its first fork
            assert first["status"] == "starting"
            assert first["ready_workers"] == 0
            assert first["warmup_seconds"] is None
            assert (first["wanted_workers"], first["target_workers"]) == (2, 2)
            assert re.search(r"^0 of 2 workers are ready, 2 wanted; slot 0 is \w+ since", first["detail"])
            assert (last["status"], last["ready_workers"]) == ("ready", 2)
            assert last["detail"] == "2 of 2 workers are ready"
            assert last["warmup_seconds"] >= 0.4
            assert_invariants(service)

    def test_shows_progress_while_warming(self) -> None:
        """Progress grows, and `doing` names the batch and the round, in the row and in the detail."""
        with Service(workers=1, stub_scenario="slow_boot") as service:
            warming = [
                (body["workers"][0], body["detail"])
                for _, body in ready_bodies(service)
                if body["workers"] and body["workers"][0]["state"] == "warming"
            ]
            progress = [row["progress"] for row, _ in warming]
            assert progress == sorted(progress)
            assert progress[0] < 0.3
            assert progress[-1] > 0.5
            named = [(row["doing"], detail) for row, detail in warming if row["doing"]]
            assert len({doing for doing, _ in named}) > 5
            for doing, detail in named:
                assert re.fullmatch(r"batch \d+x\d+, round \d+", doing)
                assert f"({doing})" in detail
            assert named[0][0].startswith("batch 2x256, ")  # the worst one first
            assert_invariants(service)

    def test_ops_answers_while_all_workers_load(self) -> None:
        """From the first second every page of the ops listener answers at once, whatever the model does."""
        with Service(workers=2, stub_scenario="slow_load") as service:
            service.wait(lambda: service.states() == {0: "loading", 1: "loading"})
            expected = {"/health": 200, "/livez": 200, "/ready": 503, "/readyz": 503, "/workers": 200}
            for path, status in (expected | {"/metrics": 200, "/": 200}).items():
                began = time.monotonic()
                assert service.get(path).status_code == status, path
                assert time.monotonic() - began < 1, path
            assert service.states() == {0: "loading", 1: "loading"}
            assert service.metrics().total("warmfleet_ready") == 0
            service.wait_ready()
            assert service.metrics().total("warmfleet_ready") == 1
            assert_invariants(service)

    def test_main_says_503_at_once_while_all_are_cold(self) -> None:
        """While no worker was ever ready the API answers: come back later, on another connection."""
        with Service(workers=2, stub_scenario="slow_load") as service:
            service.wait(lambda: set(service.states().values()) == {"loading"})
            expected = [("POST", "/embed", 503), ("GET", "/ready", 503), ("GET", "/health", 200)]
            for method, path, status in expected * 3:
                host, port = service.bind.split(":")
                connection = http.client.HTTPConnection(host, int(port), timeout=20)
                began = time.monotonic()
                connection.request(method, path, body='["hello"]' if method == "POST" else None)
                reply = connection.getresponse()
                body = reply.read()
                assert time.monotonic() - began < 1
                assert reply.status == status
                assert reply.getheader("connection") == "close"
                assert reply.will_close
                if path == "/embed":
                    assert int(reply.getheader("retry-after") or 0) >= 1
                    assert b"no worker is warm yet" in body
                connection.close()
            assert set(service.states().values()) == {"loading"}
            service.wait_ready()
            assert service.embed().ok
            assert_invariants(service)

    def test_quorum_lets_traffic_in_early(self) -> None:
        """With a quorum of 1 one warm worker is enough, and the API serves while the other still loads."""
        with Service(workers=2, ready_quorum=1, stub_scenario="slow_load_slot_1") as service:
            service.wait_ready()
            service.wait_state(1, "loading")
            status, body = service.ready()
            assert status == 200
            assert (body["ready_workers"], body["wanted_workers"]) == (1, 1)
            assert "slot 1 is loading since" in body["detail"]
            assert all(service.embed().ok for _ in range(5))
            service.wait_state(1, "ready")
            assert_invariants(service)

    def test_default_quorum_is_all(self) -> None:
        """Without a quorum /ready waits for the last worker, although the first one could serve."""
        with Service(workers=2, stub_scenario="slow_load_slot_1") as service:
            service.wait_state(0, "ready")
            status, body = service.ready()
            assert (status, body["status"]) == (503, "starting")
            assert (body["ready_workers"], body["wanted_workers"]) == (1, 2)
            service.wait_ready()
            assert_invariants(service)

    @pytest.mark.parametrize("floor", [1, 2])
    def test_floor_decides_afterwards(self, floor: int) -> None:
        """Once ready, /ready stays so down to the floor, and says `degraded` below it."""
        with Service(workers=2, ready_floor=floor, stub_scenario="slow_respawn") as service:
            service.wait_ready()
            service.kill(0, SIGKILL)
            service.wait_state(0, "loading", generation=2)
            status, body = service.ready()
            assert (status, body["status"]) == ((200, "ready") if floor == 1 else (503, "degraded"))
            assert (body["ready_workers"], body["wanted_workers"]) == (1, floor)
            assert "slot 0 is loading since" in body["detail"]
            service.wait_state(0, "ready", generation=2)
            assert service.ready()[0] == 200
            assert_invariants(service)

    def test_skipped_warmup_is_shouted(self) -> None:
        """Whoever skips the warm-up reads so in the log and in /ready."""
        with Service(workers=1, skip_warmup=True) as service:
            body = service.wait_ready()
            assert "warm-up is skipped" in body["warning"]
            assert re.search(r"WARNING +s0 .*warm-up is skipped", service.log)
            assert service.worker(0)["warmup_shapes"] == []
            assert_invariants(service)

    def test_no_warning_without_reason(self) -> None:
        """A service that warms up warns of nothing."""
        with Service(workers=1) as service:
            assert "warning" not in service.wait_ready()
            assert service.worker(0)["warmup_shapes"]
            assert "WARNING" not in service.log
            assert_invariants(service)


class TestFirstBootFails:
    @pytest.mark.parametrize("workers", [1, 2, 4])
    def test_halts_exactly_once(self, workers: int) -> None:
        """A model that cannot be loaded halts the service once, with code 3; until then /ready says why."""
        with Service(workers=workers, boot_attempts=2, stub_scenario="fail_load") as service:
            answers = ready_bodies(service)
            assert service.wait_end() == 3
            assert {status for status, _ in answers} == {503}
            told = " ".join(body["detail"] for _, body in answers)
            for slot in range(workers):
                why = r"failed \w+.*, last while loading: scripted error in load"
                assert re.search(rf"slot {slot} is \w+ since [^;]*, {why}", told)
            assert any(
                row["last_error"] == "loading: scripted error in load"
                for _, body in answers
                for row in body["workers"]
            )
            assert service.log.count("no worker can become ready; stopping: scripted error in load") == 1
            assert service.log.count("exited with code 3") == 1
            assert service.log.count("Reason: Worker failed to boot.") == 1
            assert service.log.count("Booting worker") == 2 * workers
            assert_invariants(service)

    @pytest.mark.parametrize("scenario", ["kill_load", "hang_load"])
    def test_crashes_and_hangs_count_as_attempts(self, scenario: str) -> None:
        """A load that kills or hangs its worker every time is given up likewise, told by the next worker."""
        with Service(workers=2, boot_attempts=2, load_timeout=0.5, stub_scenario=scenario) as service:
            answers = ready_bodies(service)
            assert service.wait_end() == 3
            assert {status for status, _ in answers} == {503}
            error = "killed by SIGKILL" if scenario == "kill_load" else "the stage took longer than its limit"
            assert any(f"last while loading: {error}" in body["detail"] for _, body in answers)
            assert service.log.count("Reason: Worker failed to boot.") == 1
            assert f"no worker can become ready; stopping: {error}" in service.log
            assert service.log.count("Booting worker") == 6  # the last of each slot only tells
            assert_invariants(service)

    @pytest.mark.parametrize("attempts", [1, 3])
    def test_boot_attempts_are_counted(self, attempts: int) -> None:
        """A slot boots as often as `boot_attempts` says, with growing pauses, and the metrics count it."""
        with Service(workers=1, boot_attempts=attempts, stub_scenario="fail_load") as service:
            if attempts > 1:
                row = service.wait_state(0, "backoff", generation=attempts)
                assert row["failures"] == attempts - 1
                assert row["failures_by_reason"] == {"load": attempts - 1}
                assert 0 < row["retry_in_seconds"] <= 2 ** (attempts - 2)
                scrape = service.metrics()
                assert scrape.total("warmfleet_worker_boots_total", slot="s0") == attempts
                failures = scrape.total("warmfleet_worker_failures_total", slot="s0", reason="load")
                assert failures == attempts - 1
            assert service.wait_end() == 3
            assert service.log.count("Booting worker") == attempts
            assert_invariants(service)

    def test_later_attempt_heals(self) -> None:
        """A load that fails once is tried again, and the service becomes ready with the failure on record."""
        with Service(workers=2, stub_scenario="fail_load_once") as service:
            service.wait_ready()
            for row in service.workers().values():
                assert (row["generation"], row["failures_by_reason"]) == (2, {"load": 1})
                assert row["last_error"] == "loading: scripted error in load"
            assert_invariants(service)

    @pytest.mark.parametrize(
        ("scenario", "error"),
        [
            ("wrong_warm", "warm-up output is wrong: values that are not finite"),
            ("oom_warm", "no room for a batch of 256 tokens: scripted out of memory in warm"),
        ],
    )
    def test_warmup_that_cannot_succeed_fails_the_boot(self, scenario: str, error: str) -> None:
        """Wrong vectors, or no room for the smallest batch, end the boot with the reason, never in READY."""
        with Service(workers=1, boot_attempts=2, stub_scenario=scenario) as service:
            row = service.wait_state(0, "backoff", generation=2)
            assert row["last_error"] == f"warming: {error}"
            assert row["failures_by_reason"] == {"warmup": 1}
            assert service.wait_end() == 3
            assert "ready on cpu" not in service.log
            assert_invariants(service)

    def test_one_slot_that_never_loads_does_not_halt(self) -> None:
        """While one slot can serve, another that always fails only backs off."""
        with Service(workers=2, boot_attempts=1, ready_quorum=1, stub_scenario="fail_load_slot_1") as service:
            service.wait_ready()
            row = service.wait_state(1, "backoff", generation=4)
            assert row["failures"] >= 2  # the first does not count if slot 0 was not ready yet: it was parked
            assert service.embed().ok
            assert service.ready()[0] == 200
            assert_invariants(service)


class TestWarmup:
    def test_out_of_memory_halves_the_budget(self) -> None:
        """Where the full batch does not fit, the largest half that does is used and published."""
        with Service(workers=1, max_batch_tokens=1024, stub_scenario="oom_above_256_tokens") as service:
            service.wait_ready()
            assert service.worker(0)["max_batch_tokens"] == 256
            assert service.metrics().total("warmfleet_worker_max_batch_tokens", slot="s0") == 256
            info = service.get("/info", ops=False).json()
            assert (info["max_batch_tokens"], info["max_input_length"]) == (256, 256)
            assert "max_batch_tokens is lowered from 1024 to 256" in service.log
            assert service.embed(["word " * 200]).ok
            assert_invariants(service)

    def test_stages_and_shapes_are_published(self) -> None:
        """What each stage and each shape took is on the scoreboard, worst shape first, and in the metrics."""
        with Service(workers=1, stub_load_ms=50, stub_forward_ms=2) as service:
            service.wait_ready()
            row, scrape = service.worker(0), service.metrics()
            assert row["stage_seconds"]["load"] >= 0.05
            assert row["stage_seconds"]["warmup"] == row["warmup_seconds"] >= 0.05
            shapes = [(shape["texts"], shape["tokens"]) for shape in row["warmup_shapes"]]
            assert shapes[:2] == [(2, 256), (64, 8)]
            assert shapes[-1] == (1, 8)
            for shape in row["warmup_shapes"]:
                assert shape["steady_s"] >= 0.002
                labels = {"shape": f"{shape['texts']}x{shape['tokens']}", "pass": "steady"}
                assert scrape.total("warmfleet_worker_warmup_pass_seconds", **labels) > 0
            assert scrape.total("warmfleet_worker_boot_stage_seconds", stage="load") >= 0.05
            assert_invariants(service)


class TestDeadlines:
    @pytest.mark.parametrize(
        ("scenario", "stage"),
        [
            ("hang_load_once", "loading"),
            ("hang_warm_once", "warming"),
            ("hold_gil_load_once", "loading"),
            ("hold_gil_warm_once", "warming"),
        ],
    )
    def test_stage_past_its_deadline_ends_the_worker(self, scenario: str, stage: str) -> None:
        """A stage that takes too long prints every stack and ends the worker, even one that holds the GIL."""
        with Service(workers=2, load_timeout=1, warmup_timeout=1, stub_scenario=scenario) as service:
            service.wait_state(0, "ready", generation=2)
            row = service.worker(0)
            assert row["failures_by_reason"] == {"deadline": 1}
            why = "the stage took longer than its limit; the log has every stack"
            assert row["last_error"] == f"{stage}: {why}"
            stacks = service.log.partition("Timeout (0:00:01)!")[2]
            assert len(re.findall(r"^Thread 0x", stacks, re.MULTILINE)) >= 2  # model thread and event loop
            assert 'service/backends/stub.py", line' in stacks
            assert "strike" in stacks
            assert service.worker(1)["generation"] == 1
            service.wait_ready()
            assert_invariants(service)


class TestLoadPermits:
    def test_bound_the_loads_at_once(self) -> None:
        """With one permit, a worker loads only when the one before has warmed; the others wait and say so."""
        with Service(workers=3, concurrent_loads=1, stub_scenario="slow_boot") as service:
            seen = [[row["state"] for row in body["workers"]] for _, body in ready_bodies(service)]
            assert max(states.count("loading") for states in seen) == 1
            assert any(states.count("waiting") == 2 for states in seen)
            stages = sorted(
                (row["stage_seconds"] for row in service.workers().values()), key=lambda s: s["wait"]
            )
            for one, following in pairwise(stages):
                boot = one["load"] + one["warmup"]
                assert following["wait"] > one["wait"] + boot - 0.5  # they are not forked at the same moment
            assert_invariants(service)

    def test_of_a_killed_worker_is_free_again(self) -> None:
        """A worker that dies while it holds the only permit does not keep it."""
        with Service(workers=2, concurrent_loads=1, stub_scenario="slow_load") as service:
            service.wait(lambda: sorted(service.states().values()) == ["loading", "waiting"])
            slot = next(slot for slot, state in service.states().items() if state == "loading")
            service.kill(slot, SIGKILL)
            service.wait_state(1 - slot, "loading")
            service.wait_ready()
            assert_invariants(service)


class TestSigterm:
    @pytest.mark.parametrize(
        ("state", "slot", "generation", "settings"),
        [
            ("backoff", 0, 3, {"stub_scenario": "fail_load"}),
            ("waiting", 1, 1, {"stub_scenario": "slow_load", "concurrent_loads": 1}),
            ("loading", 0, 1, {"stub_scenario": "slow_load"}),
            ("warming", 0, 1, {"stub_scenario": "slow_warm"}),
            ("loading", 0, 1, {"stub_scenario": "hold_gil_load_once"}),
            ("warming", 0, 1, {"stub_scenario": "hold_gil_warm_once"}),
        ],
        ids=["backoff", "waiting", "loading", "warming", "loading-gil", "warming-gil"],
    )
    def test_ends_a_booting_worker_at_once(
        self, state: str, slot: int, generation: int, settings: dict[str, Any]
    ) -> None:
        """SIGTERM ends a worker within a second in every stage, even inside C code, and another comes."""
        with Service(workers=2, **settings) as service:
            row = service.wait_state(slot, state, generation)
            os.kill(row["pid"], SIGTERM)
            until(lambda: not runs(row["pid"]), 1, f"the worker that was {state} ends")
            service.wait(
                lambda: service.worker(slot)["pid"] not in (None, row["pid"]), what="another one comes"
            )
            after = service.worker(slot)
            assert after["generation"] == row["generation"] + 1
            assert after["failures"] == 0  # it was asked to
            assert_invariants(service)

    def test_ends_a_worker_in_its_first_milliseconds(self) -> None:
        """No moment between the fork and the load is deaf to SIGTERM: whoever is hit there ends at once."""
        with Service(workers=1, stub_scenario="slow_load") as service:
            hit: set[int] = set()
            service.wait_state(0, "loading")
            children = f"/proc/{service.arbiter}/task/{service.arbiter}/children"

            def newcomer() -> int | None:
                with open(children, encoding="utf-8") as file:  # noqa: PTH123 - in a hot loop
                    return next((pid for pid in map(int, file.read().split()) if pid not in hit), None)

            for count in range(20):
                pid = until(newcomer, what="the next worker")
                time.sleep(0.003 * count)  # another moment each time
                hit.add(pid)
                os.kill(pid, SIGTERM)
                until(lambda pid=pid: not runs(pid), 1, f"worker {count} ends")
            service.wait_ready()
            assert_invariants(service)


class TestPreloadImport:
    @pytest.mark.parametrize("signum", [SIGTERM, SIGINT, SIGQUIT])
    def test_stops_at_once(self, slow_import: dict[str, str], signum: int) -> None:
        """A stop signal during the arbiter's imports ends it within a second, with exit code 0."""
        with Service(environ=slow_import) as service:
            service.wait_log("importing slowly")
            service.signal(signum)
            assert service.wait_end(1) == 0
            assert "while importing" in service.log
            assert_invariants(service)

    def test_stops_at_once_as_pid_1(self, slow_import: dict[str, str]) -> None:
        """So it does as PID 1 of a container, to whom the kernel passes only signals that have a handler."""
        with Service(environ=slow_import, prefix=new_pid_namespace()) as service:
            service.wait_log("importing slowly")
            service.signal(SIGTERM)
            assert service.wait_end(1) == 0
            assert_invariants(service)

    def test_survives_other_signals(self, slow_import: dict[str, str]) -> None:
        """Resize, roll, reopen and upgrade mean nothing yet; their default is to stop or end the process."""
        with Service(workers=1, environ=slow_import) as service:
            service.wait_log("importing slowly")
            for signum in (SIGTTIN, SIGTTOU, SIGHUP, SIGUSR1, SIGUSR2):
                service.signal(signum)
            found = process(service.arbiter)
            assert found is not None
            assert found.state != "T"
            service.wait_ready()
            assert list(service.workers()) == [0]
            assert_invariants(service)


class TestPid1:
    def test_boots_serves_and_stops(self) -> None:
        """As PID 1 the service lives as anywhere else, and ends its PID namespace with exit code 0."""
        with Service(workers=2, prefix=new_pid_namespace()) as service:
            service.wait_ready()
            with service.load(clients=2) as load:
                load.wait_for(20)
            assert not load.lost
            assert service.stop() == 0
            assert_invariants(service)


def new_pid_namespace() -> tuple[str, ...]:
    """Return a command whose child is PID 1; skip where namespaces are not allowed."""
    command = ("unshare", "--pid", "--fork", "--mount-proc")
    for prefix in (command, (*command[:1], "--user", "--map-root-user", *command[1:])):
        tried = shutil.which("unshare") and subprocess.run(
            [*prefix, "true"], capture_output=True, timeout=PATIENCE_S, check=False
        )
        if tried and tried.returncode == 0:
            return prefix
    pytest.skip("unshare cannot make a PID namespace here")
