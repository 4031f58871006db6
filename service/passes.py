# SPDX-License-Identifier: Apache-2.0
"""A pass of the model: launch a batch, wait for its rows; if it fails, compute it in parts. Model thread.

A batch that was out of memory is halved, and later ones are smaller for a while. Any other that fails is
computed request by request, so that the one at fault fails alone; unless a harmless text fails too.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.backends.base import PROBE_WORD, Cut, forward
from service.errors import DeviceLostError, InferenceError, NonFiniteError, NotReadyError, OutOfMemoryError
from service.logging import get
from service.tickets import alive, by_request, deliver, halves
from service.trail import followed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from service.backends.base import Backend, Pending
    from service.errors import RequestError
    from service.tickets import Entry
    from service.token_budget import TokenBudget
    from service.trail import Trail

LOG = get()
REPEATS = 3
"""Requests in a row that fail alike before a harmless text is tried."""


class BatchObserver:
    """Told on the model thread what becomes of batches. Subclass and override; must be cheap."""

    def passed(
        self, entries: Sequence[Entry], began: float, ended: float, error: Exception | None = None
    ) -> None:
        """A pass with these texts was launched and has ended, by `time.perf_counter`, or has failed."""

    def batch(self, texts: int, tokens: int, computed: int, seconds: float) -> None:
        """A pass took so long for so many texts and tokens; `computed` counts padding too."""

    def out_of_memory(self, budget: int) -> None:
        """The device had no room; passes have at most `budget` tokens from now on."""

    def recovered(self, budget: int) -> None:
        """There was no trouble for a while; passes have at most `budget` tokens, more than before."""


@dataclass
class Flight:
    """A batch on the device."""

    entries: list[Entry]
    pending: Pending
    texts: int
    tokens: int
    began: float


@dataclass
class Passes:
    """Computes batches.

    Attributes:
        backend: placed and warm.
        budget: tokens that a pass may have.
        forward_timeout_s: seconds that a pass may take, guarded by `watchdog`.
        observer: told of each pass.
        worn_out: called when the device has no room even for the smallest batch, again and again.
        drained: told how long a batch took, by texts and seconds.
    """

    backend: Backend
    budget: TokenBudget
    forward_timeout_s: float
    observer: BatchObserver
    watchdog: Callable[[float], AbstractContextManager[None]]
    worn_out: Callable[[str], None]
    drained: Callable[[int, float], None]
    _landed_at: float = field(default=0.0, init=False)

    def room(self) -> int:
        """Return the tokens that the next pass may have."""
        if self.budget.recover(time.monotonic()):
            self.observer.recovered(self.budget.now)
        return self.budget.now

    def launch(self, entries: list[Entry]) -> Flight:
        """Give a batch to the device; raises whatever the model's code raises."""
        began = time.perf_counter()
        try:
            with self.watchdog(self.forward_timeout_s):
                batch = self.backend.collate(
                    [entry.encoding for entry in entries], token_vectors=entries[0].token_vectors
                )
                return Flight(entries, self.backend.launch(batch), batch.texts, batch.tokens, began)
        except Exception as error:
            self.observer.passed(entries, began, time.perf_counter(), error)
            raise

    def land(self, flight: Flight) -> Exception | None:
        """Wait for a batch and deliver its rows, or return what is wrong with it."""
        entries = flight.entries
        tokens = sum(entry.length for entry in entries)
        try:
            with self.watchdog(self.forward_timeout_s):
                rows = flight.pending.rows()
            _check(rows, tokens if entries[0].token_vectors else len(entries))
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises
            self.observer.passed(entries, flight.began, time.perf_counter(), error)
            return without_frames(error)
        free_since, self._landed_at = self._landed_at, time.perf_counter()
        seconds = self._landed_at - max(flight.began, free_since)  # not those behind the batch before it
        self.drained(flight.texts, seconds)
        self.observer.batch(flight.texts, tokens, flight.tokens, seconds)
        self.observer.passed(entries, flight.began, self._landed_at)
        deliver(entries, rows)
        return None

    def settle(self, entries: list[Entry], error: Exception) -> None:
        """Compute a failed batch in parts, so that each request fails for itself alone.

        Raises:
            DeviceLostError: nothing more can be computed.
        """
        work = deque([(entries, error)])
        bugs = _Bugs()
        try:
            while work:
                part, problem = work.popleft()
                if isinstance(problem, DeviceLostError):
                    raise problem
                if isinstance(problem, OutOfMemoryError):
                    self._shrink(part, problem)
                pieces = halves(part) if isinstance(problem, OutOfMemoryError) else by_request(part)
                if len(pieces) > 1:
                    work.extend(self._in_parts(pieces))
                    continue
                if _is_bug(problem):
                    bugs.add(problem, part[0].owner.trail)
                _fail(part, self._verdict(problem))
        finally:
            bugs.log()

    def _in_parts(self, pieces: list[list[Entry]]) -> list[tuple[list[Entry], Exception]]:
        """Compute the parts of a failed batch one by one; return those that fail again, and why.

        Once some in a row fail alike, and a harmless text does too, the others are not computed: each
        would take a pass to fail the same way.
        """
        failed: list[tuple[list[Entry], Exception]] = []
        left = deque(pieces)
        last: Exception | None = None
        repeats = 0
        while left:
            piece = alive(left.popleft())
            if not piece:
                continue
            failure = self._retry(piece)
            if failure is not None:
                failed.append((piece, failure))
                repeats = repeats + 1 if last is not None and _alike(failure, last) else 1
            last = failure
            if failure is not None and repeats == REPEATS and self._always(failure, piece[0]):
                return failed + [(other, failure) for other in left]
        return failed

    def _always(self, failure: Exception, like: Entry) -> bool:
        """Say whether a harmless text fails in the way in which some requests did."""
        return _is_bug(failure) and type(self._probe(token_vectors=like.token_vectors)) is type(failure)

    def _retry(self, entries: list[Entry]) -> Exception | None:
        """Compute a part of a failed batch; return what is wrong with it."""
        try:
            flight = self.launch(entries)
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises
            return without_frames(error)
        return self.land(flight)

    def _shrink(self, entries: list[Entry], problem: OutOfMemoryError) -> None:
        """Give cached memory back, and let later batches be smaller."""
        self.backend.trim()
        lengths = [entry.length for entry in entries]
        tokens = max(lengths) * len(lengths) if self.backend.padded else sum(lengths)
        worn_out = self.budget.shrink(tokens, time.monotonic())
        LOG.warning(
            "out of memory in a pass of %d tokens; passes have at most %d for now: %s",
            tokens,
            self.budget.now,
            problem,
        )
        self.observer.out_of_memory(self.budget.now)
        if worn_out:
            self.worn_out(f"out of memory again and again: {problem}")

    def _verdict(self, problem: Exception) -> RequestError:
        """Say what a request gets whose texts fail by themselves.

        Not in the words of the model's code, which may name paths and shapes: those are in the log.

        Raises:
            DeviceLostError: not its texts are at fault.
        """
        if isinstance(problem, OutOfMemoryError):
            return NotReadyError("no memory for this request on the device", retry_after_s=1)
        if isinstance(problem, NonFiniteError):
            if not self._computes():
                raise DeviceLostError(f"{problem}, for any text")
            return InferenceError(f"{problem} for a text of this request")
        return InferenceError(f"the model failed on this request: {type(problem).__name__}; the log has more")

    def _computes(self) -> bool:
        """Say whether the model still gives numbers for a harmless text: else the device is at fault.

        A device without room for the text proves nothing: its memory may be full of something else.
        """
        problem = self._probe()
        return problem is None or isinstance(problem, OutOfMemoryError)

    def _probe(self, *, token_vectors: bool = False) -> Exception | None:
        """Compute a harmless text; return what is wrong with it."""
        try:
            with self.watchdog(self.forward_timeout_s):
                texts = self.backend.tokenize([PROBE_WORD], cut=Cut.RIGHT)
                batch = self.backend.collate(texts, token_vectors=token_vectors)
                _check(forward(self.backend, batch), len(texts[0]) if token_vectors else 1)
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises
            return without_frames(error)
        return None


