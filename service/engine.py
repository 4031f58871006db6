# SPDX-License-Identifier: Apache-2.0
"""From texts to vectors: permit, tokenise, cut, forward on the one model thread. Worker.

    embed ─ admit (else 429) ─ tokenise (tokeniser thread) ─ cut ─ collate, forward (model thread) ─ vectors

One thread owns the model: load, warm-up and every forward pass run on it.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.batching import cut
from service.errors import (
    DeviceLostError,
    InferenceError,
    InvalidRequestError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    TooLargeError,
)
from service.logging import get

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Executor

    import numpy as np
    from numpy.typing import NDArray

    from service.backends.base import Backend, Encoding

LOG = get()


@dataclass(frozen=True)
class Limits:
    """What a worker takes on.

    Attributes:
        max_batch_tokens: tokens of one forward pass, padding included.
        max_concurrent_texts: texts admitted and not answered.
        max_client_batch_size: texts of one request.
        auto_truncate: whether too long texts are cut unless the request says otherwise.
        forward_timeout_s: seconds one forward pass may take.
    """

    max_batch_tokens: int
    max_concurrent_texts: int
    max_client_batch_size: int
    auto_truncate: bool
    forward_timeout_s: float


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
class Embedded:
    """Vectors, float32 of shape (texts, dimension), in the order of the texts, and where time went."""

    vectors: NDArray[np.float32]
    times: Times
    tokens: int


class Observer:
    """Told what the engine does. Subclass and override; a method may be called often and must be cheap."""

    def embedded(self, texts: int, tokens: int, times: Times) -> None:
        """A request was computed."""

    def encoded(self, seconds: float) -> None:
        """A reply was put into bytes."""

    def rejected(self, texts: int) -> None:
        """A request was refused because the worker is full."""


@dataclass
class Engine:
    """One model copy behind an awaitable call.

    Attributes:
        backend: loaded, placed and warm.
        model_thread: the one thread that may touch the model.
        watchdog: guards a forward pass with a deadline; see service.watchdog.
        device_lost: called when the device can no longer be used by this process.
        texts: admitted and not answered.
        requests: the same, counted in requests.
        passes: requests on the model thread, 0 or 1; goes on when a request is cancelled.
    """

    backend: Backend
    limits: Limits
    model_thread: Executor
    observer: Observer = field(default_factory=Observer)
    watchdog: Callable[[float], AbstractContextManager[None]] = lambda _seconds: nullcontext()
    device_lost: Callable[[str], None] = lambda _message: None
    texts: int = 0
    requests: int = 0
    passes: int = 0
    _seconds_per_text: float = 0.0
    _tokenizer_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
    )

    @property
    def extra_load(self) -> int:
        """Texts admitted beyond one a request."""
        return self.texts - self.requests

    async def embed(self, texts: Sequence[str], *, truncate: bool | None = None) -> Embedded:
        """Compute the vectors of the texts.

        Args:
            texts: not empty.
            truncate: cut texts that are too long; None takes the setting.

        Raises:
            TooLargeError: more texts than one request may have, or than could ever be admitted.
            OverloadedError: no room now; says when to come back.
            InvalidRequestError: a text is too long and may not be cut.
            InferenceError: the forward pass failed.
            NotReadyError: the device failed; another worker, or this one later, can serve.
        """
        with self._admitted(len(texts)):
            times = Times()
            began = time.perf_counter()
            encodings = await self._tokenize(
                texts, self.limits.auto_truncate if truncate is None else truncate
            )
            queued = time.perf_counter()
            times.tokenize = queued - began
            loop = asyncio.get_running_loop()
            vectors = await loop.run_in_executor(self.model_thread, self._forward, encodings, times, queued)
            self._learn_rate(times.forward / len(texts))
            result = Embedded(vectors, times, sum(map(len, encodings)))
        self.observer.embedded(len(texts), result.tokens, times)
        return result

    def close(self) -> None:
        """Let the threads end; what runs is not waited for."""
        self._tokenizer_thread.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _admitted(self, texts: int) -> Iterator[None]:
        """Hold a permit for each text, or refuse in microseconds and without tokenising."""
        limits = self.limits
        if texts > limits.max_client_batch_size:
            msg = f"{texts} texts in one request; at most {limits.max_client_batch_size} are taken, split it"
            raise TooLargeError(msg)
        if texts > limits.max_concurrent_texts:
            msg = f"{texts} texts can never be admitted; at most {limits.max_concurrent_texts} are, split it"
            raise TooLargeError(msg)
        if self.texts + texts > limits.max_concurrent_texts:
            self.observer.rejected(texts)
            msg = f"{self.texts} texts are in work, of {limits.max_concurrent_texts} at most; try again later"
            raise OverloadedError(msg, retry_after_s=self.texts * self._seconds_per_text)
        self.texts += texts
        self.requests += 1
        try:
            yield
        finally:
            self.texts -= texts
            self.requests -= 1

    async def _tokenize(self, texts: Sequence[str], truncate: bool) -> list[Encoding]:  # noqa: FBT001 - internal
        loop = asyncio.get_running_loop()
        encodings = await loop.run_in_executor(
            self._tokenizer_thread, lambda: self.backend.tokenize(texts, truncate=truncate)
        )
        limit = self.backend.max_tokens
        for index, encoding in enumerate(encodings):
            if len(encoding) > limit:
                msg = f"inputs.{index}: {len(encoding)} tokens; the limit is {limit}, cut it or set truncate"
                raise InvalidRequestError(msg)
        return encodings

    def _forward(self, encodings: list[Encoding], times: Times, queued: float) -> NDArray[np.float32]:
        """Model thread: compute all batches of one request and put the rows back in order."""
        import numpy as np  # not at the top: numpy starts threads, and the arbiter imports this module

        began = time.perf_counter()
        times.queue = began - queued
        vectors = np.empty((len(encodings), self.backend.dimension), dtype=np.float32)
        self.passes += 1
        try:
            for indices in cut([len(encoding) for encoding in encodings], self.limits.max_batch_tokens):
                with self.watchdog(self.limits.forward_timeout_s):
                    batch = self.backend.collate([encodings[i] for i in indices])
                    vectors[indices] = self.backend.forward(batch)
        except OutOfMemoryError as error:
            msg = f"no memory for this request on the device: {error}"
            raise NotReadyError(msg, retry_after_s=1) from error
        except DeviceLostError as error:
            self.device_lost(str(error))
            msg = f"the device failed: {error}"
            raise NotReadyError(msg, retry_after_s=1) from error
        except Exception as error:
            LOG.exception("a forward pass failed")
            msg = f"the model failed on this request: {type(error).__name__}: {error}"
            raise InferenceError(msg) from error
        finally:
            self.passes -= 1
        times.forward = time.perf_counter() - began
        return vectors

    def _learn_rate(self, seconds_per_text: float) -> None:
        """Keep a moving average, from which `Retry-After` follows."""
        known = self._seconds_per_text
        self._seconds_per_text = seconds_per_text if not known else 0.9 * known + 0.1 * seconds_per_text
