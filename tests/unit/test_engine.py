# SPDX-License-Identifier: Apache-2.0
"""The engine: permits, order, deadlines, abandoned requests, and where time went."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from client import matrix

from service.backends.base import Encoding
from service.backends.stub import StubBackend
from service.engine import INLINE_CHARACTERS, Job, Observer, Times
from service.errors import (
    DeadlineError,
    DeviceLostError,
    InferenceError,
    InvalidRequestError,
    NotReadyError,
    OverloadedError,
    RequestError,
    TooLargeError,
)
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from service.backends.base import Cut, Input, Token
    from service.engine import Engine, Result

    Make = Callable[..., Engine]

LONG = " ".join(["word"] * 300)
PATIENCE_S = 10


class Recording(StubBackend):
    """Writes down which thread does what, and the texts of each pass; fails as it is told.

    Attributes:
        error: raised for any batch with the word "boom" in it.
        open: a pass that has begun ends when this is set.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.threads: list[tuple[str, str]] = []
        self.passes: list[int] = []
        self.error: Exception | None = None
        self.open, self.began = threading.Event(), threading.Event()
        self.open.set()

    def _note(self, what: str) -> None:
        self.threads.append((what, threading.current_thread().name.partition("_")[0]))

    def tokenize(self, inputs: Sequence[Input], *, cut: Cut, prompt: str = "") -> list[Encoding]:
        self._note("tokenize")
        return super().tokenize(inputs, cut=cut, prompt=prompt)

    def collate(self, encodings: Sequence[Encoding], *, token_vectors: bool = False) -> Any:
        self._note("collate")
        return super().collate(encodings, token_vectors=token_vectors)

    def launch(self, batch: Any) -> Any:
        self._note("launch")
        self.passes.append(batch.texts)
        self.began.set()
        assert self.open.wait(PATIENCE_S)
        if self.error is not None and any(boom() in encoding.ids for encoding in batch.encodings):
            raise self.error
        return super().launch(batch)