class _Bugs:
    """What the model's code raised for the requests of one batch: told once, not once a request."""

    def __init__(self) -> None:
        self._found: dict[tuple[type, str], tuple[Exception, list[Trail | None]]] = {}

    def add(self, problem: Exception, trail: Trail | None) -> None:
        """Count a request that ends with this."""
        _, trails = self._found.setdefault((type(problem), str(problem)), (problem, []))
        trails.append(trail)

    def log(self) -> None:
        """Log each with its text, its traceback and the number of requests; of a single one with its ids."""
        for problem, trails in self._found.values():
            with followed(trails[0] if len(trails) == 1 else None):
                LOG.error("a forward pass failed for %d of its requests", len(trails), exc_info=problem)


def _is_bug(problem: Exception) -> bool:
    return not isinstance(problem, (OutOfMemoryError, NonFiniteError, DeviceLostError))


def _alike(one: Exception, other: Exception) -> bool:
    return type(one) is type(other) and str(one) == str(other)


def _fail(entries: list[Entry], error: RequestError) -> None:
    for ticket in dict.fromkeys(entry.owner for entry in entries):
        ticket.fail(error)


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


def without_frames(error: Exception) -> Exception:
    """Free what an out-of-memory error holds: the tensors in its frames, which `trim` is to give back."""
    if isinstance(error, OutOfMemoryError):
        error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
