# SPDX-License-Identifier: Apache-2.0
"""What the arbiter makes before the first fork and every worker inherits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.permits import Permits
from service.readiness import Policy, Readiness, aggregate
from service.scoreboard import Scoreboard, now
from service.slots import CPU

if TYPE_CHECKING:
    from service.settings import Settings
    from service.slots import SlotRecord

SPARE_SLOTS = 64
"""Rows beyond the configured workers: for growth, and for workers that drain while others boot."""


@dataclass(frozen=True)
class Fleet:
    """Settings, table and permits of one service."""

    settings: Settings
    board: Scoreboard
    devices: tuple[str, ...]
    problem: str
    load_permits: dict[str, Permits]
    roll_permit: Permits
    halt_permit: Permits

    @classmethod
    def make(cls, settings: Settings, devices: tuple[str, ...], workers: int, problem: str = "") -> Fleet:
        """Arbiter: make everything that forks share; `problem` is why there is no model to load, if so."""
        board = Scoreboard(workers + SPARE_SLOTS)
        board.header.target = board.header.slots_used = workers
        board.header.started = now()
        for row in board.rows[:workers]:
            row.since = row.beat = board.header.started
        return cls(
            settings=settings,
            board=board,
            devices=devices,
            problem=problem,
            load_permits=_load_permits(settings, devices),
            roll_permit=Permits("roll", 1),
            halt_permit=Permits("halt", 1),
        )

    @property
    def cuda(self) -> bool:
        """Whether workers are pinned to GPUs."""
        return self.devices != (CPU,)

    def latch(self) -> None:
        """Worker: remember that the quorum was reached; from then on only the floor counts."""
        if self.readiness().ready:
            self.board.header.was_ready = 1

    def readiness(self, records: list[SlotRecord] | None = None) -> Readiness:
        """Worker: decide whether the service is ready."""
        header, settings = self.board.header, self.settings
        policy = Policy(header.target, settings.ready_quorum, settings.ready_floor, settings.boot_attempts)
        return aggregate(
            self.board.records() if records is None else records,
            policy,
            now(),
            was_ready=bool(header.was_ready),
            stopping=bool(header.stopping),
        )


def _load_permits(settings: Settings, devices: tuple[str, ...]) -> dict[str, Permits]:
    """Return permits by device: one for each GPU, else one pool for all."""
    if settings.concurrent_loads or devices == (CPU,):
        pool = Permits("load", settings.concurrent_loads or len(os.sched_getaffinity(0)))
        return dict.fromkeys(devices, pool)
    return {device: Permits(f"load-{device}", 1) for device in devices}