class Watcher(Observer):
    """Writes down what it is told of requests."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def embedded(self, texts: int, tokens: int, times: Times) -> None:
        self.events.append(("embedded", texts, tokens, times))

    def rejected(self, texts: int) -> None:
        self.events.append(("rejected", texts))

    def dropped(self, reason: str, texts: int) -> None:
        self.events.append((reason, texts))


def boom() -> int:
    """Return the id of the word."""
    [encoding] = StubBackend(None).tokenize(["boom"], cut="right")  # type: ignore[arg-type]
    return encoding.ids[1]


@pytest.fixture
def backend(stub_settings: Settings) -> Recording:
    return Recording(stub_settings)


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


def ask(*inputs: Any, **options: Any) -> Job:
    return Job(list(inputs), **options)


def run(engine: Engine, *inputs: Any, timeout_s: float | None = None, **options: Any) -> Result:
    async def scene() -> Result:
        return await engine.run(ask(*inputs, deadline=engine.deadline(timeout_s), **options))

    return asyncio.run(scene())


def error_of(engine: Engine, *inputs: Any, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        run(engine, *inputs, **options)
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for lives in other threads
            await asyncio.sleep(0)


@dataclass
class Busy:
    """An engine whose model computes one request until it is let go.

    Attributes:
        first: that request.
    """

    engine: Engine
    backend: Recording
    first: asyncio.Task[Result]

    def start(self, *inputs: Any, **options: Any) -> asyncio.Task[Result]:
        return asyncio.create_task(self.engine.run(ask(*inputs, **options)))

    async def queued(self, texts: int) -> None:
        await until(lambda: self.engine.inference.queued[0] == texts)

    async def is_idle(self) -> None:
        """Wait until nothing is left, anywhere."""
        inference = self.engine.inference
        await until(lambda: (inference.under_way, inference.queued) == (0, (0, 0)))
        assert self.engine.admission.texts == self.engine.admission.requests == 0


def while_busy(engine: Engine, scene: Callable[[Busy], Coroutine[Any, Any, Any]]) -> Any:
    """Play a scene while the first request, of one text, computes."""
    backend: Recording = engine.backend  # type: ignore[assignment]
    backend.open.clear()

    async def play() -> Any:
        busy = Busy(engine, backend, asyncio.create_task(engine.run(ask("first"))))
        await until(backend.began.is_set)
        try:
            result = await scene(busy)
        finally:
            backend.open.set()
        await asyncio.wait([busy.first])
        await busy.is_idle()
        return result

    return asyncio.run(play())


# Rows and times


def test_rows_come_in_the_order_of_the_texts_however_they_are_cut(
    make_engine: Make, backend: Recording
) -> None:
    """Texts are computed in several batches; the rows are still those of the texts."""
    texts = ["a b c d e f g", "a", "a b c", "b", "a b c d e f h", "c"]
    alone = np.concatenate([matrix(run(make_engine(), text)) for text in texts])
    together = run(make_engine(backend, max_batch_tokens=12, max_client_batch_size=6), *texts)
    assert backend.passes == [2, 2, 2]
    assert (matrix(together).dtype, together.tokens) == (np.float32, [9, 3, 5, 3, 9, 3])
    np.testing.assert_array_equal(matrix(together), alone)


def test_token_vectors_have_a_row_for_each_token(make_engine: Make) -> None:
    """Specials included."""
    result = run(make_engine(), "a b", "c", token_vectors=True)
    assert [rows.shape for rows in result.rows] == [(4, 32), (3, 32)]


def test_a_small_share_of_a_batch_does_not_keep_the_batch(make_engine: Make, backend: Recording) -> None:
    """Token vectors of one short text are copied out; those of the request that is most of it are not."""

    async def scene(busy: Busy) -> list[Result]:
        tasks = [busy.start(text, token_vectors=True) for text in ("a", "b " * 40)]
        await busy.queued(2)
        backend.open.set()
        return await asyncio.gather(*tasks)

    small, large = (result.rows[0] for result in while_busy(make_engine(backend), scene))
    assert (small.shape, large.shape) == ((3, 32), (42, 32))
    assert small.base is None
    assert large.base is not None
    np.testing.assert_array_equal(small, run(make_engine(), "a", token_vectors=True).rows[0])


def test_token_vectors_and_pooled_ones_share_no_pass(make_engine: Make, backend: Recording) -> None:
    """A pass gives the one or the other."""

    async def scene(busy: Busy) -> list[Result]:
        tasks = [busy.start("a", token_vectors=flag) for flag in (False, True, False, True)]
        await busy.queued(4)
        backend.open.set()
        return await asyncio.gather(*tasks)

    results = while_busy(make_engine(backend), scene)
    assert [result.rows[0].shape for result in results] == [(32,), (3, 32), (32,), (3, 32)]
    assert backend.passes == [1, 2, 2]


def test_texts_behind_prompts_of_unlike_length_share_no_pass(
    make_engine: Make, stub_settings: Settings
) -> None:
    """A pass leaves out so many tokens of each of its texts."""

    class Prompted(Recording):
        def tokenize(self, inputs: Sequence[Input], *, cut: Cut, prompt: str = "") -> list[Encoding]:
            found = super().tokenize(inputs, cut=cut, prompt=prompt)
            return [Encoding(encoding.ids, None, len(prompt.split())) for encoding in found]

    backend = Prompted(stub_settings)

    async def scene(busy: Busy) -> None:
        tasks = [busy.start("a", prompt=prompt) for prompt in ("", "query: ", "query: ")]
        await busy.queued(3)
        backend.open.set()
        await asyncio.gather(*tasks)

    while_busy(make_engine(backend), scene)
    assert backend.passes == [1, 1, 2]


def test_the_observer_is_told_of_a_computed_request(make_engine: Make, watcher: Watcher) -> None:
    """Texts, tokens and times of each request reach the metrics."""
    result = run(make_engine(observer=watcher), "a b", "a")
    assert watcher.events == [("embedded", 2, 7, result.times)]
    assert all(seconds > 0 for seconds in asdict(result.times).values())


def test_an_exchanged_observer_is_told_everything(make_engine: Make, watcher: Watcher) -> None:
    """What a rehearsal computes is counted neither as a request nor as a batch."""

    class Batches(Watcher):
        def batch(self, texts: int, tokens: int, computed: int, seconds: float) -> None:
            self.events.append(("batch", texts))

    engine, other = make_engine(observer=Batches()), Batches()
    before, engine.observer = engine.observer, other
    run(engine, "a")
    assert (before.events, [event[:2] for event in other.events]) == (  # type: ignore[attr-defined]
        [],
        [("batch", 1), ("embedded", 1)],
    )


def test_the_stages_add_up(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second of a request's journey is in no stage or in two."""
    now = iter(range(100))
    monkeypatch.setattr("service.engine.time.perf_counter", lambda: float(next(now)))
    times = run(make_engine(), "a").times  # 0 began, 1 queued, 2 taken, 3 launched, 4 computed, 5 ended
    assert asdict(times) == {"tokenize": 1, "queue": 1, "forward": 3}


