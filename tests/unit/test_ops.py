# SPDX-License-Identifier: Apache-2.0
"""What the ops listener says of the budget: the sum, the plan, and how long a boot will still take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
import pytest
from households import Machine, cpu_cost, fleet_of, put

from service import payloads
from service.budget import MIB, render
from service.lifecycle import Stage, State
from service.manifest import Manifest
from service.payloads import budget_payload, eta_of, ready_payload, workers_payload
from service.planner import learn_from_oom, settle
from service.recall import Recall

if TYPE_CHECKING:
    from service.fleet import Fleet

NOW = 100.0
LAST = Manifest(
    written_at="2026-01-01T00:00:00+00:00",
    key={},
    stage_seconds={"import": 3.0, "load": 4.0, "to_device": 1.0, "warmup": 2.0},
    boot_seconds=12.0,
    shapes=(),
    max_batch_tokens=512,
    cost=cpu_cost(300 * MIB),
    workers=2,
)


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine().install(monkeypatch)
    monkeypatch.setattr(payloads, "now", lambda: NOW)


def test_before_the_first_measurement_the_budget_says_so() -> None:
    """The policy and what is wanted are known, the sum is not."""
    assert budget_payload(fleet_of("auto", budget_policy="warn")) == {
        "policy": "warn",
        "wanted": "auto",
        "planned": 0,
        "oom_kills": 0,
        "text": ["no worker has been measured yet"],
    }


def measured() -> Fleet:
    fleet = fleet_of(4)
    put(fleet, 0, State.READY)
    settle(fleet, 0, cpu_cost(300 * MIB), None, 0)
    learn_from_oom(fleet, 1)
    return fleet


def test_the_budget_is_told_as_data_and_in_words() -> None:
    """What fits and why, every term of it, and the lines a person reads: of one and the same sum."""
    fleet = measured()
    entry = fleet.ledger.read()
    assert entry is not None
    payload = orjson.loads(orjson.dumps(budget_payload(fleet)))
    assert list(payload) == [
        *("policy", "wanted", "planned", "oom_kills"),
        *("fits", "binding", "constraints", "sum", "text"),
    ]
    assert (payload["policy"], payload["wanted"], payload["planned"], payload["oom_kills"]) == (
        "clamp",
        4,
        4,
        1,
    )
    assert (payload["fits"], payload["binding"]) == (16, "host")
    assert payload["text"] == render(entry.plan()).splitlines()
    assert payload["sum"]["cost"] == {
        "context": 0,
        "weights": 0,
        "batch": 0,
        "host": 300 * MIB,
        "raised": 1.1,
    }
    assert [(line["name"], line["fits"]) for line in payload["constraints"]] == [("host", 16)]


def test_the_status_page_has_the_budget() -> None:
    """`/workers` says everything, so that too; and it is JSON, whatever is in it."""
    fleet = measured()
    assert workers_payload(fleet)["budget"] == budget_payload(fleet)
    orjson.dumps(workers_payload(fleet))


def test_ready_says_how_many_shall_run_beside_how_many_do() -> None:
    """A fleet that grows: four are planned, one is kept."""
    fleet = measured()
    fleet.board.header.target = 1
    _, payload = ready_payload(fleet)
    assert (payload["planned_workers"], payload["target_workers"]) == (4, 1)
    assert payload["wanted_workers"] == 1


@pytest.mark.parametrize(
    ("state", "for_s", "expected"),
    [
        pytest.param(State.WAITING, 0.2, None, id="waits for its permit, for as long as others take"),
        pytest.param(State.LOADING, 1.0, 3 + 1 + 2, id="loads"),
        pytest.param(State.LOADING, 60.0, 1 + 2, id="loads for longer than last time"),
        pytest.param(State.WARMING, 1.52, 0.5, id="warms up"),
        pytest.param(State.WARMING, 9.0, 0.0, id="is late"),
        pytest.param(State.PINNED, 1.0, None, id="has not begun"),
        pytest.param(State.READY, 1.0, None, id="is there"),
        pytest.param(State.DRAINING, 1.0, None, id="leaves"),
    ],
)
def test_a_worker_says_how_long_it_will_take(state: State, for_s: float, expected: float | None) -> None:
    """What is left of its stage, and the stages behind it, by the last boot."""
    fleet = fleet_of(1, recall=Recall(last=LAST))
    put(fleet, 0, state)
    fleet.board.rows[0].since = NOW - for_s
    _, payload = ready_payload(fleet)
    assert payload["workers"][0]["eta_seconds"] == (None if expected is None else pytest.approx(expected))


def test_without_a_last_boot_nobody_knows() -> None:
    """Nor if that boot had no such stage."""
    fleet = fleet_of(1)
    put(fleet, 0, State.LOADING)
    assert eta_of(fleet, fleet.board.record(0)) is None
    short = Manifest(**{**vars(LAST), "stage_seconds": {"warmup": 2.0}})
    other = fleet_of(1, recall=Recall(last=short))
    put(other, 0, State.LOADING)
    assert eta_of(other, other.board.record(0)) is None


def test_the_first_boot_of_all_goes_by_the_workers_that_are_ready() -> None:
    """By the slowest of them; what the manifest says counts for more."""
    fleet = fleet_of(3)
    for slot, warmup in enumerate((2.0, 5.0)):
        put(fleet, slot, State.READY)
        fleet.board.note_stage(slot, Stage.WARMUP, warmup)
    put(fleet, 2, State.WARMING)
    fleet.board.rows[2].since = NOW - 1.0
    _, payload = ready_payload(fleet)
    assert [row["eta_seconds"] for row in payload["workers"]] == [None, None, 4.0]
    known = fleet_of(1, recall=Recall(last=LAST))
    put(known, 0, State.WARMING)
    known.board.rows[0].since = NOW - 1.0
    assert eta_of(known, known.board.record(0), fleet.board.records()) == 1.0


def test_every_stage_that_is_foretold_has_its_state() -> None:
    """The states of a boot are those of the stages that a manifest has."""
    assert set(payloads.STAGES.values()) <= set(Stage)
    assert list(payloads.STAGES) == [State.LOADING, State.WARMING]
