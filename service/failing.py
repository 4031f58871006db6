# SPDX-License-Identifier: Apache-2.0
"""What a worker does that cannot become ready: make way for the next try, or stay and tell. Worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn

from service.errors import BudgetError, WarmfleetError
from service.lifecycle import Failure, State
from service.logging import get
from service.scoreboard import now
from service.slots import device_is_dead, halt_is_due

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.fleet import Fleet

LOG = get()
POLL_S = 0.1
TRY_AGAIN = 1
BOOT_ERROR = 3
"""Gunicorn halts its arbiter when a worker exits so. Two such exits would break the halt itself."""


class Failing:
    """One slot's way of failing. Each method that ends the process does so by `leave(exit_code)`."""

    def __init__(self, fleet: Fleet, slot: int, leave: Callable[[int], NoReturn]) -> None:
        self._fleet, self._board, self._slot, self._leave = fleet, fleet.board, slot, leave

    @property
    def has_given_up(self) -> bool:
        """Whether another boot would be one too many: of this slot at first boot, or on this device."""
        row = self._board.rows[self._slot]
        tried_enough = row.failures >= self._fleet.settings.boot_attempts
        return (tried_enough and not self._board.header.ever_ready) or self._device_is_dead()

    async def explain(self, error: BaseException) -> NoReturn:
        """Leave the reason on the scoreboard; exit for the next try, or park if this was the last."""
        board, settings = self._board, self._fleet.settings
        expected = isinstance(error, WarmfleetError)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        LOG.error("the boot failed: %s", text, exc_info=None if expected else error)
        warming = board.rows[self._slot].state == State.WARMING
        hopeless = isinstance(error, BudgetError)
        reason = Failure.BUDGET if hopeless else Failure.WARMUP if warming else Failure.LOAD
        board.fail(self._slot, reason, text)
        tries_left = board.rows[self._slot].failures + 1 < settings.boot_attempts
        if board.header.ever_ready or (tries_left and not hopeless):
            self._leave(TRY_AGAIN)
        await self.park()

    async def park(self) -> NoReturn:
        """FAILED: answer probes with the reason, until another try makes sense or nobody tries any more."""
        board, header, row = self._board, self._board.header, self._board.rows[self._slot]
        if row.exit_reason:  # count it now: leaving later is no failure
            row.by_reason[row.exit_reason - 1] += 1
            row.failures += 1
            row.exit_reason = 0
        board.enter(self._slot, State.FAILED, now())
        LOG.error("giving up on slot %d: %s", self._slot, board.record(self._slot).error)
        while True:
            asked = row.epoch < header.roll_epoch
            if halt_is_due(board.records(), target=header.target, ever_ready=bool(header.ever_ready)):
                self._halt_once()
            elif asked or (header.ever_ready and not self._device_is_dead()):
                board.enter(self._slot, State.DRAINING, now())
                self._leave(0)
            await asyncio.sleep(POLL_S)

    def _halt_once(self) -> None:
        """Halt the arbiter, if no other worker has begun to."""
        header = self._board.header
        if self._fleet.halt_permit.try_acquire() is not None and not header.halting:
            header.halting = 1
            LOG.critical("no worker can become ready; stopping: %s", self._board.record(self._slot).error)
            self._leave(BOOT_ERROR)

    def _device_is_dead(self) -> bool:
        records = self._board.records()
        return device_is_dead(records, self._board.record(self._slot).device)