def test_server_timing_names_each_stage_in_milliseconds() -> None:
    """The header has the stages in the order of the journey, with microseconds behind the point."""
    times = Times(tokenize=0.0015, queue=0.25, forward=1.0000004)
    assert times.server_timing() == "tokenize;dur=1.500, queue;dur=250.000, forward;dur=1000.000"


# Tokenising


@pytest.mark.parametrize(
    ("inputs", "prompt", "thread"),
    [
        (["a" * INLINE_CHARACTERS], "", "MainThread"),
        (["a" * INLINE_CHARACTERS, "b"], "", "tokenizer"),
        ([("a" * INLINE_CHARACTERS, "b")], "", "tokenizer"),
        ([("a", "b")], "", "MainThread"),
        (["a"] * 4, "q" * (INLINE_CHARACTERS // 4), "tokenizer"),
        ([[7] * 250], "", "MainThread"),
    ],
    ids=["text", "texts", "long pair", "pair", "prompt of each", "token ids"],
)
def test_only_what_is_much_is_tokenised_in_another_thread(
    make_engine: Make, backend: Recording, inputs: list[Any], prompt: str, thread: str
) -> None:
    """A little takes less than the way to a thread and back; the model's thread never tokenises."""
    run(make_engine(backend), *inputs, prompt=prompt)
    assert backend.threads == [("tokenize", thread), ("collate", "model"), ("launch", "model")]


@pytest.mark.parametrize("wrong", [-1, 253])
def test_a_token_id_out_of_the_vocabulary_is_refused_by_its_index(make_engine: Make, wrong: int) -> None:
    """It would be read from beyond the model's table; the index counts every input."""
    engine = make_engine()
    error = error_of(engine, "a text", [0, 252], [5, wrong])
    message = f"inputs.2: token id {wrong} is not in the vocabulary of 253"
    assert (type(error), str(error), engine.admission.texts) == (InvalidRequestError, message, 0)


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
    make_engine: Make, *, auto_truncate: bool, truncate: bool | None, served: bool
) -> None:
    """The request decides, else the setting; a refusal names the text and the limit."""
    engine = make_engine(auto_truncate=auto_truncate)
    if served:
        assert run(engine, "a", LONG, truncate=truncate).tokens == [3, 256]
        return
    error = error_of(engine, "a", LONG, truncate=truncate)
    message = "inputs.1: more tokens than the limit of 256; cut it, or set truncate"
    assert (type(error), str(error), engine.admission.texts) == (InvalidRequestError, message, 0)


def test_a_text_is_cut_on_the_side_that_is_asked_for(make_engine: Make) -> None:
    """From the left, what is computed is its end."""
    engine = make_engine()
    text = " ".join(["begin"] * 300 + ["end"] * 254)
    left, right = run(engine, text, from_left=True), run(engine, text)
    np.testing.assert_array_equal(matrix(left), matrix(run(engine, " ".join(["end"] * 254))))
    np.testing.assert_array_equal(matrix(right), matrix(run(engine, " ".join(["begin"] * 254))))


def words(tokens: list[Token]) -> list[str]:
    """Return the texts of tokens."""
    return [token.text for token in tokens]


def test_tokens_and_decode_ask_the_tokeniser_and_not_the_model(make_engine: Make) -> None:
    """They need no pass, and teach nothing about how fast passes are; unknown ids are refused."""
    engine = make_engine()
    found = asyncio.run(engine.tokens(["a b", "c"], words, specials=True))
    assert found == [["[", "a", "b", "]"], ["[", "c", "]"]]
    assert asyncio.run(engine.decode([[0, 5, 1], [6]], skip_specials=True)) == ["w5", "w6"]
    with pytest.raises(InvalidRequestError, match=r"inputs\.1: token id 999"):
        asyncio.run(engine.decode([[0], [999]], skip_specials=True))
    assert engine.admission.seconds_per_text == 0


def test_tokens_are_looked_up_text_by_text_for_one_request_at_a_time(make_engine: Make) -> None:
    """Of a text's tokens the reply is written before the next text is begun: memory holds one text's."""
    log: list[tuple[str, str]] = []

    class Slow(StubBackend):
        def tokens(self, texts: Sequence[str], *, specials: bool, prompt: str = "") -> list[list[Token]]:
            log.append(("began", *texts))
            time.sleep(0.01)
            return super().tokens(texts, specials=specials, prompt=prompt)

    def write(tokens: list[Token]) -> str:
        log.append(("wrote", tokens[0].text))
        return threading.current_thread().name.partition("_")[0]

    engine = make_engine(Slow(Settings(backend="stub")))

    async def scene() -> list[list[str]]:
        asked = [engine.tokens(texts, write, specials=False) for texts in (["a", "b"], ["c"])]
        return await asyncio.gather(*asked)

    assert asyncio.run(scene()) == [["lookup", "lookup"], ["lookup"]]
    assert log == [(what, text) for text in "abc" for what in ("began", "wrote")]


@pytest.mark.parametrize(
    ("why", "error"), [("deadline", DeadlineError), ("abandoned", asyncio.CancelledError)]
)
def test_tokens_that_nobody_waits_for_are_not_looked_up(
    make_engine: Make, watcher: Watcher, why: str, error: type[BaseException]
) -> None:
    """Late or abandoned, the request is counted, and its thread is free after the text it is at."""
    seen: list[str] = []
    began, opened = threading.Event(), threading.Event()

    def write(tokens: list[Token]) -> None:
        seen.append(tokens[0].text)
        began.set()
        assert opened.wait(PATIENCE_S)

    engine = make_engine(observer=watcher)

    async def scene() -> None:
        deadline = engine.deadline(0.05 if why == "deadline" else None)
        task = asyncio.create_task(engine.tokens(["a", "b"], write, specials=False, deadline=deadline))
        await until(began.is_set)
        if why == "abandoned":
            task.cancel()
        with pytest.raises(error):
            await task
        opened.set()
        assert await engine.decode([[5]], skip_specials=True) == ["w5"]

    asyncio.run(scene())
    assert (seen, watcher.events) == (["a"], [(why, 2)])


# Admission


def test_a_refused_request_costs_nothing(make_engine: Make, backend: Recording, watcher: Watcher) -> None:
    """Too large: 413; no room: 429, counted, with the time that the queue takes. Nothing is tokenised."""
    engine = make_engine(backend, max_concurrent_texts=3, observer=watcher)
    engine.admission.drained(2, 1.0)

    async def scene(busy: Busy) -> tuple[type, OverloadedError]:
        second = busy.start("a")
        await busy.queued(1)
        before = len(backend.threads)
        with pytest.raises(TooLargeError):
            await engine.run(ask(*["a"] * 4))
        with pytest.raises(OverloadedError) as caught:
            await engine.run(ask("a", "b"))
        assert len(backend.threads) == before
        third = busy.start("a")
        await busy.queued(2)
        assert (engine.admission.texts, engine.extra_load) == (3, 0)
        backend.open.set()
        await asyncio.gather(second, third)
        return caught.value

    error = while_busy(engine, scene)
    assert (str(error), error.retry_after_s) == ("2 texts are in work, of 3 at most; try again later", 1.0)
    assert [event[:2] for event in watcher.events] == [("rejected", 2), *[("embedded", 1)] * 3]


def test_texts_beyond_one_a_request_are_extra_load(make_engine: Make, backend: Recording) -> None:
    """The gate counts requests; the engine adds what they weigh."""

    async def scene(busy: Busy) -> int:
        task = busy.start("a", "b", "c")
        await busy.queued(3)
        load = busy.engine.extra_load
        backend.open.set()
        await task
        return load

    assert while_busy(make_engine(backend), scene) == 2


def test_a_tokeniser_that_fails_returns_the_permits(make_engine: Make, stub_settings: Settings) -> None:
    """Whatever raises, and wherever, nothing stays admitted."""

    class Mute(StubBackend):
        def tokenize(self, inputs: Sequence[Input], *, cut: Cut, prompt: str = "") -> list[Encoding]:
            raise ValueError("no vocabulary")

    engine = make_engine(Mute(stub_settings))
    for text in ("short", LONG * 2):
        with pytest.raises(ValueError, match="no vocabulary"):
            run(engine, text)
    assert engine.admission.texts == 0


# Requests that end early


def test_a_request_that_is_late_leaves_the_queue(
    make_engine: Make, backend: Recording, watcher: Watcher
) -> None:
    """504 when its time is up; its texts are dropped before their batch, its permits return."""

    async def scene(busy: Busy) -> DeadlineError:
        with pytest.raises(DeadlineError) as caught:
            await busy.engine.run(ask("a", "b", deadline=busy.engine.deadline(0.01)))
        assert (busy.engine.inference.queued, busy.engine.admission.texts) == ((0, 0), 1)
        return caught.value

    error = while_busy(make_engine(backend, observer=watcher), scene)
    assert (str(error), error.status) == (
        "not done within 0.01 s; send less at once, or allow more (request_timeout)",
        504,
    )
    assert backend.passes == [1]
    assert [event[:2] for event in watcher.events] == [("deadline", 2), ("embedded", 1)]


@pytest.mark.parametrize(
    ("setting", "asked", "used"), [(0.01, None, "0.01"), (0.01, 5.0, "0.01"), (60.0, 0.0, "0")]
)
def test_a_client_may_wait_for_less_than_the_setting_and_not_for_more(
    make_engine: Make, backend: Recording, setting: float, asked: float | None, used: str
) -> None:
    """The shorter of the two holds; a request without time is late at once."""
    backend.open.clear()
    error = error_of(make_engine(backend, request_timeout_s=setting), "a", timeout_s=asked)
    backend.open.set()
    assert (type(error), str(error).partition(" s;")[0]) == (DeadlineError, f"not done within {used}")


def test_an_abandoned_request_is_dropped_before_its_batch(
    make_engine: Make, backend: Recording, watcher: Watcher
) -> None:
    """Its client is gone: it is not computed, but counted, and its permits return at once."""

    async def scene(busy: Busy) -> Result:
        gone, stays = busy.start("a", "b"), busy.start("c")
        await busy.queued(3)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert (busy.engine.inference.queued, busy.engine.admission.texts) == ((1, 3), 2)
        backend.open.set()
        return await stays

    result = while_busy(make_engine(backend, observer=watcher), scene)
    assert (matrix(result).shape, backend.passes) == ((1, 32), [1, 1])
    assert [event[:2] for event in watcher.events] == [("abandoned", 2), *[("embedded", 1)] * 2]


def test_a_request_that_is_abandoned_in_its_batch_harms_nobody(
    make_engine: Make, backend: Recording, watcher: Watcher
) -> None:
    """Those that share the batch get their rows; when it fails, nothing is tried again for nobody."""
    backend.error = ValueError("a bug")
    gate = backend.open

    async def scene(busy: Busy) -> tuple[Result, Result]:
        gone, stays = busy.start("boom"), busy.start("b")
        await busy.queued(2)
        backend.began.clear()
        backend.open = threading.Event()
        gate.set()  # the first request ends, and the two begin
        await until(backend.began.is_set)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        backend.open.set()
        return await stays, await busy.engine.run(ask("c"))

    results = while_busy(make_engine(backend, observer=watcher), scene)
    assert [matrix(result).shape for result in results] == [(1, 32)] * 2
    assert backend.passes == [1, 2, 1, 1]
    assert watcher.events.count(("abandoned", 1)) == 1


def test_rows_for_a_loop_that_is_gone_do_not_stop_the_model(make_engine: Make, backend: Recording) -> None:
    """The loop closes while a batch computes; the next request, on another loop, is served."""
    engine = make_engine(backend)
    backend.open.clear()
    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.run(ask("a")))
    loop.run_until_complete(until(backend.began.is_set))
    loop.close()
    backend.open.set()
    assert matrix(run(engine, "b")).shape == (1, 32)
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it was left behind on purpose
    task.get_coro().close()  # type: ignore[union-attr]


