# SPDX-License-Identifier: Apache-2.0
"""What Prometheus scrapes: queue and budget off the scoreboard, and TEI's names where they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import memory_metrics
from service.budget import GIB, HOST_BUSY, Room, WorkerCost
from service.cgroups import HostReading
from service.collector import exposition
from service.fleet import Fleet
from service.gpu_memory import DeviceReading
from service.ledger import Sum
from service.lifecycle import State
from service.manifest import Manifest
from service.recall import Recall
from service.settings import Settings
from service.slots import CPU

if TYPE_CHECKING:
    from pathlib import Path

GAUGES = tuple(
    f"warmfleet_{name}"
    for name in ("queue_texts", "queue_tokens", "worker_max_batch_tokens", "worker_declared_batch_tokens")
)


@pytest.fixture(autouse=True)
def _no_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))


def fleet_of_two(**settings: Any) -> Fleet:
    """Return a fleet with one warm, busy worker, and one that only begins."""
    fleet = Fleet.make(Settings(backend="stub", **settings), (CPU,), 2)
    for slot in (0, 1):
        fleet.board.spawn(slot, CPU, 1.0)
    row = fleet.board.rows[0]
    row.max_batch_tokens, row.declared_batch_tokens, row.queued_texts, row.queued_tokens = 300, 512, 7, 90
    return fleet


def scrape(fleet: Fleet) -> dict[str, dict[str, float]]:
    """Return each family's samples by slot."""
    return {
        family.name: {sample.labels.get("slot", ""): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(exposition(fleet, {}).decode())
    }


def test_queue_and_budget_are_read_off_the_scoreboard() -> None:
    """An idle worker's queue is 0; one that is not warm has no budget yet."""
    found = scrape(fleet_of_two())
    assert [found[name] for name in GAUGES] == [
        {"s0": 7, "s1": 0},
        {"s0": 90, "s1": 0},
        {"s0": 300},
        {"s0": 512},
    ]


def test_queue_and_budget_end_with_the_worker() -> None:
    """What waited died with it: a dead worker's queue must not scale the fleet."""
    fleet = fleet_of_two()
    fleet.board.vacate(0, 2.0)
    assert fleet.board.record(0).state is State.EMPTY
    assert [scrape(fleet)[name] for name in GAUGES] == [{"s0": 0, "s1": 0}, {"s0": 0, "s1": 0}, {}, {}]


def test_names_of_tei_are_there_only_if_asked_for() -> None:
    """By default no name begins with te_; with te_metrics the queue's length is te_queue_size too."""
    assert not [name for name in scrape(fleet_of_two()) if name.startswith("te_")]
    assert scrape(fleet_of_two(te_metrics=True))["te_queue_size"] == {"": 7}


# ---------------------------------------------------------------------------------------------
# Budget

A, B = "MIG-a", "MIG-b"
BUDGET = (
    "planned_workers",
    "resizes",
    "oom_kills",
    "workers_fit",
    "budget_bytes",
    "budget_headroom_bytes",
    "worker_cost_bytes",
)


def families_of(fleet: Fleet) -> dict[str, dict[tuple[str, ...], float]]:
    """Return every family by name: its samples by label values."""
    families = text_string_to_metric_families(exposition(fleet, {}).decode())
    return {
        family.name.removeprefix("warmfleet_"): {
            tuple(sample.labels.values()): sample.value for sample in family.samples
        }
        for family in families
    }


def budget_of(fleet: Fleet) -> dict[str, dict[tuple[str, ...], float]]:
    """Return the families of the budget, likewise."""
    found = families_of(fleet)
    return {name: found[name] for name in BUDGET}


def test_before_the_first_measurement_the_budget_has_no_bytes() -> None:
    """Nothing is planned, nothing known: counters at 0, and no series that could be taken for a size."""
    assert budget_of(fleet_of_two()) == {
        "planned_workers": {(): 0},
        "resizes": {("more",): 0, ("fewer",): 0},
        "oom_kills": {(): 0},
        "workers_fit": {},
        "budget_bytes": {},
        "budget_headroom_bytes": {},
        "worker_cost_bytes": {},
    }


def test_the_budget_of_a_cpu_is_the_hosts() -> None:
    """A worker of 96 MiB counts for 105.6 after a kill: 18 GiB hold 174. Cores and caps have no bytes."""
    fleet = fleet_of_two()
    host = Room("host", 20 * GIB, 1.0, others=GIB, shared=GIB)
    fleet.ledger.write(Sum(WorkerCost(0, 0, 0, 0), host, cores=8, max_workers=5))
    numbers = fleet.ledger.numbers
    numbers.planned, numbers.grown, numbers.shrunk, numbers.oom_kills = 4, 3, 2, 1
    assert budget_of(fleet) == {
        "planned_workers": {(): 4},
        "resizes": {("more",): 3, ("fewer",): 2},
        "oom_kills": {(): 1},
        "workers_fit": {("host",): 174, ("cores",): 8, ("max_workers",): 5},
        "budget_bytes": {("host",): 18 * GIB},
        "budget_headroom_bytes": {("host",): 18 * GIB - 4 * int(1.1 * HOST_BUSY)},
        "worker_cost_bytes": {("context",): 0, ("weights",): 0, ("batch",): 0, ("host",): 0},
    }


@pytest.mark.parametrize(
    ("planned", "a", "b"), [(0, 20, 10), (1, 16, 10), (3, 12, 6), (4, 12, 2), (5, 8, 2), (7, 0, 2)]
)
def test_headroom_follows_the_workers_to_their_devices(planned: int, a: int, b: int) -> None:
    """5 of 4 GiB fit on the one, 2 on the other: they take turns until the smaller is full."""
    fleet = Fleet.make(Settings(backend="stub"), (A, B), 2)
    devices = (Room(A, 20 * GIB, 1.0), Room(B, 10 * GIB, 1.0))
    fleet.ledger.write(Sum(WorkerCost(4 * GIB, 0, 0, 0), Room("host", 20 * GIB, 1.0), devices))
    fleet.ledger.numbers.planned = planned
    room = budget_of(fleet)["budget_headroom_bytes"]
    assert room == {(A,): a * GIB, (B,): b * GIB, ("host",): 20 * GIB - planned * HOST_BUSY}
    assert budget_of(fleet)["worker_cost_bytes"]["context",] == 4 * GIB


def test_names_of_the_budget_are_as_prometheus_wants_them() -> None:
    """Bytes end in _bytes, counters in _total, and every family has a help text."""
    lines = exposition(fleet_of_two(), {}).decode().splitlines()
    kinds = dict(line.split()[2:4] for line in lines if line.startswith("# TYPE"))
    helped = {line.split()[2] for line in lines if line.startswith("# HELP")}
    counters = {"warmfleet_resizes_total", "warmfleet_oom_kills_total"}
    assert {name for name, kind in kinds.items() if kind == "counter"} >= counters
    names = {f"warmfleet_{name}" for name in BUDGET} - {"warmfleet_resizes", "warmfleet_oom_kills"} | counters
    assert names <= helped
    assert {name for name in names if "bytes" in name and not name.endswith("_bytes")} == set()
    assert 'warmfleet_resizes_total{direction="more"} 0.0' in lines


# ---------------------------------------------------------------------------------------------
# Host and devices


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (HostReading(8 * GIB, "RAM", 3 * GIB, shm_bytes=GIB), {"limit": 8, "used": 3, "shm": 1}),
        (HostReading(8 * GIB, "RAM", 3 * GIB), {"limit": 8, "used": 3}),
        (HostReading(0, "RAM", 0), {}),
    ],
    ids=["all is known", "no shared memory", "nothing is known"],
)
def test_host_memory_is_read_at_the_scrape(
    reading: HostReading, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limit, use and shared memory as the cgroup has them; what is unknown has no series."""
    monkeypatch.setattr(memory_metrics, "read_host", lambda: reading)
    found = families_of(fleet_of_two())["host_memory_bytes"]
    assert found == {(kind,): size * GIB for kind, size in expected.items()}


def test_device_memory_is_the_newest_reading() -> None:
    """Before the first worker measured itself the one before the forks counts, then the budget's; never 0."""
    readings = {A: DeviceReading(A, "a GPU", 20 * GIB, 3 * GIB, {})}
    fleet = Fleet.make(Settings(backend="stub"), (A, B), 2, readings=readings)
    assert families_of(fleet)["device_memory_bytes"] == {(A, "total"): 20 * GIB, (A, "others"): 3 * GIB}
    devices = (Room(A, 20 * GIB, 1.0, others=4 * GIB), Room(B, 10 * GIB, 1.0))
    fleet.ledger.write(Sum(WorkerCost(GIB, 0, 0, 0), Room("host", 20 * GIB, 1.0), devices))
    assert families_of(fleet)["device_memory_bytes"] == {
        (A, "total"): 20 * GIB,
        (A, "others"): 4 * GIB,
        (B, "total"): 10 * GIB,
        (B, "others"): 0,
    }


def test_a_cpu_has_no_device_memory() -> None:
    """Neither before nor after the budget is known."""
    fleet = fleet_of_two()
    assert families_of(fleet)["device_memory_bytes"] == {}
    fleet.ledger.write(Sum(WorkerCost(0, 0, 0, 0), Room("host", 20 * GIB, 1.0)))
    assert families_of(fleet)["device_memory_bytes"] == {}


# ---------------------------------------------------------------------------------------------
# What a boot is held against


def test_last_boots_stages_are_the_manifests() -> None:
    """They stay while this boot runs; without a manifest there is no series."""
    assert families_of(fleet_of_two())["last_boot_stage_seconds"] == {}
    stages = {"load": 2.0, "to_device": 0.5, "warmup": 7.0}
    last = Manifest("", {}, stages, 9.5, (), 512, WorkerCost(0, 0, 0, 1), 2)
    fleet = Fleet.make(Settings(backend="stub"), (CPU,), 2, recall=Recall(last=last))
    fleet.board.spawn(0, CPU, 1.0)
    assert families_of(fleet)["last_boot_stage_seconds"] == {(stage,): s for stage, s in stages.items()}


def test_uptime_and_deadline_can_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in seconds; the deadline is the sum of the stages' own, without a download, over by then."""
    fleet = fleet_of_two(spawn_timeout=1, load_timeout=20, warmup_timeout=300, download_timeout=4000)
    monkeypatch.setattr("service.collector.now", lambda: fleet.board.header.started + 12.5)
    found = families_of(fleet)
    assert found["uptime_seconds"] == {(): 12.5}
    assert found["boot_deadline_seconds"] == {(): 321}


@pytest.mark.parametrize(
    ("settings", "quorum", "floor"),
    [({}, 2, 1), ({"ready_quorum": 1}, 1, 1), ({"ready_floor": 2}, 2, 2)],
    ids=["defaults", "quorum", "floor"],
)
@pytest.mark.parametrize("was_ready", [0, 1])
@pytest.mark.parametrize("stopping", [0, 1])
def test_quorum_and_floor_are_those_of_readiness(
    settings: dict[str, int], quorum: int, floor: int, was_ready: int, stopping: int
) -> None:
    """At any time of the service's life: neither the latch nor a stop changes what was agreed on."""
    fleet = fleet_of_two(**settings)
    fleet.board.header.was_ready, fleet.board.header.stopping = was_ready, stopping
    found = families_of(fleet)
    assert (found["quorum_workers"], found["floor_workers"]) == ({(): quorum}, {(): floor})


def test_a_slot_that_failed_for_good_lowers_the_quorum() -> None:
    """As /ready does not wait for it either."""
    fleet = fleet_of_two()
    fleet.board.rows[1].failures = fleet.settings.boot_attempts
    assert families_of(fleet)["quorum_workers"] == {(): 1} == {(): fleet.readiness().wanted}
