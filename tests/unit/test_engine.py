# SPDX-License-Identifier: Apache-2.0
"""The engine: permits, order, errors that stay with their request, and where time went."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from service.backends.stub import StubBackend, StubBatch
from service.engine import Engine, Observer, Times
from service.errors import (
    DeviceLostError,
    InferenceError,
    InvalidRequestError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    RequestError,
    TooLargeError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from service.settings import Settings

    Make = Callable[..., Engine]
    Embed = Callable[..., Any]

LONG = " ".join(["word"] * 300)


class Faulty(StubBackend):
    """Raises `error` for any text with the word "boom" in it, and keeps the sizes of its batches."""

    error: Exception = RuntimeError("a bug in the model")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.batches: list[int] = []

    def forward(self, batch: Any) -> NDArray[np.float32]:
        self.batches.append(batch.texts)
        [boom] = self.tokenize(["boom"], truncate=False)
        if any(boom[1] in encoding for encoding in batch.encodings):
            raise self.error
        return super().forward(batch)


class Watcher(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def embedded(self, texts: int, tokens: int, times: Times) -> None:
        self.events.append(("embedded", texts, tokens, times))

    def rejected(self, texts: int) -> None:
        self.events.append(("rejected", texts))


@pytest.fixture
def faulty(stub_settings: Settings) -> Faulty:
    return Faulty(stub_settings)


def error_of(embed: Embed, engine: Engine, *texts: str, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        embed(engine, *texts, **options)
    return caught.value


def test_vectors_come_in_the_order_of_the_texts_however_they_are_cut(
    make_engine: Make, embed: Embed, faulty: Faulty
) -> None:
    """Texts are computed by length in several batches; the rows are still those of the texts."""
    texts = ["a b c d e f g", "a", "a b c", "b", "a b c d e f h", "c"]
    alone = np.concatenate([embed(make_engine(), text).vectors for text in texts])
    together = embed(make_engine(faulty, max_batch_tokens=18, max_client_batch_size=6), *texts)
    assert faulty.batches == [2, 3, 1]
    assert together.vectors.dtype == np.float32
    np.testing.assert_array_equal(together.vectors, alone)


def test_tokens_are_those_of_the_texts_without_padding(make_engine: Make, embed: Embed) -> None:
    """Two words and one word with two specials each are seven tokens."""
    assert embed(make_engine(), "a b", "a").tokens == 7


def test_the_observer_is_told_of_a_computed_request(make_engine: Make, embed: Embed) -> None:
    """Texts, tokens and times of each request reach the metrics."""
    watcher = Watcher()
    result = embed(make_engine(observer=watcher), "a b", "a")
    assert watcher.events == [("embedded", 2, 7, result.times)]
    assert all(seconds > 0 for seconds in asdict(result.times).values())


def test_server_timing_names_each_stage_in_milliseconds() -> None:
    """The header has the stages in the order of the journey, with microseconds behind the point."""
    times = Times(tokenize=0.0015, queue=0.25, forward=1.0000004)
    assert times.server_timing() == "tokenize;dur=1.500, queue;dur=250.000, forward;dur=1000.000"


@pytest.mark.parametrize(
    ("limits", "texts", "message"),
    [
        (
            {"max_client_batch_size": 2},
            3,
            "3 texts in one request; at most 2 are taken, split it",
        ),
        (
            {"max_client_batch_size": 9, "max_concurrent_texts": 2},
            3,
            "3 texts can never be admitted; at most 2 are, split it",
        ),
    ],
)
def test_a_request_that_can_never_be_served_is_too_large(
    make_engine: Make, embed: Embed, faulty: Faulty, limits: dict[str, int], texts: int, message: str
) -> None:
    """It is refused before anything is computed, with no time to come back at; one text less is served."""
    engine = make_engine(faulty, **limits)
    error = error_of(embed, engine, *["a"] * texts)
    assert (type(error), str(error), error.retry_after_s) == (TooLargeError, message, None)
    assert (faulty.batches, engine.texts) == ([], 0)
    assert embed(engine, *["a"] * (texts - 1)).vectors.shape == (texts - 1, 32)


def test_a_full_worker_refuses_at_once_and_says_when_to_come_back(
    make_engine: Make, stub_settings: Settings
) -> None:
    """Beyond the permits: 429 with the queue's length in seconds; what fits beside is admitted."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow(StubBackend):
        def forward(self, batch: Any) -> NDArray[np.float32]:
            entered.set()
            assert go_on.wait(10)
            return super().forward(batch)

    watcher = Watcher()
    engine = make_engine(Slow(stub_settings), max_concurrent_texts=5, observer=watcher)
    engine._seconds_per_text = 0.5

    async def scene() -> tuple[OverloadedError, int, list[int]]:
        first = asyncio.create_task(engine.embed(["a", "b", "c"]))
        await asyncio.to_thread(entered.wait)
        with pytest.raises(OverloadedError) as caught:
            await engine.embed(["d", "e", "f"])
        second = asyncio.create_task(engine.embed(["d", "e"]))
        await asyncio.sleep(0)  # lets the task begin
        full = engine.texts
        go_on.set()
        return caught.value, full, [len((await task).vectors) for task in (first, second)]

    error, full, rows = asyncio.run(scene())
    assert str(error) == "3 texts are in work, of 5 at most; try again later"
    assert (error.retry_after_s, full, rows, engine.texts) == (1.5, 5, [3, 2], 0)
    assert [event[:2] for event in watcher.events] == [("rejected", 3), ("embedded", 3), ("embedded", 2)]


