# SPDX-License-Identifier: Apache-2.0
"""The thread that owns the model: takes batches, computes them, hands the rows back. Worker, model thread.

    queue ── take ── collate ── launch ──► device
                                             │   the next batch is launched while this one computes
    requests ◄── deliver ◄── rows ◄──────────┘

On a CPU `launch` computes, so a batch is delivered before the next is taken. On a GPU two are under way:
one computes, one waits behind it on the device, which thus never waits for Python.

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

from service.backends.base import forward
from service.batching import Batcher, BatchLimits
from service.errors import (
    DeviceLostError,
    InferenceError,
    NonFiniteError,
    NotReadyError,
    OutOfMemoryError,
    RequestError,
)
from service.logging import get
from service.tickets import alive, by_request, deliver, halves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from service.backends.base import Backend, Pending
    from service.tickets import Entry, Ticket
    from service.token_budget import TokenBudget

LOG = get()
DEPTH = 2
"""Batches under way at once on a device that computes by itself."""


class BatchObserver:
    """Told on the model thread what becomes of batches. Subclass and override; must be cheap."""

    def batch(self, texts: int, tokens: int, computed: int, seconds: float) -> None:
        """A pass took so long for so many texts and tokens; `computed` counts padding too."""

    def out_of_memory(self, budget: int) -> None:
        """The device had no room; passes have at most `budget` tokens from now on.

        Also told when a while without trouble lets the budget grow again.
        """


@dataclass
class _Flight:
    """A batch on the device."""

    entries: list[Entry]
    pending: Pending
    texts: int
    tokens: int
    began: float


@dataclass
class Inference:
    """The queue and the loop that empties it.

    Attributes:
        backend: placed and warm.
        budget: tokens that a pass may have.
        max_batch_texts: texts that a pass may have.
        forward_timeout_s: seconds that a pass may take, guarded by `watchdog`.
        device_lost: called once, when this process can compute no more.
        worn_out: called when the device has no room even for the smallest batch, again and again.
        drained: told how long a batch took, by texts and seconds.
    """

    backend: Backend
    budget: TokenBudget
    max_batch_texts: int
    forward_timeout_s: float
    observer: BatchObserver
    watchdog: Callable[[float], AbstractContextManager[None]]
    device_lost: Callable[[str], None]
    worn_out: Callable[[str], None]
    drained: Callable[[int, float], None]
    _queue: Batcher[Entry] = field(default_factory=Batcher)
    _taken: list[list[Entry]] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closed: bool = False
    _end: RequestError | None = None
    _computed_at: float = 0.0

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
            problem = why = f"the model thread failed: {type(error).__name__}: {error}"
        try:
            if problem is not None:
                self.device_lost(problem)
        finally:
            self._fail_all(NotReadyError(why, retry_after_s=1))

    def _compute(self) -> None:
        flights: deque[_Flight] = deque()
        while True:
            entries = self._take(wait=not flights)
            if entries is None:
                return
            if entries:
                self._start(entries, flights)
            if flights and (not entries or len(flights) >= DEPTH or flights[0].pending.done()):
                self._finish(flights.popleft())

    def _take(self, *, wait: bool) -> list[Entry] | None:
        """Return the next batch; without waiting maybe an empty one; None once closed."""
        with self._changed:
            while wait and not self._queue and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            if self.budget.recover(time.monotonic()):
                self.observer.out_of_memory(self.budget.now)
            limits = BatchLimits(self.budget.now, self.max_batch_texts, self.backend.padded)
            batch = self._queue.take(limits)
            if batch:
                self._taken.append(batch)
            return batch

    def _start(self, entries: list[Entry], flights: deque[_Flight]) -> None:
        """Launch a batch; where that fails, settle it at once."""
        began = time.perf_counter()
        for entry in entries:
            entry.owner.began = entry.owner.began or began
        try:
            flight = self._launch(entries)
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises
            problem = _without_frames(error)
        else:
            flights.append(flight)
            return
        self._settle(entries, problem)
        self._settled(entries)

    def _finish(self, flight: _Flight) -> None:
        """Wait for a batch and deliver its rows; where that fails, settle it."""
        problem = self._land(flight)
        if problem is not None:
            self._settle(flight.entries, problem)
        self._settled(flight.entries)

    def _settled(self, entries: list[Entry]) -> None:
        self._taken = [batch for batch in self._taken if batch is not entries]

    def _launch(self, entries: list[Entry]) -> _Flight:
        began = time.perf_counter()
        with self.watchdog(self.forward_timeout_s):
            batch = self.backend.collate(
                [entry.encoding for entry in entries], token_vectors=entries[0].token_vectors
            )
            return _Flight(entries, self.backend.launch(batch), batch.texts, batch.tokens, began)

    def _land(self, flight: _Flight) -> Exception | None:
        """Wait for a batch and deliver its rows, or return what is wrong with it."""
        entries = flight.entries
        tokens = sum(entry.length for entry in entries)
        try:
            with self.watchdog(self.forward_timeout_s):
                rows = flight.pending.rows()
            _check(rows, tokens if entries[0].token_vectors else len(entries))
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises
            return _without_frames(error)
        free_since, self._computed_at = self._computed_at, time.perf_counter()
        seconds = self._computed_at - max(flight.began, free_since)  # not those behind the batch before it
        self.drained(flight.texts, seconds)
        self.observer.batch(flight.texts, tokens, flight.tokens, seconds)
        deliver(entries, rows)
        return None

    # Trouble, model thread

    def _settle(self, entries: list[Entry], error: Exception) -> None:
        """Compute a failed batch in parts, so that each request fails for itself alone.

        Raises:
            DeviceLostError: nothing more can be computed.
        """
        work = deque([(entries, error)])
        while work:
            part, problem = work.popleft()
            if isinstance(problem, DeviceLostError):
                raise problem
            if isinstance(problem, OutOfMemoryError):
                self._shrink(part, problem)
            pieces = halves(part) if isinstance(problem, OutOfMemoryError) else by_request(part)
            if len(pieces) == 1:
                self._fail(part, self._verdict(problem))
                continue
            for piece in filter(None, map(alive, pieces)):
                failure = self._retry(piece)
                if failure is not None:
                    work.append((piece, failure))

    def _retry(self, entries: list[Entry]) -> Exception | None:
        """Compute a part of a failed batch; return what is wrong with it."""
        try:
            flight = self._launch(entries)
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises
            return _without_frames(error)
        return self._land(flight)

    def _shrink(self, entries: list[Entry], problem: OutOfMemoryError) -> None:
        """Give cached memory back, and let later batches be smaller."""
        self.backend.trim()
        lengths = [entry.length for entry in entries]
        tokens = max(lengths) * len(lengths) if self.backend.padded else sum(lengths)
        worn_out = self.budget.shrink(tokens, time.monotonic())
        LOG.warning(
            "out of memory in a pass of %d tokens; passes have at most %d for now", tokens, self.budget.now
        )
        self.observer.out_of_memory(self.budget.now)
        if worn_out:
            self.worn_out(f"out of memory again and again: {problem}")

    def _verdict(self, problem: Exception) -> RequestError:
        """Say what a request gets whose texts fail by themselves.

        Raises:
            DeviceLostError: not its texts are at fault.
        """
        if isinstance(problem, OutOfMemoryError):
            return NotReadyError(f"no memory for this request on the device: {problem}", retry_after_s=1)
        if isinstance(problem, NonFiniteError):
            if not self._computes():
                raise DeviceLostError(f"{problem}, for any text")
            return InferenceError(f"{problem} for a text of this request")
        LOG.error("a forward pass failed", exc_info=problem)
        return InferenceError(f"the model failed on this request: {type(problem).__name__}: {problem}")

    def _computes(self) -> bool:
        """Say whether the model still gives numbers for a harmless text: else the device is at fault."""
        from service.backends.base import PROBE_WORD, Cut

        try:
            with self.watchdog(self.forward_timeout_s):
                batch = self.backend.collate(self.backend.tokenize([PROBE_WORD], cut=Cut.RIGHT))
                _check(forward(self.backend, batch), 1)
        except Exception:  # noqa: BLE001 - whatever the model's code raises
            return False
        return True

    def _fail(self, entries: list[Entry], error: RequestError) -> None:
        """End the requests of these texts, and forget what else waits of them."""
        for ticket in dict.fromkeys(entry.owner for entry in entries):
            self.discard(ticket)
            ticket.fail(error)

    def _fail_all(self, error: RequestError) -> None:
        """End every request that is here, and those that still come."""
        with self._changed:
            self._end = error
            entries = [entry for batch in (*self._taken, self._queue.clear()) for entry in batch]
            self._taken = []
        for entry in entries:
            entry.owner.fail(error)


def _check(rows: NDArray[np.float32], expected: int) -> None:
    """Raise unless there are as many rows as expected, of numbers.

    Raises:
        ValueError: there are more or fewer.
        NonFiniteError: some are not finite.
    """
    import numpy as np  # not at the top: numpy starts threads, and the arbiter imports this module

    if len(rows) != expected:
        raise ValueError(f"{len(rows)} rows instead of {expected}")
    if not np.isfinite(rows).all():
        raise NonFiniteError("the model gives values that are not finite")


def _without_frames(error: Exception) -> Exception:
    """Free what an out-of-memory error holds: the tensors in its frames, which `trim` is to give back."""
    if isinstance(error, OutOfMemoryError):
        error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
