# SPDX-License-Identifier: Apache-2.0
"""Whether traffic may come: quorum first, floor afterwards, and the reason in words."""

from __future__ import annotations

from typing import Any

import pytest

from service.lifecycle import State
from service.readiness import STALE_S, Policy, Readiness, aggregate
from service.slots import SlotRecord

NOW = 1000.0
READY, FAILED, WARMING, DRAINING, EMPTY, SPAWNED = (
    State.READY,
    State.FAILED,
    State.WARMING,
    State.DRAINING,
    State.EMPTY,
    State.SPAWNED,
)


def worker(
    slot: int, state: State, *, since: float = NOW - 5, beat: float = NOW, **others: Any
) -> SlotRecord:
    return SlotRecord(slot, pid=100 + slot, state=state, since=since, beat=beat, **others)


def fleet(*states: State) -> list[SlotRecord]:
    return [worker(slot, state) for slot, state in enumerate(states)]


def ask(
    records: list[SlotRecord],
    *,
    target: int = 3,
    quorum: int | None = None,
    floor: int = 1,
    was_ready: bool = False,
    stopping: bool = False,
) -> Readiness:
    return aggregate(records, Policy(target, quorum, floor), NOW, was_ready=was_ready, stopping=stopping)


@pytest.mark.parametrize("was_ready", [False, True])
@pytest.mark.parametrize("quorum", [None, 1])
@pytest.mark.parametrize("records", [[], fleet(EMPTY, EMPTY)], ids=["no rows", "empty rows"])
def test_an_empty_table_is_never_ready(
    records: list[SlotRecord], quorum: int | None, *, was_ready: bool
) -> None:
    """With no worker there is nobody to answer, whatever was before."""
    assert not ask(records, quorum=quorum, was_ready=was_ready).ready


@pytest.mark.parametrize(
    ("states", "quorum", "ready", "wanted"),
    [
        ((READY, READY, WARMING), None, False, 3),
        ((READY, READY, READY), None, True, 3),
        ((READY, WARMING, WARMING), 2, False, 2),
        ((READY, READY, WARMING), 2, True, 2),
        ((READY, READY, FAILED), None, True, 2),
        ((READY, WARMING, FAILED), None, False, 2),
        ((READY, READY, FAILED), 3, False, 3),
        ((FAILED, FAILED, FAILED), None, False, 1),
        ((READY, READY, DRAINING), None, False, 3),
    ],
)
def test_at_first_the_quorum_counts(
    states: tuple[State, ...], quorum: int | None, *, ready: bool, wanted: int
) -> None:
    """Ready is when the quorum is: by default all of the target less the slots that failed for good."""
    answer = ask(fleet(*states), quorum=quorum)
    assert (answer.ready, answer.wanted) == (ready, wanted)


@pytest.mark.parametrize(
    ("states", "target", "floor", "ready", "wanted"),
    [
        ((READY, WARMING, WARMING), 3, 1, True, 1),
        ((READY, WARMING, WARMING), 3, 2, False, 2),
        ((READY, READY, FAILED), 3, 2, True, 2),
        ((WARMING, WARMING, WARMING), 3, 1, False, 1),
        ((READY,), 1, 2, True, 1),
    ],
)
def test_once_ready_only_the_floor_counts(
    states: tuple[State, ...], target: int, floor: int, *, ready: bool, wanted: int
) -> None:
    """After the quorum was reached a fleet stays ready down to its floor, or its target if that is lower."""
    answer = ask(fleet(*states), target=target, floor=floor, quorum=target, was_ready=True)
    assert (answer.ready, answer.wanted) == (ready, wanted)


@pytest.mark.parametrize(("silent", "ready_workers"), [(0.0, 2), (STALE_S, 2), (STALE_S + 0.1, 1)])
def test_a_worker_that_is_not_heard_of_does_not_count(silent: float, ready_workers: int) -> None:
    """A READY row whose beat is older than three seconds says nothing about its worker any more."""
    rows = [worker(0, READY), worker(1, READY, beat=NOW - silent)]
    answer = ask(rows, target=2)
    assert (answer.ready_workers, answer.ready) == (ready_workers, ready_workers == 2)


