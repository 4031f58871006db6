# SPDX-License-Identifier: Apache-2.0
"""Corners in which the service once did wrong: each test keeps one claim true."""

from __future__ import annotations

import os
import re
import subprocess
import time
from signal import SIGHUP, SIGKILL, SIGTERM, SIGTTOU
from typing import TYPE_CHECKING, Any

import pytest
from harness import Service, assert_invariants, new_client, runs, until

if TYPE_CHECKING:
    from pathlib import Path

CONF = """
from gunicorn_conf import *
from service import hooks

def post_fork(server, worker):
    if worker.slot == 0 and worker.fleet.board.rows[0].generation == 2:
        raise OSError("planted")
    hooks.post_fork(server, worker)
"""


def scenario(folder: Path, *faults: dict[str, Any]) -> Path:
    """Write a scenario of these faults."""
    lines: list[str] = []
    for fault in faults:
        lines += ["[[fault]]", *(f"{name} = {value!r}" for name, value in fault.items())]
    path = folder / "scenario.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def refusal(arguments: str) -> str:
    """Start with these arguments for Gunicorn, which must be refused; return the one line."""
    with Service(environ={"GUNICORN_CMD_ARGS": arguments}) as service:
        assert service.wait_end() == 1
        (line,) = service.log.splitlines()
        assert line.startswith("warmfleet: ")
        assert_invariants(service)
        return line


def busy_slot(service: Service) -> int:
    """Wait until some worker has a text in work; return its slot."""
    slots: list[int] = service.wait(lambda: [n for n, row in service.workers().items() if row["load"]])
    return slots[0]


def test_crashes_back_off_at_any_log_level(tmp_path: Path) -> None:
    """Also if only errors are logged, a load that segfaults is tried `boot_attempts` times, with pauses."""
    path = scenario(tmp_path, {"stage": "load", "kind": "segfault"})
    began = time.monotonic()
    with Service(workers=1, log_level="error", boot_attempts=3, stub_scenario=path) as service:
        row = service.wait_state(0, "backoff", generation=3)
        assert row["failures_by_reason"] == {"crashed": 2}
        assert row["last_error"] == "loading: ended by SIGSEGV"
        assert service.wait_end() == 3
        assert time.monotonic() - began > 3  # 1 + 2 s of back-off
        assert service.log.count("Fatal Python error: Segmentation fault") == 3
        assert_invariants(service)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [("--max-requests 5", "max_requests"), ("--reload", "reload"), ("--reuse-port", "reuse_port")],
)
def test_gunicorn_options_that_would_lie_are_refused(arguments: str, name: str) -> None:
    """Options with which workers would go by themselves, or take connections cold, end with one line."""
    assert f"gunicorn's {name} is " in refusal(arguments)


def test_certificate_of_another_key_is_refused(tmp_path: Path) -> None:
    """A certificate that does not fit its key is told before anything forks."""
    for name in ("one", "other"):
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"),
                *("-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.crt"),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )
    line = refusal(f"--certfile {tmp_path}/one.crt --keyfile {tmp_path}/other.key")
    assert f"the certificate {tmp_path}/one.crt with key {tmp_path}/other.key cannot be used" in line


def test_slot_with_less_room_computes_the_same_vectors(tmp_path: Path) -> None:
    """Out of memory lowers one slot's budget to the longest text, so no worker cuts what others do not."""
    path = scenario(tmp_path, {"stage": "warm", "kind": "oom", "slots": [0], "max_tokens": 256})
    text = " ".join(f"word{number}" for number in range(200))
    with Service(workers=2, stub_scenario=path) as service, new_client() as client:
        service.wait_ready()
        budgets = {slot: row["max_batch_tokens"] for slot, row in service.workers().items()}
        assert budgets == {0: 256, 1: 512}
        answers: set[str] = set()

        def asked_both() -> bool:
            answers.add(client.post(f"{service.url}/embed", json=[text]).text)
            scrape = service.metrics()
            return all(
                scrape.total("warmfleet_requests_total", slot=slot, endpoint="/embed", status="200")
                for slot in ("s0", "s1")
            )

        service.wait(asked_both, what="both workers have answered")
        assert len(answers) == 1
        assert '"embeddings":[[' in answers.pop()
        assert_invariants(service)


