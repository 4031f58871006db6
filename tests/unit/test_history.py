# SPDX-License-Identifier: Apache-2.0
"""What a slot keeps of its workers: the last boots, and the passes of the last warm-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from service.history import KEPT_BOOTS, KEPT_PASSES, MAX_SHAPES, STAGES, History
from service.lifecycle import Stage, State
from service.scoreboard import Scoreboard
from service.slots import Boot, BootStage, ShapeTimes, WarmedShape

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = (State.PINNED, State.WAITING, State.LOADING, State.WARMING, State.READY)


@pytest.fixture
def board() -> Scoreboard:
    """Return a table with a worker just spawned in its only slot."""
    board = Scoreboard(1)
    board.spawn(0, "cpu", 10.0)
    return board


def boots(board: Scoreboard) -> tuple[Boot, ...]:
    return board.rows[0].history.boots()


def walk(board: Scoreboard, last: State, now: float) -> None:
    """Move the worker on to a state."""
    for state in PATH[: PATH.index(last) + 1]:
        if state > board.record(0).state:
            board.enter(0, state, now)


def test_a_boot_begins_with_the_fork(board: Scoreboard) -> None:
    """It is there before the worker has done anything."""
    assert boots(board) == (Boot(1, 10.0),)
    assert boots(board)[0].outcome == "booting"


def test_a_boot_is_told_stage_by_stage(board: Scoreboard) -> None:
    """Each stage has its begin, and its seconds once it is over; then comes the moment of READY."""
    for number, stage in enumerate(STAGES):
        board.begin_stage(0, stage, 20.0 + number)
        assert boots(board)[0].stages[-1] == BootStage(stage, 20.0 + number, None)
        board.note_stage(0, stage, 0.5)
    walk(board, State.READY, 30.0)
    stages = tuple(BootStage(stage, 20.0 + number, 0.5) for number, stage in enumerate(STAGES))
    assert boots(board) == (Boot(1, 10.0, stages, 30.0),)
    assert boots(board)[0].outcome == "ready"
    board.enter(0, State.DRAINING, 40.0)
    board.vacate(0, 41.0)
    assert boots(board) == (Boot(1, 10.0, stages, 30.0, 41.0),)
    assert boots(board)[0].outcome == "gone"


def test_the_import_is_not_a_workers(board: Scoreboard) -> None:
    """The arbiter notes it on the row, and in no boot."""
    board.note_stage(0, Stage.IMPORT, 3.0)
    assert boots(board) == (Boot(1, 10.0),)


def test_a_worker_that_dies_leaves_its_stage_as_long_as_it_was(board: Scoreboard) -> None:
    """What it was doing ended with it, and it has failed."""
    board.begin_stage(0, Stage.LOAD, 20.0)
    walk(board, State.LOADING, 20.0)
    board.vacate(0, 23.0)
    assert boots(board) == (Boot(1, 10.0, (BootStage(Stage.LOAD, 20.0, 3.0),), None, 23.0),)
    assert boots(board)[0].outcome == "failed"


def test_a_boot_ends_when_the_worker_gives_up(board: Scoreboard) -> None:
    """It may stay for long to tell why, and be reaped at last: that is no part of its boot."""
    walk(board, State.LOADING, 20.0)
    board.enter(0, State.FAILED, 25.0)
    assert boots(board) == (Boot(1, 10.0, (), None, 25.0),)
    board.vacate(0, 99.0)
    assert boots(board) == (Boot(1, 10.0, (), None, 25.0),)


def test_a_boot_is_at_its_end_before_the_state_tells_so(
    board: Scoreboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that sees READY, FAILED or EMPTY finds the boot in agreement."""
    states: list[State] = []
    for name in ("ready", "end"):
        monkeypatch.setattr(History, name, lambda *_: states.append(board.record(0).state))
    walk(board, State.READY, 20.0)
    board.vacate(0, 21.0)
    board.spawn(0, "cpu", 22.0)
    walk(board, State.PINNED, 23.0)
    board.enter(0, State.FAILED, 24.0)
    assert states == [State.WARMING, State.READY, State.PINNED]


