# SPDX-License-Identifier: Apache-2.0
"""FAULTS x STAGES x {first, respawned}: whatever goes wrong in a boot, the invariants hold afterwards."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from signal import SIGKILL, SIGSTOP, SIGTERM
from typing import TYPE_CHECKING, Any

import pytest
from harness import Load, Service, assert_invariants, process, runs, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIMIT_S = 1
"""Of either stage; long against a boot of the stub, short against a fault that lasts."""


@dataclass(frozen=True)
class Fault:
    """What happens to a worker, and what the service is to call it.

    Attributes:
        name: id of the test.
        kind: of the scripted fault; one that comes from outside needs a stage that lasts.
        signals: to send to the worker, once it is in the stage.
        reason: label of the failure by stage; none if the worker was asked to go.
        error: part of the last error.
    """

    name: str
    kind: str
    reason: dict[str, str]
    error: str
    signals: tuple[int, ...] = ()


def always(reason: str) -> dict[str, str]:
    return {"load": reason, "warm": reason}


FAULTS = [
    Fault("error", "error", {"load": "load", "warm": "warmup"}, "scripted error in {stage}"),
    Fault("hang", "hang", always("deadline"), "the stage took longer than its limit"),
    Fault("hold_gil", "hold_gil", always("deadline"), "the stage took longer than its limit"),
    Fault("exit", "exit", always("exited"), "exited with code 1"),
    Fault("kill", "kill", always("killed"), "killed by SIGKILL"),
    Fault("segfault", "segfault", always("crashed"), "ended by SIGSEGV"),
    Fault("oom", "oom", {"load": "load", "warm": "warmup"}, "scripted out of memory in {stage}"),
    Fault("sigterm", "slow", {}, "", (SIGTERM,)),
    Fault("sigstop_sigkill", "slow", always("killed"), "killed by SIGKILL", (SIGSTOP, SIGKILL)),
]
STAGES = {"load": "loading", "warm": "warming"}

CROSSED = [
    pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS]),
    pytest.mark.parametrize("stage", STAGES),
]


def crossed(test: Any) -> Any:
    for mark in CROSSED:
        test = mark(test)
    return test


def scenario(folder: Path, fault: Fault, stage: str, generation: int, slots: list[int]) -> Path:
    """Write the scenario in which the workers of one generation meet the fault in one stage."""
    lines = [
        "[[fault]]",
        f'stage = "{stage}"',
        f'kind = "{fault.kind}"',
        f"generations = [{generation}]",
        f"slots = {slots}",
    ]
    if fault.kind == "slow":
        lines.append("seconds = 30")
    path = folder / "scenario.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@contextmanager
def faulty(path: Path, fault: Fault) -> Iterator[Service]:
    """Run two workers; stage limits only for the faults that they are to end."""
    limits = {} if fault.signals else {"load_timeout": LIMIT_S, "warmup_timeout": LIMIT_S}
    with Service(workers=2, boot_attempts=3, stub_scenario=path, **limits) as service:
        yield service


def attack(service: Service, slot: int, generation: int, fault: Fault, stage: str) -> None:
    """Send the worker of a slot the signals of the fault, once it is in the stage."""
    pid = service.wait_state(slot, STAGES[stage], generation)["pid"]
    for signum in fault.signals:
        os.kill(pid, signum)
        if signum == SIGSTOP:
            until(lambda: (found := process(pid)) and found.state == "T", what="it stands still")
            assert_answers(service)
    until(lambda: not runs(pid), what="it ends")


def assert_answers(service: Service) -> None:
    """The ops listener answers, from whoever is left to."""
    status, body = service.ready()
    assert status in (200, 503)
    assert len(body["workers"]) == 2


def assert_recovered(service: Service, slot: int, generation: int, fault: Fault, stage: str) -> None:
    """The slot has its next worker, which is ready, and the failure is on record under its name, once."""
    row = service.wait_state(slot, "ready", generation + 1)
    assert row["generation"] == generation + 1
    if not fault.reason:
        assert (row["failures_by_reason"], row["last_error"]) == ({}, None)
        return
    assert row["failures_by_reason"] == {fault.reason[stage]: 1}
    assert row["last_error"].startswith(f"{STAGES[stage]}: ")
    assert fault.error.format(stage=stage) in row["last_error"]
    assert service.metrics().total("warmfleet_worker_failures_total", slot=f"s{slot}") == 1


@crossed
def test_first_worker(tmp_path: Path, fault: Fault, stage: str) -> None:
    """The fault hits the first worker of every slot: /ready stays 503 and true, the second try serves."""
    with faulty(scenario(tmp_path, fault, stage, 1, [0, 1]), fault) as service:
        until(service.ready, what="ops answers")
        load = Load(service.url, clients=2, keepalive=False)
        try:
            for slot in (0, 1):
                if fault.signals:
                    attack(service, slot, 1, fault, stage)
            for slot in (0, 1):
                assert_recovered(service, slot, 1, fault, stage)
            service.wait_ready()
            load.wait_for(10)
        finally:
            load.stop()
        service.outcomes += load.outcomes
        # Refused as cold, or cut off with the worker that would have said so; never anything else.
        assert {o.status for o in load.lost} <= {503, None}
        assert_invariants(service)


@crossed
def test_respawned_worker(tmp_path: Path, fault: Fault, stage: str) -> None:
    """The fault hits a slot's second worker: the sibling serves, /ready stays 200, no request is lost."""
    with faulty(scenario(tmp_path, fault, stage, 2, [0]), fault) as service:
        service.wait_ready()
        sibling = service.pids()[1]
        with service.load(clients=2) as load:
            service.kill(0, SIGTERM)
            if fault.signals:
                attack(service, 0, 2, fault, stage)
            refused: list[Any] = []

            def recovered() -> bool:
                status, body = service.ready()
                if status != 200:
                    refused.append(body)
                return service.worker(0)["state"] == "ready" and service.worker(0)["generation"] == 3

            service.wait(recovered, what="slot 0 is ready again")
            assert_recovered(service, 0, 2, fault, stage)
            load.wait_for(10)
        assert not refused
        assert not load.lost
        assert service.pids()[1] == sibling
        assert_invariants(service)
