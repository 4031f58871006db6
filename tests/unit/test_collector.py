# SPDX-License-Identifier: Apache-2.0
"""What Prometheus scrapes: queue and budget off the scoreboard, and TEI's names where they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.collector import exposition
from service.fleet import Fleet
from service.lifecycle import State
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