# Failures


@pytest.mark.parametrize("share", [False, True], ids=["alone", "in a batch"])
def test_a_failed_request_fails_alone(make_engine: Make, backend: Recording, *, share: bool) -> None:
    """It gets an error of its own and its permits return; those beside it get their vectors."""
    backend.error = IndexError("out of range")

    async def scene(busy: Busy) -> list[Any]:
        tasks = [busy.start(text) for text in (["before", "boom", "after"] if share else ["boom"])]
        await busy.queued(len(tasks))
        backend.open.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = while_busy(make_engine(backend), scene)
    [error] = [result for result in results if isinstance(result, Exception)]
    assert (type(error), str(error)) == (
        InferenceError,
        "the model failed on this request: IndexError; the log has more",
    )
    assert [matrix(r).shape for r in results if r is not error] == [(1, 32)] * (len(results) - 1)


def test_a_lost_device_is_told_and_requests_are_sent_elsewhere(make_engine: Make, backend: Recording) -> None:
    """Each gets 503 and when to come back, those that come later too; none waits for its deadline."""
    backend.error = DeviceLostError("Xid 79")
    told: list[str] = []
    engine = make_engine(backend, device_lost=told.append)
    errors = [error_of(engine, "boom"), error_of(engine, "harmless")]
    assert [(type(e), str(e), e.retry_after_s) for e in errors] == [
        (NotReadyError, "the device failed: Xid 79", 1)
    ] * 2
    assert (told, engine.admission.texts, engine.inference.under_way) == (["Xid 79"], 0, 0)


