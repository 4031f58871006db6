# SPDX-License-Identifier: Apache-2.0
"""The table that all processes share: what is written on one side of a fork is read on the other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from service.lifecycle import Failure, Stage, State, TransitionError
from service.scoreboard import ERROR_BYTES, MAX_SHAPES, MEMORY_KINDS, Peer, Scoreboard, clip
from service.slots import ShapeTimes, SlotRecord

if TYPE_CHECKING:
    from collections.abc import Callable

NO_FAILURES = {reason.value: 0 for reason in Failure}
FRESH = SlotRecord(
    slot=1,
    pid=0,
    state=State.SPAWNED,
    since=10.0,
    beat=10.0,
    device="GPU-1",
    generation=1,
    failures_by_reason=NO_FAILURES,
)


@pytest.fixture
def board() -> Scoreboard:
    """Return a table of three slots, with a worker just spawned in the second."""
    board = Scoreboard(3)
    board.spawn(1, "GPU-1", 10.0)
    return board


def test_a_new_table_has_no_rows_yet() -> None:
    """Nothing is shown of slots that were never used."""
    board = Scoreboard(3)
    assert (board.capacity, board.records(), board.peers(without=0)) == (3, [], [])


def test_a_spawned_slot_has_a_device_a_generation_and_nothing_else(board: Scoreboard) -> None:
    """The arbiter hands a slot over with its device; rows below it are shown as empty."""
    empty = SlotRecord(0, 0, State.EMPTY, 0.0, 0.0, "", generation=0, failures_by_reason=NO_FAILURES)
    assert board.records() == [empty, FRESH]


def test_a_childs_row_is_read_by_the_parent(
    board: Scoreboard, fork: Callable[[Callable[[], object]], object]
) -> None:
    """What a worker writes after the fork, the arbiter and all other workers read; nothing else changes."""

    def work() -> None:
        for state in (State.PINNED, State.WAITING, State.LOADING):
            board.enter(1, state, 20.0)
        board.rows[1].pid, board.rows[1].beat, board.rows[1].load = 4711, 21.5, 3
        board.note_progress(1, 0.5, "reading weights")

    fork(work)
    assert board.records()[1] == replace(
        FRESH,
        pid=4711,
        state=State.LOADING,
        since=20.0,
        beat=21.5,
        load=3,
        progress=0.5,
        doing="reading weights",
    )


def test_a_parents_header_is_read_by_a_child_that_was_forked_before(board: Scoreboard) -> None:
    """The header is shared too: two views of one mapping."""
    board.header.roll_epoch = 7
    board.spawn(2, "GPU-2", 30.0)
    assert (board.header.slots_used, board.record(2).epoch) == (3, 7)


def test_rows_survive_the_death_of_their_writer(
    board: Scoreboard, fork: Callable[[Callable[[], object]], object]
) -> None:
    """A worker that is killed leaves its row as it was, so that the arbiter can say what it was doing."""
    child = fork(lambda: board.enter(1, State.PINNED, 20.0))
    child.kill()  # type: ignore[attr-defined]
    assert board.record(1) == replace(FRESH, state=State.PINNED, since=20.0)


def test_everything_that_is_noted_is_in_the_record(board: Scoreboard) -> None:
    """A record holds all that was written to its row, and reads the same twice."""
    shapes = [
        ShapeTimes(2, 256, 4, 0.5, 0.25, converged=True),
        ShapeTimes(1, 8, 20, 0.1, 0.05, converged=False),
    ]
    row = board.rows[1]
    row.ready_at, row.failures, row.backoff_until, row.max_batch_tokens, row.epoch = 50.0, 2, 60.0, 512, 3
    row.by_reason[list(Failure).index(Failure.KILLED)] = 4
    for stage, seconds in zip(Stage, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True):
        board.note_stage(1, stage, seconds)
    board.note_shapes(1, shapes)
    board.note_memory(1, rss=300, pss=200, uss=100)
    board.note_memory(1, **{kind: 1 for kind in MEMORY_KINDS if kind.startswith("device_")})
    board.note_progress(1, 0.25, "batch 2x256, round 3")
    board.fail(1, Failure.LOAD, "no such file")
    expected = replace(
        FRESH,
        epoch=3,
        ready_at=50.0,
        failures=2,
        backoff_until=60.0,
        progress=0.25,
        doing="batch 2x256, round 3",
        error="no such file",
        error_state="spawned",
        max_batch_tokens=512,
        failures_by_reason=NO_FAILURES | {"killed": 4},
        stage_seconds={"import": 1.0, "wait": 2.0, "load": 3.0, "to_device": 4.0, "warmup": 5.0},
        shapes=tuple(shapes),
        memory_bytes={
            "rss": 300,
            "pss": 200,
            "uss": 100,
            "device_allocated": 1,
            "device_reserved": 1,
            "device_peak": 1,
            "device_context": 1,
        },
    )
    assert [board.record(1), board.record(1)] == [expected, expected]


def test_each_step_starts_its_own_clock_and_progress(board: Scoreboard) -> None:
    """Entering a state sets its time, and forgets what the one before it was doing."""
    board.note_progress(1, 0.9, "almost")
    board.enter(1, State.PINNED, 33.0)
    assert board.record(1) == replace(FRESH, state=State.PINNED, since=33.0)


def test_a_slot_that_is_held_cannot_be_spawned_again(board: Scoreboard) -> None:
    """Two workers never share a slot."""
    with pytest.raises(TransitionError, match="from spawned to spawned"):
        board.spawn(1, "GPU-1", 11.0)
    assert board.record(1).state is State.SPAWNED


@pytest.mark.parametrize("state", list(State), ids=lambda state: state.label)
def test_a_slot_is_vacated_from_any_state(board: Scoreboard, state: State) -> None:
    """Death asks nobody: the slot is empty, without pid, load or requests, and tells the last error."""
    board.fail(1, Failure.LOAD, "no such file")
    board.note_progress(1, 0.5, "loading")
    row = board.rows[1]
    row.state, row.pid, row.load, row.in_flight = state, 4711, 5, 2
    board.vacate(1, 44.0)
    assert board.record(1) == replace(
        FRESH, state=State.EMPTY, since=44.0, error="no such file", error_state="spawned"
    )


def test_the_next_worker_of_a_slot_starts_clean_but_knows_the_past(board: Scoreboard) -> None:
    """Pid, load, times and memory belong to one life; failures, errors and warm-up times to the slot."""
    shape = ShapeTimes(1, 8, 3, 0.5, 0.25, converged=True)
    row = board.rows[1]
    row.pid, row.load, row.ready_at, row.deadline, row.failures = 4711, 9, 5.0, 6.0, 2
    board.note_stage(1, Stage.LOAD, 2.0)
    board.note_memory(1, rss=300)
    board.note_shapes(1, [shape])
    board.fail(1, Failure.LOAD, "no such file")
    board.vacate(1, 11.0)
    board.header.roll_epoch = 4
    board.spawn(1, "GPU-2", 12.0)
    assert board.record(1) == replace(
        FRESH,
        since=12.0,
        beat=12.0,
        device="GPU-2",
        generation=2,
        epoch=4,
        failures=2,
        error="no such file",
        error_state="spawned",
        shapes=(shape,),
    )
    assert (row.deadline, row.exit_reason) == (0.0, 0)


@pytest.mark.parametrize("reason", list(Failure))
def test_a_failure_leaves_its_reason_state_and_text(board: Scoreboard, reason: Failure) -> None:
    """The arbiter reads off the row why a worker ended and where it was."""
    board.fail(1, reason, "what happened")
    record = board.record(1)
    noted = list(Failure)[board.rows[1].exit_reason - 1]
    assert (noted, record.error, record.error_state) == (reason, "what happened", "spawned")


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("", 8, b""),
        ("short", 8, b"short"),
        ("1234567", 8, b"1234567"),
        ("12345678", 8, b"1234567"),
        ("äöü€", 8, b"\xc3\xa4\xc3\xb6\xc3\xbc\xe2"),
        ("lone \ud800", 8, b"lone ?"),
    ],
)
def test_texts_are_clipped_to_their_field(text: str, size: int, expected: bytes) -> None:
    """A text is cut to one byte less than its field, as UTF-8, whatever is in it."""
    assert clip(text, size) == expected


@pytest.mark.parametrize(
    "text", ["x" * 5000, "ü" * 5000, "a" + "€" * 5000, "lone \ud800 surrogate", "line\nbreak\ttab"], ids=ascii
)
def test_any_error_text_can_be_noted_and_read(board: Scoreboard, text: str) -> None:
    """Long and strange errors neither raise nor spill over: what fits is read back, the neighbours stay."""
    board.spawn(2, "GPU-2", 10.0)
    neighbour = board.record(2)
    board.fail(1, Failure.LOAD, text)
    error = board.record(1).error
    readable = text.encode(errors="replace").decode()
    whole = error.rstrip("\N{REPLACEMENT CHARACTER}")
    assert readable.startswith(whole)
    assert len(whole.encode()) >= min(len(readable.encode()), ERROR_BYTES - 4)
    assert (board.record(2), board.record(1)) == (
        neighbour,
        replace(FRESH, error=error, error_state="spawned"),
    )


def test_more_shapes_than_fit_keep_the_first(board: Scoreboard) -> None:
    """Shapes come worst first, so those that have no place are the least of them."""
    shapes = [ShapeTimes(1, tokens, 3, 0.5, 0.25, converged=True) for tokens in range(MAX_SHAPES + 5)]
    board.note_shapes(1, shapes)
    assert board.record(1).shapes == tuple(shapes[:MAX_SHAPES])


def test_fewer_shapes_replace_more(board: Scoreboard) -> None:
    """What a later worker measured replaces what an earlier one did, whole."""
    shapes = [ShapeTimes(1, tokens, 3, 0.5, 0.25, converged=True) for tokens in (64, 32, 16)]
    board.note_shapes(1, shapes)
    board.note_shapes(1, shapes[2:])
    assert board.record(1).shapes == (shapes[2],)


def test_peers_are_the_other_live_workers(board: Scoreboard) -> None:
    """The accept rules see state, beat and loads of everyone else who lives."""
    board.spawn(2, "GPU-2", 12.0)
    board.rows[2].load, board.rows[2].mean_load = 6, 5.5
    assert [board.peers(without=slot) for slot in range(3)] == [
        [Peer(State.SPAWNED, 10.0, 0, 0.0), Peer(State.SPAWNED, 12.0, 6, 5.5)],
        [Peer(State.SPAWNED, 12.0, 6, 5.5)],
        [Peer(State.SPAWNED, 10.0, 0, 0.0)],
    ]
