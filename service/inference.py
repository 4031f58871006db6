# SPDX-License-Identifier: Apache-2.0
"""The thread that owns the model: takes batches, computes them, hands the rows back. Worker, model thread.

    queue ── take ── collate ── launch ──► device
                                             │   the next batch is launched while this one computes
    requests ◄── deliver ◄── rows ◄──────────┘

On a CPU `launch` computes, so a batch is delivered before the next is taken. On a GPU two may be under way:
one computes, and what arrives meanwhile is launched behind it, so that the device need not wait for Python.

Whatever goes wrong, no request waits for ever: a batch that fails is computed in parts, and fails for the
request at fault alone; a device that fails, or a bug in this loop, ends the loop, every request in it,
and soon the process.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.batching import Batcher, BatchLimits
from service.errors import DeviceLostError, NotReadyError
from service.logging import get
from service.passes import without_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from service.errors import RequestError
    from service.passes import Flight, Passes
    from service.tickets import Entry, Ticket

LOG = get()
DEPTH = 2
"""Batches under way at once on a device that computes by itself."""
LOOK_S = 0.0005
"""Between two looks at such a device while nothing is queued."""


@dataclass
class Inference:
    """The queue and the loop that empties it.

    Attributes:
        passes: computes the batches.
        max_batch_texts: texts that a pass may have.
        device_lost: called once, when this process can compute no more.
    """

    passes: Passes
    max_batch_texts: int
    device_lost: Callable[[str], None]
    _queue: Batcher[Entry] = field(default_factory=Batcher)
    _taken: list[list[Entry]] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closed: bool = False
    _end: RequestError | None = None

    # Event loop

    def put(self, entries: Sequence[Entry]) -> None:
        """Let the texts of a request wait for a batch."""
        with self._changed:
            if self._end is None:
                self._queue.add(entries)
                self._changed.notify()
                return
        entries[0].owner.fail(self._end)

    def discard(self, ticket: Ticket) -> int:
        """Drop what waits of a request, and return how many texts that was."""
        with self._changed:
            return self._queue.discard(ticket)

    def close(self) -> None:
        """Let the loop end; what is under way is not waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def under_way(self) -> int:
        """Batches taken and not delivered."""
        return len(self._taken)

    @property
    def queued(self) -> tuple[int, int]:
        """Texts and tokens that wait."""
        return len(self._queue), self._queue.tokens

    # Model thread

    def run(self) -> None:
        """Compute batches until closed, or until this process can compute no more.

        Nothing is raised: nobody would see it, and the worker would look alive and serve nobody.
        """
        problem: str | None = None
        why = "this worker is leaving"
        try:
            self._compute()
        except DeviceLostError as error:
            problem = str(error)
            why = f"the device failed: {problem}"
        except BaseException as error:
            LOG.critical("the model thread failed", exc_info=error)
            problem = f"the model thread failed: {type(error).__name__}: {error}"
            why = f"the model thread failed: {type(error).__name__}; the log has more"
        try:
            if problem is not None:
                self.device_lost(problem)
        finally:
            self._fail_all(NotReadyError(why, retry_after_s=1))

    def _compute(self) -> None:
        flights: deque[Flight] = deque()
        while True:
            entries = self._take(flights[0] if flights else None)
            if entries is None:
                return
            if entries:
                self._start(entries, flights)
            if flights and (not entries or len(flights) >= DEPTH or flights[0].pending.done()):
                self._finish(flights.popleft())

    def _take(self, flight: Flight | None) -> list[Entry] | None:
        """Wait for a batch, but no longer than the device computes; then it is empty. None once closed."""
        with self._changed:
            while not self._queue and not self._closed and not (flight and self._is_due(flight)):
                self._changed.wait(LOOK_S if flight else None)
            if self._closed:
                return None
            limits = BatchLimits(self.passes.room(), self.max_batch_texts, self.passes.backend.padded)
            batch = self._queue.take(limits)
            if batch:
                self._taken.append(batch)
            return batch

    def _is_due(self, flight: Flight) -> bool:
        """Say whether a batch is there, or late: the watchdog guards the wait for its rows alone."""
        late = time.perf_counter() - flight.began > self.passes.forward_timeout_s
        return late or flight.pending.done()

    def _start(self, entries: list[Entry], flights: deque[Flight]) -> None:
        """Launch a batch; where that fails, settle it at once."""
        began = time.perf_counter()
        for entry in entries:
            entry.owner.began = entry.owner.began or began
        try:
            flight = self.passes.launch(entries)
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises
            problem = without_frames(error)
        else:
            flights.append(flight)
            return
        self.passes.settle(entries, problem)
        self._settled(entries)

    def _finish(self, flight: Flight) -> None:
        """Wait for a batch and deliver its rows; where that fails, settle it."""
        problem = self.passes.land(flight)
        if problem is not None:
            self.passes.settle(flight.entries, problem)
        self._settled(flight.entries)

    def _settled(self, entries: list[Entry]) -> None:
        """Forget a batch, and what else waits of the requests that failed with it."""
        self._taken = [batch for batch in self._taken if batch is not entries]
        for ticket in dict.fromkeys(entry.owner for entry in entries if entry.owner.error is not None):
            self.discard(ticket)

    def _fail_all(self, error: RequestError) -> None:
        """End every request that is here, and those that still come."""
        with self._changed:
            self._end = error
            entries = [entry for batch in (*self._taken, self._queue.clear()) for entry in batch]
            self._taken = []
        for entry in entries:
            entry.owner.fail(error)