def test_the_slot_keeps_its_last_boots(board: Scoreboard) -> None:
    """Oldest first; each further one takes the place of the oldest, whole."""
    for generation in range(1, KEPT_BOOTS + 4):
        kept = range(max(1, generation + 1 - KEPT_BOOTS), generation + 1)
        assert [boot.generation for boot in boots(board)] == list(kept)
        board.begin_stage(0, Stage.LOAD, 20.0)
        walk(board, State.READY, 30.0)
        board.vacate(0, 40.0 + generation)
        board.spawn(0, "cpu", 50.0 + generation)
        assert boots(board)[-1] == Boot(generation + 1, 50.0 + generation)
        assert boots(board)[-2].outcome == "gone"


def test_a_boot_that_is_made_anew_is_hidden(board: Scoreboard) -> None:
    """Nobody takes the half of one boot for another."""
    board.rows[0].history.cells[1].generation = 0
    assert boots(board) == ()


def test_a_slot_that_was_never_used_has_no_history() -> None:
    """Nor does emptying it make one."""
    board = Scoreboard(1)
    board.vacate(0, 5.0)
    assert (boots(board), board.rows[0].history.warmup()) == ((), ())


def test_a_child_writes_what_the_parent_reads(
    board: Scoreboard, fork: Callable[[Callable[[], object]], object]
) -> None:
    """The ring is in the shared table."""

    def work() -> None:
        board.begin_stage(0, Stage.WAIT, 11.0)
        board.note_passes(0, 0, WarmedShape(2, 256, (0.5,), 1))

    fork(work)
    assert boots(board)[0].stages == (BootStage(Stage.WAIT, 11.0, None),)
    assert board.rows[0].history.warmup() == (WarmedShape(2, 256, (0.5,), 1),)


# Warm-up


def warm(board: Scoreboard, place: int, tokens: int, rounds: int) -> WarmedShape:
    """Make the passes of a shape; return it as it is in the end."""
    passes = tuple(0.1 * n for n in range(1, rounds + 1))
    for n in range(1, rounds + 1):
        board.note_passes(0, place, WarmedShape(2, tokens, passes[:n], n))
    done = WarmedShape(2, tokens, passes, rounds, 0.25, converged=True)
    board.note_passes(0, place, done)
    return done


def test_shapes_appear_one_after_the_other(board: Scoreboard) -> None:
    """Those that are done, and the one being warmed with its passes so far."""
    first = warm(board, 0, 256, 4)
    board.note_passes(0, 1, WarmedShape(2, 128, (0.5,), 1))
    board.note_passes(0, 1, WarmedShape(2, 128, (0.5, 0.25), 2))
    assert board.rows[0].history.warmup() == (first, WarmedShape(2, 128, (0.5, 0.25), 2))


def test_many_passes_are_cut_and_counted(board: Scoreboard) -> None:
    """The first twenty are kept."""
    done = warm(board, 0, 256, KEPT_PASSES + 5)
    (found,) = board.rows[0].history.warmup()
    assert (found.passes, found.rounds) == (done.passes[:KEPT_PASSES], KEPT_PASSES + 5)


def test_a_warm_up_that_begins_again_forgets_the_one_before(board: Scoreboard) -> None:
    """Of the next worker, or at half the budget; until then the slot keeps it, also when it is empty."""
    shapes = tuple(warm(board, place, 256 >> place, 3) for place in range(3))
    board.vacate(0, 20.0)
    board.spawn(0, "cpu", 21.0)
    assert board.rows[0].history.warmup() == shapes
    again = WarmedShape(1, 512, (0.5,), 1)
    board.note_passes(0, 0, again)
    assert board.rows[0].history.warmup() == (again,)


def test_more_shapes_than_there_is_room_for_are_left_out(board: Scoreboard) -> None:
    """The first are the worst."""
    for place in range(MAX_SHAPES + 2):
        warm(board, place, 8 + place, 1)
    assert [shape.tokens for shape in board.rows[0].history.warmup()] == list(range(8, 8 + MAX_SHAPES))


def test_what_the_next_worker_knows_stays_while_it_warms(board: Scoreboard) -> None:
    """Steady times of the last warm-up are the row's, and no pass of the next changes them."""
    known = [ShapeTimes(2, 256, 4, 0.9, 0.3, converged=True)]
    board.note_shapes(0, known)
    board.vacate(0, 20.0)
    board.spawn(0, "cpu", 21.0)
    warm(board, 0, 256, 2)
    assert board.record(0).shapes == tuple(known)