def test_slot_without_room_for_the_longest_text_fails(tmp_path: Path) -> None:
    """A slot that could only serve by cutting texts which its siblings do not cut does not serve at all."""
    path = scenario(tmp_path, {"stage": "warm", "kind": "oom", "slots": [0], "max_tokens": 128})
    with Service(workers=2, ready_quorum=1, stub_scenario=path) as service:
        row = service.wait_state(0, "backoff", generation=2)
        assert row["last_error"].startswith("warming: no room for a batch of 256 tokens: ")
        service.wait_ready()
        assert service.worker(1)["max_batch_tokens"] == 512
        assert_invariants(service)


def test_exception_in_a_fresh_fork_does_not_halt_a_warm_fleet(tmp_path: Path) -> None:
    """A fork that raises before it is a worker is a failure of its slot alone: it backs off, others serve."""
    conf = tmp_path / "conf.py"
    conf.write_text(CONF, encoding="utf-8")
    with Service(workers=2, prefix=("sh", "-c", f'"$0" -m gunicorn -c {conf}; exit $?')) as service:
        service.wait_ready()
        with service.load(clients=2) as load:
            service.kill(0, SIGTERM)
            row = service.wait_state(0, "backoff", generation=3)
            load.wait_for(20)
            assert row["failures"] == 1
            assert row["failures_by_reason"] == {"exited": 1}
            service.wait_state(0, "ready", generation=3)
        assert not load.lost
        failures = service.metrics().total("warmfleet_worker_failures_total", slot="s0", reason="exited")
        assert failures == 1
        assert service.worker(1)["generation"] == 1
        assert service.log.count("OSError: planted") == 1  # a traceback, so not `assert_invariants`


def test_drain_that_does_not_finish_ends_in_time(tmp_path: Path) -> None:
    """A worker whose forward pass outlasts `graceful_timeout` ends all the same, and that is a failure."""
    path = scenario(tmp_path, {"stage": "forward", "kind": "slow", "text": "long", "seconds": 15})
    with Service(workers=2, graceful_timeout=3, stub_scenario=path) as service:
        service.wait_ready()
        answer = service.send(["long"])
        slot = busy_slot(service)
        pid = service.kill(slot, SIGTERM)
        until(lambda: not runs(pid), 3 + 2, "the worker ends")
        assert not answer().ok
        row = service.wait_state(slot, "ready", generation=2)
        assert row["failures_by_reason"] == {"exited": 1}
        assert row["last_error"] == "draining: exited with code 1"
        # The request's own cancellation, which uvicorn logs with a traceback: so not `assert_invariants`.
        assert service.log.count("Traceback (most recent call last)") == 1
        assert "CancelledError" in service.log


def test_connections_are_held_from_the_end_of_a_drain(tmp_path: Path) -> None:
    """A single worker that drains for longer than `cold_hold` costs no new request: its successor answers."""
    path = scenario(
        tmp_path,
        {"stage": "forward", "kind": "slow", "text": "long", "seconds": 4},
        {"stage": "load", "kind": "slow", "generations": [2], "seconds": 1},
    )
    with Service(workers=1, cold_hold=3, stub_scenario=path) as service:
        service.wait_ready()
        long = service.send(["long"])
        busy_slot(service)
        service.signal(SIGHUP)
        service.wait_state(0, "draining")
        new = service.send(["hello"])
        assert long().ok
        assert new().ok
        assert service.worker(0)["generation"] == 2
        assert_invariants(service)


def test_quorum_is_noted_though_nobody_asks() -> None:
    """Once all were ready only the floor counts, also where the first probe comes after a death."""
    with Service(workers=2, stub_scenario="slow_respawn") as service:
        until(lambda: service.log.count("ready on") == 2, what="both are ready")
        booted = re.findall(r"Booting worker with pid: (\d+)", service.log)
        os.kill(int(booted[0]), SIGKILL)
        until(lambda: service.log.count("Booting worker") == 3, what="another one comes")
        status, body = service.ready()
        assert (status, body["ready_workers"], body["wanted_workers"]) == (200, 1, 1)
        assert_invariants(service)