def test_a_stopping_service_is_not_ready() -> None:
    """However many workers are warm, traffic shall go elsewhere."""
    assert ask(fleet(READY, READY, READY), was_ready=True, stopping=True) == Readiness(
        ready=False, status="draining", detail="the service is stopping", ready_workers=3, wanted=0
    )


def test_the_answer_of_a_fleet_that_is_ready_is_one_clause() -> None:
    """When all is well there is nothing to add to the count."""
    assert ask(fleet(READY, READY, READY)) == Readiness(
        ready=True, status="ready", detail="3 of 3 workers are ready", ready_workers=3, wanted=3
    )


def test_the_answer_at_boot_says_what_each_worker_does() -> None:
    """A person who reads it knows which slot is where, since when, and what it does."""
    rows = [
        worker(0, READY),
        worker(1, WARMING, since=NOW - 2.5, doing="batch 2x256, round 3"),
        worker(2, SPAWNED, since=NOW - 0.04),
    ]
    assert ask(rows) == Readiness(
        ready=False,
        status="starting",
        detail=(
            "1 of 3 workers are ready, 3 wanted; slot 1 is warming since 2.5 s (batch 2x256, round 3); "
            "slot 2 is spawned since 0.0 s"
        ),
        ready_workers=1,
        wanted=3,
    )


def test_the_answer_after_failures_says_the_stage_and_the_error() -> None:
    """Failures are told with their number in a row, the state they happened in and the message."""
    rows = [
        worker(0, FAILED, failures=3, error="no such file", error_state="loading"),
        worker(1, FAILED, failures=1, error="values that are not finite", error_state="warming"),
    ]
    assert ask(rows, target=2) == Readiness(
        ready=False,
        status="failed",
        detail=(
            "0 of 2 workers are ready, 1 wanted; "
            "slot 0 is failed since 5.0 s, failed 3 in a row, last while loading: no such file; "
            "slot 1 is failed since 5.0 s, failed once, last while warming: values that are not finite"
        ),
        ready_workers=0,
        wanted=1,
    )


def test_the_answer_of_a_silent_worker_says_for_how_long() -> None:
    """A READY worker without a beat is named, as its state alone would say that all is well."""
    rows = [worker(0, READY, beat=NOW - 4.25), worker(1, WARMING)]
    assert ask(rows, target=2, was_ready=True) == Readiness(
        ready=False,
        status="degraded",
        detail=(
            "0 of 2 workers are ready, 1 wanted; slot 0 has not been heard of for 4.2 s; "
            "slot 1 is warming since 5.0 s"
        ),
        ready_workers=0,
        wanted=1,
    )


def test_an_error_of_an_earlier_life_is_not_told_of_a_ready_worker() -> None:
    """A worker that made it is simply ready, although its row keeps the last error for the status page."""
    rows = [worker(0, READY, failures=1, error="killed", error_state="loading")]
    assert ask(rows, target=1).detail == "1 of 1 workers are ready"


def test_a_quorum_above_the_target_is_the_target() -> None:
    """A fleet shrunk below its quorum before it was ever ready is ready once all of it is."""
    records = [SlotRecord(slot=0, pid=1, state=State.READY, since=0.0, beat=10.0)]
    readiness = aggregate(records, Policy(target=1, quorum=3, floor=1), 10.0, was_ready=False, stopping=False)
    assert (readiness.ready, readiness.wanted) == (True, 1)


def test_a_slot_that_fails_for_ever_is_not_waited_for() -> None:
    """With one slot in its fourth try and the other warm, the default quorum is the warm one."""
    warm = SlotRecord(slot=0, pid=1, state=State.READY, since=0.0, beat=10.0)
    policy = Policy(target=2, quorum=None, floor=1, boot_attempts=3)
    answers = []
    for failures in (2, 3):
        failing = SlotRecord(slot=1, pid=2, state=State.BACKOFF, since=0.0, beat=10.0, failures=failures)
        answers.append(aggregate([warm, failing], policy, 10.0, was_ready=False, stopping=False).ready)
    assert answers == [False, True]
