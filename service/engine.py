# SPDX-License-Identifier: Apache-2.0
"""The journey of a request: permit, tokenise, wait for a batch, compute, reply. Worker, event loop.

permit (else 429) ── tokenise ── queue ── batch, forward (service.inference) ── rows ── reply ── permit back
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from service.admission import Admission
from service.backends.base import Cut
from service.errors import DeadlineError, InvalidRequestError
from service.inference import Inference
from service.passes import BatchObserver, Passes
from service.tickets import Entry, Ticket
from service.token_budget import TokenBudget
from service.trail import journey

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from concurrent.futures import Executor
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from service.backends.base import Backend, Encoding, Input, Token

A = TypeVar("A")
T = TypeVar("T")
INLINE_CHARACTERS = 2_000
"""Tokenised on the event loop: it takes less than the hop to a thread and back."""


@dataclass(frozen=True)
class Limits:
    """What a worker takes on.

    Attributes:
        max_batch_tokens: tokens computed in one forward pass.
        max_batch_texts: texts in one forward pass.
        max_concurrent_texts: texts admitted and not answered.
        max_client_batch_size: texts of one request.
        auto_truncate: whether too long texts are cut unless the request says otherwise.
        forward_timeout_s: seconds one forward pass may take.
        request_timeout_s: seconds one request may take.
    """

    max_batch_tokens: int
    max_batch_texts: int
    max_concurrent_texts: int
    max_client_batch_size: int
    auto_truncate: bool
    forward_timeout_s: float
    request_timeout_s: float


class Deadline(NamedTuple):
    """When the time of a request is up.

    Attributes:
        limit_s: seconds that it may take.
        at: when they are over, by the event loop's clock.
    """

    limit_s: float
    at: float


@dataclass(frozen=True)
class Job:
    """What a request wants of the model.

    Attributes:
        inputs: texts, pairs or token ids; not empty.
        truncate: cut inputs that are too long; None takes the setting.
        from_left: cut at the beginning instead of the end.
        prompt: put before each text.
        token_vectors: a vector for each token instead of one for each text.
        deadline: when the time is up, if it has begun to run; None: `request_timeout` from now on.
    """

    inputs: Sequence[Input]
    truncate: bool | None = None
    from_left: bool = False
    prompt: str = ""
    token_vectors: bool = False
    deadline: Deadline | None = None


@dataclass
class Times:
    """Seconds that a request spent in each stage, in the order of its journey."""

    tokenize: float = 0.0
    queue: float = 0.0
    forward: float = 0.0

    def server_timing(self) -> str:
        """Return the value of the `Server-Timing` header, in milliseconds."""
        return ", ".join(f"{name};dur={seconds * 1e3:.3f}" for name, seconds in vars(self).items())


@dataclass(frozen=True)
class Result:
    """What the model gave.

    Attributes:
        rows: one float32 array an input, in order: of shape (width,), or (tokens, hidden) for token vectors.
        times: where time went.
        tokens: of each input, specials included.
    """

    rows: list[NDArray[np.float32]]
    times: Times
    tokens: list[int]


class Observer(BatchObserver):
    """Told what the engine does. Subclass and override; a method may be called often and must be cheap."""

    def embedded(self, texts: int, tokens: int, times: Times) -> None:
        """A request was computed."""

    def encoded(self, seconds: float) -> None:
        """A reply was put into bytes."""

    def rejected(self, texts: int) -> None:
        """A request was refused because the worker is full."""

    def dropped(self, reason: str, texts: int) -> None:
        """A request ended before its rows were there: its client left, or its time was up."""


class Engine:
    """One model copy behind an awaitable call."""

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        *,
        observer: Observer | None = None,
        watchdog: Callable[[float], AbstractContextManager[None]] = lambda _seconds: nullcontext(),
        device_lost: Callable[[str], None] = lambda _message: None,
        worn_out: Callable[[str], None] = lambda _message: None,
    ) -> None:
        """Serve a backend that is loaded, placed and warm; `start` it on the thread that owns the model.

        Args:
            backend: the model.
            limits: what to take on.
            observer: told what happens.
            watchdog: guards a forward pass with a deadline; see service.watchdog.
            device_lost: called once, when this process can compute no more; requests get 503 from then on.
            worn_out: called when this process should make room for a fresh one, when convenient.
        """
        self.backend, self.limits = backend, limits
        self._observer = observer or Observer()
        self.admission = Admission(
            limits.max_concurrent_texts, limits.max_client_batch_size, self._observer.rejected
        )
        self.budget = TokenBudget(limits.max_batch_tokens, backend.max_tokens)
        self._passes = Passes(
            backend,
            self.budget,
            limits.forward_timeout_s,
            observer=self._observer,
            watchdog=watchdog,
            worn_out=worn_out,
            drained=self.admission.drained,
        )
        self.inference = Inference(self._passes, limits.max_batch_texts, device_lost)
        self._tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._lookup_thread = ThreadPoolExecutor(1, thread_name_prefix="lookup")

    def start(self, model_thread: Executor) -> None:
        """Begin to compute, on the one thread that may touch the model; it is taken until `close`."""
        model_thread.submit(self.inference.run)  # raises nothing: see there

    def close(self) -> None:
        """Let the threads end; what runs is not waited for."""
        self.inference.close()
        for thread in (self._tokenizer_thread, self._lookup_thread):
            thread.shutdown(wait=False, cancel_futures=True)

    @property
    def observer(self) -> Observer:
        """Whoever is told what happens; may be exchanged, for what shall not be counted."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        self._observer = self._passes.observer = observer
        self.admission.rejected = observer.rejected

    @property
    def extra_load(self) -> int:
        """Texts admitted beyond one a request."""
        return self.admission.extra_load

    def deadline(self, timeout_s: float | None = None) -> Deadline:
        """Let the time of a request run: `request_timeout`, or less if its client waits for less."""
        limit_s = self.limits.request_timeout_s
        if timeout_s is not None:
            limit_s = min(timeout_s, limit_s)
        return Deadline(limit_s, asyncio.get_running_loop().time() + limit_s)

    async def run(self, job: Job) -> Result:
        """Admit a request and compute its rows; the permits return with them. Raises what those raise."""
        with self.admission.permit(len(job.inputs)):
            return await self.compute(job)

    async def compute(self, job: Job) -> Result:
        """Compute the rows of a request that was admitted.

        Raises:
            InvalidRequestError: an input is too long and may not be cut, or has an unknown token id.
            DeadlineError: the time is up.
            InferenceError: the forward pass failed.
            NotReadyError: the device failed; another worker, or this one later, can serve.
        """
        return await self._in_time(self._compute(job), len(job.inputs), job.deadline)

    async def tokens(
        self,
        texts: Sequence[str],
        write: Callable[[list[Token]], T],
        *,
        specials: bool,
        prompt: str = "",
        deadline: Deadline | None = None,
    ) -> list[T]:
        """Return what `write` makes of the tokens of each text; those of all at once would fill the memory.

        Raises:
            DeadlineError: the time is up.
        """

        def one(text: str) -> T:
            return write(self.backend.tokens([text], specials=specials, prompt=prompt)[0])

        return await self._look_up(one, texts, deadline)

    async def decode(
        self, ids: Sequence[Sequence[int]], *, skip_specials: bool, deadline: Deadline | None = None
    ) -> list[str]:
        """Return the text behind each list of token ids.

        Raises:
            InvalidRequestError: an id is not in the vocabulary.
            DeadlineError: the time is up.
        """
        self._check_ids(ids)

        def one(row: Sequence[int]) -> str:
            return self.backend.decode([row], skip_specials=skip_specials)[0]

        return await self._look_up(one, ids, deadline)

    async def _look_up(self, one: Callable[[A], T], items: Sequence[A], deadline: Deadline | None) -> list[T]:
        """Ask the tokeniser about one item after another, for one request at a time.

        In a thread of its own: megabytes take seconds, and texts to embed must not wait for them.
        """
        wanted = True

        def work() -> list[T]:
            return [one(item) for item in items if wanted]

        try:
            return await self._in_time(_in_thread(self._lookup_thread, work), len(items), deadline)
        finally:
            wanted = False  # a thread cannot be cancelled, but need not go on

    async def _in_time(self, work: Coroutine[None, None, T], texts: int, deadline: Deadline | None) -> T:
        """Wait for the work of an admitted request until its time is up, or its client gone."""
        limit_s, at = deadline or self.deadline()
        try:
            async with asyncio.timeout_at(at):
                return await work
        except TimeoutError:
            self.observer.dropped("deadline", texts)
            msg = f"not done within {limit_s:g} s; send less at once, or allow more (request_timeout)"
            raise DeadlineError(msg) from None
        except asyncio.CancelledError:
            self.observer.dropped("abandoned", texts)
            raise

    async def _compute(self, job: Job) -> Result:
        began, traced = time.perf_counter(), journey()
        if traced is not None:
            traced.tokenizing, traced.texts = began, len(job.inputs)
        encodings = await self._tokenize(job)
        queued = time.perf_counter()
        if traced is not None:
            traced.queued, traced.tokens = queued, sum(map(len, encodings))
        ticket = await self._infer(encodings, job)
        if ticket.error is not None:
            raise ticket.error.with_traceback(None)  # requests that failed together share it
        times = Times(queued - began, ticket.began - queued, ticket.ended - ticket.began)
        result = Result(
            [row for row in ticket.rows if row is not None], times, [len(encoding) for encoding in encodings]
        )
        self.observer.embedded(len(encodings), sum(result.tokens), times)
        return result

    async def _tokenize(self, job: Job) -> list[Encoding]:
        """Tokenise; a little on the event loop, much in the tokeniser thread, which needs no GIL."""
        truncate = self.limits.auto_truncate if job.truncate is None else job.truncate
        cut = Cut.REFUSE if not truncate else Cut.LEFT if job.from_left else Cut.RIGHT
        self._check_ids(job.inputs)
        tokenize = partial(self.backend.tokenize, job.inputs, cut=cut, prompt=job.prompt)
        size = sum(
            len(text) if isinstance(text, str) else sum(map(len, text)) if isinstance(text, tuple) else 0
            for text in job.inputs
        )
        encodings = (
            tokenize()
            if size + len(job.prompt) * len(job.inputs) <= INLINE_CHARACTERS
            else await _in_thread(self._tokenizer_thread, tokenize)
        )
        limit = self.backend.max_tokens
        for index, encoding in enumerate(encodings):
            if len(encoding) > limit:
                msg = f"inputs.{index}: more tokens than the limit of {limit}; cut it, or set truncate"
                raise InvalidRequestError(msg)
        return encodings

    def _check_ids(self, inputs: Sequence[Input | Sequence[int]]) -> None:
        vocabulary = self.backend.vocabulary
        for index, ids in enumerate(inputs):
            if isinstance(ids, (str, tuple)):
                continue
            wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
            if wrong is not None:
                msg = f"inputs.{index}: token id {wrong} is not in the vocabulary of {vocabulary}"
                raise InvalidRequestError(msg)

    async def _infer(self, encodings: Sequence[Encoding], job: Job) -> Ticket:
        """Queue the texts, and wait until the last of them is computed."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def notify(_: Ticket) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_finish, done)

        ticket = Ticket(len(encodings), notify)
        self.inference.put(
            [
                Entry(encoding, ticket, index, (job.token_vectors, encoding.prompt_tokens), job.token_vectors)
                for index, encoding in enumerate(encodings)
            ]
        )
        try:
            await done
        except asyncio.CancelledError:
            ticket.abandoned = True  # what is being computed has nobody to go to
            self.inference.discard(ticket)
            raise
        finally:
            if ticket.trail is not None and (traced := ticket.trail.journey) is not None:
                traced.launched, traced.landed = ticket.began, ticket.ended
        return ticket


async def _in_thread(thread: Executor, work: Callable[[], T]) -> T:
    """Work in a thread for the current request: what it logs there has the request's ids."""
    return await asyncio.get_running_loop().run_in_executor(thread, copy_context().run, work)


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
