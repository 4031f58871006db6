# SPDX-License-Identifier: Apache-2.0
"""What a READY worker does beside serving: watch its memory, resize the fleet, keep measurements. Worker."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING

from service.boot import measure
from service.growth import step
from service.learned import ShapeHistogram
from service.lifecycle import Failure, State
from service.logging import get
from service.planner import outgrown

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.backends.base import Backend
    from service.fleet import Fleet

LOG = get()
MEASURE_S = 15.0
LEARN_S = 600.0
ASK_S = 30.0
"""An arbiter that is busy has not lost the signal: two for one step would be one wish of a person's. It hears
none before it has forked all first workers."""


class Upkeep:
    """One worker's part in the fleet's household. `tick` is called at every beat and does not block."""

    def __init__(
        self,
        fleet: Fleet,
        slot: int,
        *,
        in_thread: Callable[[Callable[[], None]], object],
        worn_out: Callable[[str, Failure], None],
        time: float,
    ) -> None:
        """Begin at a time; what blocks is run `in_thread`."""
        self._fleet, self._slot, self._in_thread, self._worn_out = fleet, slot, in_thread, worn_out
        self._measured = self._learned = time
        self._grown, self._arbiter = False, os.getppid()
        self.shapes = ShapeHistogram()

    def tick(self, time: float, backend: Backend) -> None:
        """Do what is due."""
        if time - self._measured >= MEASURE_S:
            self._measured = time
            self._in_thread(partial(self._measure, backend))
        if time - self._learned >= LEARN_S:
            self._learned = time
            self._in_thread(self.learn)
        self._resize(time)
        self._keep_once(time)

    def learn(self) -> None:
        """Thread: hand the shapes of this worker's passes to the manifest."""
        if self._fleet.settings.learn_shapes:
            self._fleet.recall.learn(self.shapes)

    def _measure(self, backend: Backend) -> None:
        """Thread: read this process's memory, and wear out if it has grown beyond its share of the budget."""
        measure(self._fleet, self._slot, backend)
        if not self._grown and (problem := outgrown(self._fleet, self._slot)):
            self._grown = True
            self._worn_out(problem, Failure.GREW)

    def waits_for_replacement(self) -> bool:
        """Say whether this worn-out worker shall stay until another one has been added to take its place.

        With room for one more the fleet surges by one, and shrinks again once this worker drains or is dead.
        """
        fleet, target, numbers = self._fleet, self._fleet.board.header.target, self._fleet.ledger.numbers
        has_room = 0 < numbers.planned < numbers.fits
        if numbers.surge == self._slot + 1:
            if target <= numbers.planned and has_room:
                return True
            if not has_room:
                numbers.surge = 0
                fleet.roll_permit.release(0)
            return False
        if numbers.surge or not has_room or target != numbers.planned:
            return False
        if fleet.roll_permit.try_acquire() is None:
            return False
        numbers.surge = self._slot + 1
        LOG.info("a replacement comes first: %d workers fit", numbers.fits)
        return True

    def take_leave(self) -> None:
        """Draining: the fleet is to be as large again as before the replacement."""
        if self._fleet.ledger.numbers.surge == self._slot + 1:
            self._fleet.ledger.numbers.surge = 0

    def _resize(self, time: float) -> None:
        """Ask the arbiter for a worker more or fewer, while the number is not the planned one."""
        board, numbers = self._fleet.board, self._fleet.ledger.numbers
        target = board.header.target
        goal = numbers.planned + (numbers.surge > 0)
        if board.header.stopping or not numbers.planned or goal == target:
            return
        if target == numbers.asked_of and time - numbers.asked_at < ASK_S:
            return
        change = step(
            board.records(),
            self._slot,
            target=target,
            planned=goal,
            loads=self._fleet.concurrent_loads,
        )
        if change:
            numbers.asked_at, numbers.asked_of = time, target  # for all: a lower slot may be READY next
        if change > 0:
            self._signal(signal.SIGTTIN)
        elif change < 0:
            self._signal(signal.SIGTTOU)

    def _signal(self, signum: signal.Signals) -> None:
        """Tell the arbiter; when it is gone, the process that has adopted this one is told nothing."""
        if os.getppid() == self._arbiter:
            os.kill(self._arbiter, signum)

    def _keep_once(self, time: float) -> None:
        """Keep what the boot measured for the next one, once every planned worker is ready."""
        board, numbers = self._fleet.board, self._fleet.ledger.numbers
        if numbers.kept or numbers.planned != board.header.target:
            return
        peers = board.peers(without=self._slot)  # some microseconds: this is asked at every beat of a boot
        if len(peers) + 1 < numbers.planned or any(peer.state is not State.READY for peer in peers):
            return
        if entry := self._fleet.ledger.read():
            numbers.kept = 1  # two at once do no harm
            live = [record for record in board.records() if record.live]
            seconds = time - board.header.started
            self._in_thread(partial(self._fleet.recall.keep, live, entry.cost, boot_seconds=seconds))
