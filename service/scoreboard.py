# SPDX-License-Identifier: Apache-2.0
"""The table that all processes share: one row per slot, made by the arbiter before the first fork.

An anonymous mapping: no file, survives any death, inherited by every fork. Each field has one
writer at a time (see service.lifecycle) and is an aligned store of at most eight bytes, so no
reader sees half of one; texts may be seen half written, and are for people only.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from typing import TYPE_CHECKING, NamedTuple

from service.history import MAX_SHAPES, History
from service.lifecycle import Failure, Stage, State, check
from service.slots import ShapeTimes, SlotRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.slots import WarmedShape

ERROR_BYTES = 1024
STAGES = tuple(Stage)
FAILURES = tuple(Failure)
MEMORY_KINDS = (
    "rss",
    "pss",
    "uss",
    "device_allocated",
    "device_reserved",
    "device_peak",
    "device_context",
)


class Header(ctypes.Structure):
    """What concerns the fleet as a whole; written by the arbiter unless said otherwise."""

    _fields_ = (
        ("target", ctypes.c_int64),
        ("slots_used", ctypes.c_int64),  # rows from here on were never used
        ("roll_epoch", ctypes.c_int64),
        ("stopping", ctypes.c_int64),
        ("ever_ready", ctypes.c_int64),  # any worker: one was READY
        ("was_ready", ctypes.c_int64),  # any worker: the quorum was reached
        ("last_ready", ctypes.c_double),  # READY workers: their newest beat
        ("halting", ctypes.c_int64),  # the one worker that halts the arbiter
        ("import_seconds", ctypes.c_double),
        ("preload_seconds", ctypes.c_double),
        ("started", ctypes.c_double),
    )


class Shape(ctypes.Structure):
    """Warm-up times of one batch shape."""

    _fields_ = (
        ("texts", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("rounds", ctypes.c_int64),
        ("first_s", ctypes.c_double),
        ("steady_s", ctypes.c_double),
        ("converged", ctypes.c_int64),
    )


class Row(ctypes.Structure):
    """One slot. The first group belongs to the arbiter, the second to the worker."""

    _fields_ = (
        ("pid", ctypes.c_int64),
        ("generation", ctypes.c_int64),
        ("epoch", ctypes.c_int64),
        ("failures", ctypes.c_int64),
        ("backoff_until", ctypes.c_double),
        ("by_reason", ctypes.c_int64 * len(FAILURES)),
        ("device", ctypes.c_char * 128),
        ("state", ctypes.c_int64),
        ("since", ctypes.c_double),
        ("beat", ctypes.c_double),
        ("load", ctypes.c_int64),
        ("mean_load", ctypes.c_double),  # over about half a second
        ("in_flight", ctypes.c_int64),
        ("ready_at", ctypes.c_double),
        ("deadline", ctypes.c_double),
        ("exit_reason", ctypes.c_int64),  # 1 + index into FAILURES; 0: none given
        ("progress", ctypes.c_double),
        ("doing", ctypes.c_char * 128),
        ("error", ctypes.c_char * ERROR_BYTES),
        ("error_state", ctypes.c_int64),
        ("max_batch_tokens", ctypes.c_int64),  # lower than declared after an out-of-memory
        ("declared_batch_tokens", ctypes.c_int64),
        ("queued_texts", ctypes.c_int64),
        ("queued_tokens", ctypes.c_int64),
        ("stage_s", ctypes.c_double * len(STAGES)),
        ("n_shapes", ctypes.c_int64),
        ("shapes", Shape * MAX_SHAPES),
        ("memory", ctypes.c_int64 * len(MEMORY_KINDS)),
        ("history", History),  # of arbiter and worker, field by field
    )


class Peer(NamedTuple):
    """What the accept rules ask of a row."""

    state: State
    beat: float
    load: int
    mean_load: float


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def clip(text: str, size: int) -> bytes:
    """Return the text as UTF-8 that fits a field of `size` bytes."""
    return text.encode(errors="replace")[: size - 1]


class Scoreboard:
    """The mapping, as a header and rows."""

    def __init__(self, capacity: int) -> None:
        """Map an empty table of `capacity` slots."""
        self.capacity = capacity
        self._memory = mmap.mmap(-1, ctypes.sizeof(Header) + capacity * ctypes.sizeof(Row))
        self.header = Header.from_buffer(self._memory)
        self.rows = (Row * capacity).from_buffer(self._memory, ctypes.sizeof(Header))

    def enter(self, slot: int, state: State, now: float) -> None:
        """Move the worker of a slot to its next state.

        Raises:
            TransitionError: the table of the life cycle has no such step.
        """
        row = self.rows[slot]
        check(State(row.state), state)
        row.since = now
        row.doing = b""
        row.progress = 0.0
        if state is State.READY:  # before the state: whoever sees that finds the boot at its end
            row.history.ready(row.generation, now)
        elif state is State.FAILED:
            row.history.end(row.generation, now)
        row.state = state

    def spawn(self, slot: int, device: str, now: float) -> None:
        """Arbiter: hand the slot to the worker that is about to be forked."""
        row, header = self.rows[slot], self.header
        header.slots_used = max(header.slots_used, slot + 1)
        row.generation += 1
        row.epoch = header.roll_epoch
        row.device = clip(device, 128)
        row.beat = now
        self.enter(slot, State.SPAWNED, now)
        row.history.begin(row.generation, now)

    def vacate(self, slot: int, now: float) -> None:
        """Arbiter: the worker of the slot is gone, whatever it was doing.

        The slot keeps what is its own: generation, failures, last error, device, its history, and the
        shapes' times, by which its next worker knows that it is warm.
        """
        row = self.rows[slot]
        if row.generation:
            row.history.end(row.generation, now)
        row.pid = row.load = row.in_flight = row.exit_reason = 0
        row.max_batch_tokens = row.declared_batch_tokens = row.queued_texts = row.queued_tokens = 0
        row.mean_load = row.ready_at = row.deadline = row.progress = 0.0
        row.doing = b""
        row.stage_s = type(row.stage_s)()
        row.memory = type(row.memory)()
        row.since = now
        row.state = State.EMPTY

    def fail(self, slot: int, reason: Failure, error: str) -> None:
        """Note why the worker of the slot ends, or cannot become ready."""
        row = self.rows[slot]
        row.error_state = row.state
        row.error = clip(error, ERROR_BYTES)
        row.exit_reason = 1 + FAILURES.index(reason)

    def peers(self, *, without: int) -> list[Peer]:
        """Return the rows of the other live workers, as the accept rules need them: some microseconds."""
        rows = self.rows
        return [
            Peer(State(row.state), row.beat, row.load, row.mean_load)
            for row in (rows[slot] for slot in range(self.header.slots_used) if slot != without)
            if row.state
        ]

    def states(self) -> list[tuple[State, float]]:
        """Return the state of each slot that was ever used, and since when: some microseconds."""
        rows = self.rows
        return [(State(rows[slot].state), rows[slot].since) for slot in range(self.header.slots_used)]

    def records(self) -> list[SlotRecord]:
        """Return a snapshot of every slot that was ever used."""
        return [self.record(slot) for slot in range(self.header.slots_used)]

    def record(self, slot: int) -> SlotRecord:
        """Return a snapshot of one row."""
        row = self.rows[slot]
        return SlotRecord(
            slot=slot,
            pid=row.pid,
            state=State(row.state),
            since=row.since,
            beat=row.beat,
            device=_text(row.device),
            generation=row.generation,
            epoch=row.epoch,
            load=row.load,
            in_flight=row.in_flight,
            ready_at=row.ready_at,
            failures=row.failures,
            backoff_until=row.backoff_until,
            progress=row.progress,
            doing=_text(row.doing),
            error=_text(row.error),
            error_state=State(row.error_state).label if row.error else "",
            max_batch_tokens=row.max_batch_tokens,
            declared_batch_tokens=row.declared_batch_tokens,
            queued_texts=row.queued_texts,
            queued_tokens=row.queued_tokens,
            failures_by_reason={reason.value: row.by_reason[i] for i, reason in enumerate(FAILURES)},
            stage_seconds={stage.value: row.stage_s[i] for i, stage in enumerate(STAGES) if row.stage_s[i]},
            shapes=tuple(self._shapes(row)),
            memory_bytes={kind: row.memory[i] for i, kind in enumerate(MEMORY_KINDS) if row.memory[i]},
        )

    @staticmethod
    def _shapes(row: Row) -> Iterator[ShapeTimes]:
        for shape in row.shapes[: row.n_shapes]:
            yield ShapeTimes(
                shape.texts, shape.tokens, shape.rounds, shape.first_s, shape.steady_s, bool(shape.converged)
            )

    def begin_stage(self, slot: int, stage: Stage, now: float) -> None:
        """Worker: keep when a stage of the boot began."""
        row = self.rows[slot]
        row.history.begin_stage(row.generation, stage, now)

    def note_stage(self, slot: int, stage: Stage, seconds: float) -> None:
        """Worker: keep how long a stage of the boot took."""
        row = self.rows[slot]
        row.stage_s[STAGES.index(stage)] = seconds
        row.history.end_stage(row.generation, stage, seconds)

    def note_passes(self, slot: int, place: int, shape: WarmedShape) -> None:
        """Worker: keep the passes of a shape, which is the nth of its warm-up."""
        self.rows[slot].history.note_shape(place, shape)

    def note_shapes(self, slot: int, shapes: list[ShapeTimes]) -> None:
        """Worker: keep what warm-up measured, the first `MAX_SHAPES` shapes of it."""
        row = self.rows[slot]
        for i, shape in enumerate(shapes[:MAX_SHAPES]):
            row.shapes[i] = Shape(
                shape.texts, shape.tokens, shape.rounds, shape.first_s, shape.steady_s, int(shape.converged)
            )
        row.n_shapes = min(len(shapes), MAX_SHAPES)

    def note_memory(self, slot: int, **kinds: int) -> None:
        """Worker: keep its memory in bytes, by kind."""
        row = self.rows[slot]
        for kind, size in kinds.items():
            row.memory[MEMORY_KINDS.index(kind)] = size

    def note_progress(self, slot: int, done: float, doing: str) -> None:
        """Worker: say how far the present stage is (0 to 1) and what it does."""
        row = self.rows[slot]
        row.progress = done
        row.doing = clip(doing, 128)


def now() -> float:
    """Return the clock of the scoreboard: seconds since boot of the machine, the same in all processes."""
    return time.monotonic()