def test_roll_waits_for_a_worker_that_was_just_killed(tmp_path: Path) -> None:
    """HUP right after a death: nobody leaves until the dead worker's successor is ready."""
    path = scenario(
        tmp_path, {"stage": "load", "kind": "slow", "slots": [3], "generations": [2], "seconds": 2}
    )
    with Service(workers=4, stub_scenario=path) as service:
        service.wait_ready()
        service.kill(3, SIGKILL)
        service.wait(lambda: service.workers()[3]["state"] != "ready", what="the death is known")
        service.signal(SIGHUP)
        seen: list[dict[int, str]] = []

        def rolled() -> bool:
            rows = service.workers()
            seen.append({slot: row["state"] for slot, row in rows.items()})
            return all(row["epoch"] == 1 and row["state"] == "ready" for row in rows.values())

        service.wait(rolled, what="all are of the new epoch and ready")
        assert any(states.get(3) == "loading" for states in seen)
        for states in seen:
            away = [slot for slot in range(4) if states.get(slot) != "ready"]
            assert len(away) <= 1, states
        assert_invariants(service)


def test_parked_worker_that_leaves_keeps_its_reason(tmp_path: Path) -> None:
    """A slot given up at first boot is tried again once a sibling is ready: same error, no new failure."""
    path = scenario(
        tmp_path,
        {"stage": "load", "kind": "kill", "slots": [1], "generations": [1, 2]},
        {"stage": "load", "kind": "slow", "slots": [0], "seconds": 6},
    )
    with Service(workers=2, boot_attempts=2, stub_scenario=path) as service:
        why = "loading: killed by SIGKILL, perhaps out of memory"
        parked = service.wait_state(1, "failed", generation=3)
        assert (parked["last_error"], parked["failures_by_reason"]) == (why, {"killed": 2})
        service.wait_state(0, "ready")
        row = service.wait_state(1, "ready", generation=4)
        assert (row["last_error"], row["failures_by_reason"]) == (why, {"killed": 2})
        assert row["generation"] == 4
        assert service.metrics().total("warmfleet_worker_failures_total", slot="s1", reason="exited") == 0
        assert_invariants(service)


def test_restarts_are_never_negative() -> None:
    """From the first scrape on, also for slots that wait for their first fork, restarts count from 0."""
    with Service(workers=8, stub_load_ms=300) as service:
        service.wait(lambda: service.metrics().total("warmfleet_ready"), what="ready, scraped all the while")
        restarts, boots = (f"warmfleet_worker_{name}_total" for name in ("restarts", "boots"))
        assert any(v == 0 for (name, _), v in service.scrapes[0].samples.items() if name == boots)
        first = [v for (name, _), v in service.scrapes[0].samples.items() if name == restarts]
        assert first == [0] * 8
        for scrape in service.scrapes:
            for (name, labels), value in scrape.samples.items():
                assert name != restarts or value == 0, labels
        assert_invariants(service)


def test_gauges_of_a_slot_given_up_vanish() -> None:
    """After TTOU nothing is said any more of the memory and the warm-up of a worker that is gone."""
    gauges = [
        f"warmfleet_worker_{name}"
        for name in ("memory_bytes", "warmup_seconds", "boot_stage_seconds", "max_batch_tokens")
    ]

    def told(slot: str) -> set[str]:
        return {name for name, labels in service.metrics().samples if ("slot", slot) in labels}

    with Service(workers=2) as service:
        service.wait_ready()
        assert told("s0") >= set(gauges)
        assert told("s1") >= set(gauges)
        service.signal(SIGTTOU)
        service.wait(lambda: len(service.pids()) == 1, what="a slot is given up: that of the newest worker")
        (kept,) = service.pids()
        assert told(f"s{kept}") >= set(gauges)
        assert not told(f"s{1 - kept}") & set(gauges)
        assert_invariants(service)
