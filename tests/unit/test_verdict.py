# SPDX-License-Identifier: Apache-2.0
"""How the fleet is, in one short sentence: for every status, and for every state of a slot."""

from __future__ import annotations

from typing import Any

import pytest

from service.lifecycle import State
from service.readiness import Policy, aggregate
from service.slots import SlotRecord
from service.verdict import shape_of, verdict

NOW = 1000.0
LIMIT = 250
"""Letters of the longest sentence."""


def worker(slot: int, state: State = State.READY, **others: Any) -> SlotRecord:
    return SlotRecord(slot, **{"pid": 100 + slot, "state": state, "since": NOW - 5, "beat": NOW} | others)


def say(
    *records: SlotRecord,
    target: int | None = None,
    planned: int = 0,
    etas: dict[int, float | None] | None = None,
    was_ready: bool = True,
    stopping: bool = False,
) -> str:
    target = len(records) if target is None else target
    readiness = aggregate(records, Policy(target, None, 1), NOW, was_ready=was_ready, stopping=stopping)
    return verdict(readiness, records, NOW, target=target, planned=planned, etas=etas or {})


WARMING = worker(2, State.WARMING, doing="batch 64x512, round 3")
READY = [worker(slot) for slot in range(4)]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (say(*READY), "serving: 4 of 4 ready"),
        (say(READY[0]), "serving: 1 of 1 ready"),
        (
            say(READY[0], READY[1], WARMING, READY[3], etas={2: 8.4}),
            "serving: 3 of 4 ready, slot 2 is warming: batch 64\N{MULTIPLICATION SIGN}512, 8 s left",
        ),
        (
            say(worker(0, State.LOADING), worker(1, State.WAITING), was_ready=False, etas={0: 3.0}),
            "starting: 0 of 2 ready, slot 0 is loading, 3 s left, slot 1 waits for its turn to load",
        ),
        (
            say(worker(0, State.EMPTY), worker(1, State.EMPTY), was_ready=False),
            "starting: 0 of 2 ready, slot 0 has no worker yet, slot 1 has no worker yet",
        ),
        (
            say(worker(0, State.BACKOFF, backoff_until=NOW + 4, error="broken", failures=3)),
            "degraded: 0 of 1 ready, slot 0 tries again in 4 s",
        ),
        (
            say(worker(0, State.FAILED, error="no such model"), was_ready=False),
            "failed: 0 of 1 ready, slot 0 has failed: no such model",
        ),
        (
            say(worker(0, State.FAILED), was_ready=False),
            "failed: 0 of 1 ready, slot 0 has failed: no reason is known",
        ),
        (say(*READY[:2], stopping=True), "draining: the service is stopping, 2 workers are left"),
        (say(READY[0], stopping=True), "draining: the service is stopping, 1 worker is left"),
        (
            say(worker(0, State.EMPTY), stopping=True),
            "draining: the service is stopping, no worker is left",
        ),
        (
            say(READY[0], worker(1, beat=NOW - 12)),
            "serving: 1 of 2 ready, slot 1 has been silent for 12 s",
        ),
        (
            say(READY[0], worker(5, State.DRAINING), target=1),
            "serving: 1 of 1 ready, slot 5 is draining",
        ),
        (say(*READY, planned=4), "serving: 4 of 4 ready"),
        (say(*READY, planned=6), "serving: 4 of 4 ready, growing to 6"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_the_sentence_says_what_there_is_to_say(said: str, expected: str) -> None:
    """Serving, starting, degraded, failed or draining; how many are ready; what the others do."""
    assert said == expected


def test_two_slots_are_named_and_the_others_counted() -> None:
    """What is wrong comes first, then what is nearest to serving."""
    records = [
        worker(0, State.SPAWNED),
        worker(1, State.LOADING),
        worker(2, State.WARMING),
        worker(3, State.FAILED, error="out of memory"),
        worker(4, State.WAITING),
    ]
    assert say(*records, was_ready=False) == (
        "starting: 0 of 5 ready, slot 3 has failed: out of memory, slot 2 is warming, and 3 more"
    )


def test_a_silent_worker_is_the_first_to_be_named() -> None:
    """It counts as ready for nobody, and no state says so."""
    said = say(worker(0, State.FAILED, error="x"), worker(1, State.WARMING), worker(2, beat=NOW - 30))
    assert said == (
        "degraded: 0 of 3 ready, slot 2 has been silent for 30 s, slot 0 has failed: x, and 1 more"
    )


@pytest.mark.parametrize("state", list(State), ids=lambda state: state.label)
@pytest.mark.parametrize("error", ["", "a long story\nof many lines " * 40], ids=["no error", "long error"])
def test_every_state_has_its_words_and_the_sentence_stays_short(state: State, error: str) -> None:
    """One line, whatever an error holds."""
    said = say(*[worker(slot, state, error=error) for slot in range(64)])
    assert "64 ready" in said
    assert "\n" not in said
    assert len(said) <= LIMIT
    assert (state is State.READY) == ("slot" not in said)


@pytest.mark.parametrize(
    ("doing", "expected"),
    [
        ("", ""),
        ("batch 2x256, round 3", "2\N{MULTIPLICATION SIGN}256"),
        ("reading weights", "reading weights"),
    ],
)
def test_a_shape_is_written_as_people_write_it(doing: str, expected: str) -> None:
    """Texts times tokens; other words stay."""
    assert shape_of(doing) == expected


def test_words_that_are_no_shape_are_told_as_they_are() -> None:
    """A backend may say anything."""
    assert say(worker(0, State.LOADING, doing="reading weights")) == (
        "degraded: 0 of 1 ready, slot 0 is loading: reading weights"
    )