def test_a_bug_in_the_model_thread_does_not_go_unseen(make_engine: Make) -> None:
    """Nobody looks at that thread: it says itself that it has ended, and every request gets 503."""

    class Broken(Observer):
        def batch(self, texts: int, tokens: int, computed: int, seconds: float) -> None:
            raise OSError("no space left")

    told: list[str] = []
    engine = make_engine(observer=Broken(), device_lost=told.append)
    message = "the model thread failed: OSError; the log has more"
    assert [str(error_of(engine, "a")) for _ in range(2)] == [message] * 2
    assert told == ["the model thread failed: OSError: no space left"]


def test_requests_end_when_the_engine_closes(make_engine: Make, backend: Recording) -> None:
    """Nobody waits for ever, whatever computes; the model's thread is free again."""

    async def scene(busy: Busy) -> RequestError:
        task = busy.start("a")
        await busy.queued(1)
        busy.engine.close()
        backend.open.set()
        with pytest.raises(NotReadyError) as caught:
            await task
        return caught.value

    assert str(while_busy(make_engine(backend), scene)) == "this worker is leaving"


def test_an_engine_may_be_closed_before_it_was_started(make_engine: Make) -> None:
    """A boot that fails after the engine was made ends without a word."""
    engine, thread = make_engine(), ThreadPoolExecutor(1)
    engine.close()
    engine.start(thread)
    thread.shutdown()
    assert str(error_of(engine, "a")) == "this worker is leaving"


# Batches


def test_batches_form_by_themselves_under_load(make_engine: Make, backend: Recording) -> None:
    """Two hundred requests of one text come while one computes: they are eight passes, not two hundred."""

    async def scene(busy: Busy) -> list[Result]:
        tasks = [busy.start(f"text{number}") for number in range(200)]
        await busy.queued(200)
        backend.open.set()
        return await asyncio.gather(*tasks)

    engine = make_engine(backend, max_concurrent_texts=512, max_batch_texts=25)
    results = while_busy(engine, scene)
    assert backend.passes == [1, *[25] * 8]
    expected = np.concatenate([matrix(run(engine, f"text{number}")) for number in range(200)])
    np.testing.assert_array_equal(np.concatenate([matrix(result) for result in results]), expected)


def test_nothing_is_waited_for_while_the_device_is_idle(make_engine: Make, backend: Recording) -> None:
    """Requests that come one by one are computed one by one, as soon as they are there."""

    async def scene() -> None:
        for _ in range(3):
            await engine.run(ask("a"))

    engine = make_engine(backend)
    asyncio.run(scene())
    assert backend.passes == [1, 1, 1]