def test_the_time_to_come_back_is_learnt_from_forward_passes(make_engine: Make) -> None:
    """The first request sets the rate, later ones move it by a tenth; a failed one teaches nothing."""
    engine = make_engine()
    rates = []
    for seconds in (1.0, 2.0, 2.0):
        engine._learn_rate(seconds)
        rates.append(engine._seconds_per_text)
    assert rates == pytest.approx([1.0, 1.1, 1.19])


@pytest.mark.parametrize(
    ("auto_truncate", "truncate", "served"),
    [
        (True, None, True),
        (True, True, True),
        (True, False, False),
        (False, None, False),
        (False, True, True),
        (False, False, False),
    ],
)
def test_a_too_long_text_is_cut_or_refused_as_asked(
    make_engine: Make, embed: Embed, *, auto_truncate: bool, truncate: bool | None, served: bool
) -> None:
    """The request decides, else the setting; a refusal names the text and both lengths."""
    engine = make_engine(auto_truncate=auto_truncate)
    if served:
        assert embed(engine, "a", LONG, truncate=truncate).tokens == 3 + 256
        return
    error = error_of(embed, engine, "a", LONG, truncate=truncate)
    message = "inputs.1: 302 tokens; the limit is 256, cut it or set truncate"
    assert (type(error), str(error), engine.texts) == (InvalidRequestError, message, 0)


FAILURES: list[tuple[Exception, type[RequestError], str, float | None, list[str]]] = [
    (
        OutOfMemoryError("tried 2 GiB"),
        NotReadyError,
        "no memory for this request on the device: tried 2 GiB",
        1,
        [],
    ),
    (DeviceLostError("Xid 79"), NotReadyError, "the device failed: Xid 79", 1, ["Xid 79"]),
    (
        IndexError("out of range"),
        InferenceError,
        "the model failed on this request: IndexError: out of range",
        None,
        [],
    ),
]


