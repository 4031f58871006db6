# SPDX-License-Identifier: Apache-2.0
"""What a slot keeps of its workers: its last boots, and the passes of its last warm-up. Both processes.

A part of a scoreboard row, under the same rules: each field has one writer at a time and is an aligned store
of at most eight bytes. A cell is hidden while it is made anew, so no reader takes one boot for another.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from service.lifecycle import Stage
from service.slots import Boot, BootStage, WarmedShape

if TYPE_CHECKING:
    from collections.abc import Iterator

KEPT_BOOTS = 6
KEPT_PASSES = 20
MAX_SHAPES = 24
STAGES = (Stage.WAIT, Stage.LOAD, Stage.TO_DEVICE, Stage.WARMUP)
"""Those of a worker; the import is the arbiter's, once for all."""


class BootCell(ctypes.Structure):
    """One boot. Times of the scoreboard's clock; 0: not yet."""

    _fields_ = (
        ("generation", ctypes.c_int64),  # arbiter; 0: nothing to be read here
        ("began", ctypes.c_double),  # arbiter
        ("at", ctypes.c_double * len(STAGES)),  # worker, as the next two
        ("until", ctypes.c_double * len(STAGES)),
        ("ready_at", ctypes.c_double),
        ("ended_at", ctypes.c_double),  # the worker, if it gives up; else the arbiter
    )


class ShapeCell(ctypes.Structure):
    """One shape of a warm-up; written by the worker."""

    _fields_ = (
        ("texts", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("kept", ctypes.c_int64),  # so many of `passes` are true
        ("rounds", ctypes.c_int64),
        ("steady_s", ctypes.c_double),  # 0: still being warmed
        ("converged", ctypes.c_int64),
        ("passes", ctypes.c_double * KEPT_PASSES),
    )


class History(ctypes.Structure):
    """A ring of boots, by generation, and one warm-up."""

    _fields_ = (
        ("cells", BootCell * KEPT_BOOTS),
        ("n_shapes", ctypes.c_int64),
        ("shapes", ShapeCell * MAX_SHAPES),
    )

    def begin(self, generation: int, now: float) -> None:
        """Arbiter: a worker of the slot is about to be forked; the oldest boot makes room."""
        cell = self._cell(generation)
        cell.generation = 0
        cell.at, cell.until = type(cell.at)(), type(cell.until)()
        cell.ready_at = cell.ended_at = 0.0
        cell.began = now
        cell.generation = generation

    def begin_stage(self, generation: int, stage: Stage, now: float) -> None:
        """Worker: a stage of the boot begins."""
        self._cell(generation).at[STAGES.index(stage)] = now

    def end_stage(self, generation: int, stage: Stage, seconds: float) -> None:
        """Worker: a stage is over, if it is one of those kept, and took so long."""
        if stage in STAGES:
            cell, place = self._cell(generation), STAGES.index(stage)
            cell.until[place] = cell.at[place] + seconds

    def ready(self, generation: int, now: float) -> None:
        """Worker: it serves."""
        self._cell(generation).ready_at = now

    def end(self, generation: int, now: float) -> None:
        """Worker that gives up, or the arbiter once it is gone: the first to say so counts."""
        cell = self._cell(generation)
        cell.ended_at = cell.ended_at or now

    def note_shape(self, place: int, shape: WarmedShape) -> None:
        """Worker: keep what a shape's passes took so far; later places are those of an earlier warm-up."""
        if place >= MAX_SHAPES:
            return
        cell = self.shapes[place]
        if shape.rounds == 1:
            self.n_shapes, cell.kept = place, 0
        kept = shape.passes[:KEPT_PASSES]
        cell.texts, cell.tokens, cell.rounds = shape.texts, shape.tokens, shape.rounds
        cell.steady_s, cell.converged = shape.steady_s or 0.0, int(shape.converged)
        cell.passes[: len(kept)] = kept
        cell.kept = len(kept)
        self.n_shapes = place + 1

    def boots(self) -> tuple[Boot, ...]:
        """Return the boots that are kept, oldest first."""
        found = [boot for cell in self.cells if (boot := _read(cell)) is not None]
        return tuple(sorted(found, key=lambda boot: boot.generation))

    def warmup(self) -> tuple[WarmedShape, ...]:
        """Return the shapes of the present or the last warm-up, in its order; the last may be under way."""
        return tuple(
            WarmedShape(
                cell.texts,
                cell.tokens,
                tuple(cell.passes[: cell.kept]),
                cell.rounds,
                cell.steady_s or None,
                bool(cell.converged),
            )
            for cell in self.shapes[: self.n_shapes]
        )

    def _cell(self, generation: int) -> BootCell:
        cell: BootCell = self.cells[generation % KEPT_BOOTS]
        return cell


def _read(cell: BootCell) -> Boot | None:
    """Return the boot of a cell; None if there is none, or another took its place meanwhile."""
    generation = cell.generation
    ended_at = cell.ended_at or None
    boot = Boot(generation, cell.began, tuple(_stages(cell, ended_at)), cell.ready_at or None, ended_at)
    return boot if generation and cell.generation == generation else None


def _stages(cell: BootCell, ended_at: float | None) -> Iterator[BootStage]:
    """Yield the stages that have begun; the end of the worker ends the one that ran."""
    for stage, at, until in zip(STAGES, cell.at, cell.until, strict=True):
        end = until or ended_at
        if at:
            yield BootStage(stage, at, None if end is None else max(0.0, end - at))
