# SPDX-License-Identifier: Apache-2.0
"""The life of a worker: the table of states, and the drawing of it."""

from __future__ import annotations

import re
from itertools import product

import pytest

from service.lifecycle import TRANSITIONS, State, TransitionError, check, diagram
from service.scoreboard import Scoreboard

STEPS = [(before, after) for before, afters in TRANSITIONS.items() for after in afters]
NO_STEPS = [pair for pair in product(State, State) if pair not in STEPS]


def names(pair: object) -> str:
    return pair.label if isinstance(pair, State) else ""


def test_every_state_can_be_reached_from_an_empty_slot() -> None:
    """No state is an island: from EMPTY the table leads to all of them."""
    reached, todo = set(), [State.EMPTY]
    while todo:
        state = todo.pop()
        reached.add(state)
        todo += TRANSITIONS[state] - reached
    assert reached == set(State)


def test_every_state_can_end_in_an_empty_slot_at_once() -> None:
    """A worker may die in any state, and its slot is free the moment the arbiter has seen it."""
    assert {state for state in State if State.EMPTY in TRANSITIONS[state]} == set(State) - {State.EMPTY}


def test_only_a_warmed_worker_becomes_ready() -> None:
    """WARMING is the only door to READY."""
    assert [before for before, after in STEPS if after is State.READY] == [State.WARMING]


@pytest.mark.parametrize(("before", "after"), STEPS, ids=names)
def test_a_step_of_the_table_is_allowed(before: State, after: State) -> None:
    """`check` returns the new state for each step that the table has."""
    assert check(before, after) is after


@pytest.mark.parametrize(("before", "after"), NO_STEPS, ids=names)
def test_any_other_step_raises_and_changes_nothing(before: State, after: State) -> None:
    """A step that the table lacks raises, names both states, and leaves the slot as it was."""
    board = Scoreboard(1)
    board.header.slots_used = 1
    row = board.rows[0]
    row.state, row.since, row.progress, row.doing = before, 12.5, 0.5, b"loading"
    was = board.record(0)
    with pytest.raises(TransitionError, match=f"^no transition from {before.label} to {after.label}$"):
        board.enter(0, after, 99.0)
    assert board.record(0) == was


def test_the_diagram_draws_the_table() -> None:
    """The Mermaid text, read back, is the table: every arrow, no other, and the start."""
    head, start, *arrows = diagram().splitlines()
    read = [re.fullmatch(r"    (\w+) --> (\w+)", arrow) for arrow in arrows]
    drawn = sorted((State[m[1].upper()], State[m[2].upper()]) for m in read if m)
    assert (head, start, drawn) == ("stateDiagram-v2", "    [*] --> empty", sorted(STEPS))
    assert len(arrows) == len(STEPS)