@pytest.mark.parametrize(
    ("error", "kind", "message", "retry_after_s", "lost"),
    FAILURES,
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failed_request_fails_alone(
    make_engine: Make,
    embed: Embed,
    faulty: Faulty,
    error: Exception,
    kind: type[RequestError],
    message: str,
    retry_after_s: float | None,
    lost: list[str],
) -> None:
    """It gets an error of its own, its permits return, only a lost device is reported; the next is fine."""
    faulty.error = error
    told: list[str] = []
    watcher = Watcher()
    engine = make_engine(faulty, device_lost=told.append, observer=watcher)
    caught = error_of(embed, engine, "fine", "boom")
    assert (type(caught), str(caught), caught.retry_after_s) == (kind, message, retry_after_s)
    assert (told, engine.texts, watcher.events, engine._seconds_per_text) == (lost, 0, [], 0.0)
    np.testing.assert_array_equal(embed(engine, "fine").vectors, embed(make_engine(), "fine").vectors)


def test_requests_beside_a_failed_one_are_answered(make_engine: Make, faulty: Faulty) -> None:
    """Of three requests at once, the one in the middle fails; its neighbours get their vectors."""
    engine = make_engine(faulty)

    async def scene() -> list[Any]:
        requests = (engine.embed([text]) for text in ("before", "boom", "after"))
        return await asyncio.gather(*requests, return_exceptions=True)

    before, boom, after = asyncio.run(scene())
    assert isinstance(boom, InferenceError)
    assert (before.vectors.shape, after.vectors.shape, engine.texts) == ((1, 32), (1, 32), 0)


def test_a_tokeniser_that_fails_returns_the_permits(
    make_engine: Make, embed: Embed, stub_settings: Settings
) -> None:
    """Whatever raises, and wherever, nothing stays admitted."""

    class Mute(StubBackend):
        def tokenize(self, texts: Sequence[str], *, truncate: bool) -> list[list[int]]:
            msg = "no vocabulary"
            raise ValueError(msg)

    engine = make_engine(Mute(stub_settings))
    with pytest.raises(ValueError, match="no vocabulary"):
        embed(engine, "a")
    assert engine.texts == 0


def test_an_abandoned_request_returns_its_permits(make_engine: Make) -> None:
    """A request that is cancelled while it waits holds no permit any more."""
    engine = make_engine()

    async def scene() -> tuple[int, int]:
        task = asyncio.create_task(engine.embed(["a", "b"]))
        await asyncio.sleep(0)  # lets the task begin
        held = engine.texts
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return held, engine.texts

    assert asyncio.run(scene()) == (2, 0)


def test_every_batch_is_guarded_by_the_watchdog(make_engine: Make, embed: Embed, faulty: Faulty) -> None:
    """Each forward pass has the whole time limit, and the guard ends with it, also when it fails."""
    guarded: list[float | str] = []

    @contextmanager
    def watchdog(seconds: float) -> Iterator[None]:
        guarded.append(seconds)
        try:
            yield
        finally:
            guarded.append("end")

    engine = make_engine(faulty, watchdog=watchdog, forward_timeout_s=7.5, max_batch_tokens=3)
    embed(engine, "a", "b")
    error_of(embed, engine, "boom")
    assert guarded == [7.5, "end"] * 3


def test_all_forward_passes_run_on_the_model_thread(make_engine: Make, stub_settings: Settings) -> None:
    """One thread owns the model: collate and forward never run anywhere else, tokenising does."""
    where: dict[str, set[str]] = {"tokenize": set(), "collate": set(), "forward": set()}

    class Spy(StubBackend):
        def tokenize(self, texts: Sequence[str], *, truncate: bool) -> list[list[int]]:
            where["tokenize"].add(threading.current_thread().name)
            return super().tokenize(texts, truncate=truncate)

        def collate(self, encodings: Sequence[list[int]]) -> StubBatch:
            where["collate"].add(threading.current_thread().name)
            return super().collate(encodings)

        def forward(self, batch: Any) -> NDArray[np.float32]:
            where["forward"].add(threading.current_thread().name)
            return super().forward(batch)

    engine = make_engine(Spy(stub_settings))

    async def scene() -> None:
        await asyncio.gather(*(engine.embed(["a", "b"]) for _ in range(4)))

    asyncio.run(scene())
    assert where == {"tokenize": {"tokenizer_0"}, "collate": {"model_0"}, "forward": {"model_0"}}
