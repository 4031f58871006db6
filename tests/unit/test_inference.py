# SPDX-License-Identifier: Apache-2.0
"""The loop of the model thread: what it launches when, and what becomes of batches that fail.

The loop runs in the test's own thread: it must have answered everything before it would wait.
"""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fakes import PROBE, Bench, FakeBackend, FakeBatch
from hypothesis import given
from hypothesis import strategies as st

from service import inference, passes, tickets, token_budget
from service.errors import DeviceLostError, InferenceError, NotReadyError, OutOfMemoryError
from service.inference import DEPTH
from service.token_budget import RECOVER_S, SHRINK, TokenBudget

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from service.tickets import Ticket

STAGES = ("collate", "launch", "rows")
BOOM = 13


def keys(ticket: Ticket) -> list[float]:
    """Return the keys of the rows that a request got."""
    return [float(row[0]) for row in ticket.rows if row is not None]


def outcome(ticket: Ticket) -> object:
    """Return the keys of a request's rows, or its error."""
    return keys(ticket) if ticket.error is None else (type(ticket.error), str(ticket.error))


def when(key: int, error: Callable[[], Exception]) -> Callable[[FakeBatch], Exception | None]:
    """Fail any batch with this key in it."""
    return lambda batch: error() if key in batch.keys else None


def above(tokens: int) -> Callable[[FakeBatch], Exception | None]:
    """Be out of memory for any batch of more tokens."""
    return lambda batch: OutOfMemoryError(f"{batch.tokens} tokens") if batch.tokens > tokens else None


def not_a_number(*poison: int) -> Callable[[FakeBatch], NDArray[np.float32]]:
    """Give NaN for these keys."""
    return lambda batch: np.where(np.isin(batch.rows()[:, :1], poison), np.nan, batch.rows())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time that the loop sees, to be set."""
    now = [1000.0]

    class Clock:
        monotonic = perf_counter = staticmethod(lambda: now[0])

    for module in (inference, passes, tickets):
        monkeypatch.setattr(module, "time", Clock)
    return now


# What is launched when


def test_a_batch_is_delivered_before_the_next_is_taken_where_launching_computes() -> None:
    """On a CPU nothing is gained by taking early, and late texts may still join."""
    bench = Bench(FakeBackend(), max_batch_texts=2)
    bench.ask((2, 3), (3, 3), (4, 3))
    bench.run()
    assert bench.backend.events == [
        ("launch", (2, 3)),
        ("rows", (2, 3)),
        ("launch", (4,)),
        ("rows", (4,)),
    ]


def test_the_next_batch_is_launched_while_the_device_computes() -> None:
    """Two are under way while there is work, and never more; rows come in the order of the launches."""
    bench = Bench(FakeBackend(immediate=False), max_batch_texts=1)
    most = []
    bench.backend.trouble["launch"] = lambda _: most.append(bench.inference.under_way)  # type: ignore[func-returns-value]
    tickets = [bench.ask((key, 3)) for key in (2, 3, 4, 5)]
    bench.run()
    order = ["launch", "launch", "rows", "launch", "rows", "launch", "rows", "rows"]
    assert [stage for stage, _ in bench.backend.events] == order
    assert [key for stage, (key,) in bench.backend.events if stage == "rows"] == [2, 3, 4, 5]
    assert (max(most), bench.finished) == (DEPTH, [0, 1, 2, 3])
    assert [keys(ticket) for ticket in tickets] == [[2], [3], [4], [5]]


def test_what_comes_while_the_device_computes_is_launched_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop waits for texts and for the device at once: the device finds work when it is through."""
    bench = Bench(FakeBackend(immediate=False))
    late = [3]

    def look() -> None:
        if late:
            bench.ask((late.pop(), 3))
        else:
            bench.backend.through = True

    monkeypatch.setattr(bench, "look", look)
    bench.ask((2, 3))
    bench.run()
    assert bench.backend.events == [("launch", (2,)), ("launch", (3,)), ("rows", (2,)), ("rows", (3,))]


def test_a_device_that_hangs_is_left_to_the_watchdog(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `forward_timeout` the loop looks no more, and asks for the rows under the watchdog's deadline."""
    bench = Bench(FakeBackend(immediate=False))

    def look() -> None:
        clock[0] += 1.0

    monkeypatch.setattr(bench, "look", look)
    bench.ask((2, 3))
    bench.run()
    assert bench.backend.events == [("launch", (2,)), ("rows", (2,))]
    assert (clock[0], bench.guarded) == (1008.0, [7.5, 7.5])


def test_what_comes_while_a_batch_computes_is_one_batch() -> None:
    """Batches form by themselves: nothing is waited for, and nothing is computed one by one."""
    bench = Bench()

    def arrive(batch: FakeBatch) -> None:
        if batch.keys == (2,):
            for key in (3, 4, 5):
                bench.ask((key, 3))

    bench.backend.trouble["launch"] = arrive  # type: ignore[assignment]
    bench.ask((2, 3))
    bench.run()
    assert bench.backend.passes() == [(2,), (3, 4, 5)]


def test_a_request_is_told_once_when_its_last_row_is_there() -> None:
    """Its texts may be computed in several batches, out of order; its rows are in order."""
    bench = Bench(FakeBackend(padded=True), max_batch_texts=2)
    first, second = bench.ask((2, 50), (3, 4), (4, 50), (5, 4)), bench.ask((6, 4))
    bench.run()
    assert bench.backend.passes() == [(2, 4), (3, 5), (6,)]
    assert (keys(first), keys(second), bench.finished) == ([2, 3, 4, 5], [6], [0, 1])


def test_each_text_gets_the_rows_of_its_tokens() -> None:
    """Token vectors come one after another; texts that want them share no batch with those that do not."""
    bench = Bench()
    pooled, tokens = bench.ask((2, 3), (3, 2)), bench.ask((4, 3), (5, 1), token_vectors=True)
    bench.run()
    assert bench.backend.passes() == [(2, 3), (4, 5)]
    assert keys(pooled) == [2, 3]
    assert [row.tolist() for row in tokens.rows if row is not None] == [[[4, 0], [4, 1], [4, 2]], [[5, 0]]]


def test_every_pass_is_guarded_by_the_watchdog() -> None:
    """Launching, waiting, retries and the probe have the whole limit each, and the guard ends with them."""
    bench = Bench(FakeBackend(values=not_a_number(BOOM)))

    def watched(_: FakeBatch) -> None:
        assert bench.watching

    bench.backend.trouble = dict.fromkeys(STAGES, watched)  # type: ignore[arg-type]
    bench.ask((2, 3))
    bench.ask((BOOM, 3))
    bench.run()
    assert bench.backend.passes() == [(2, BOOM), (2,), (BOOM,), (PROBE,)]
    assert bench.guarded == [7.5] * 7  # two each, and one for the whole probe
    assert [type(ticket.error) for ticket in bench.tickets] == [type(None), InferenceError]


def test_the_observer_is_told_of_texts_tokens_and_padding() -> None:
    """Also of what was computed at the second try: what counts is what the device did."""
    bench = Bench(FakeBackend(padded=True))
    bench.ask((2, 4), (3, 6))
    bench.run()
    assert bench.batches == [(2, 10, 12)]
    bench = Bench(FakeBackend(trouble={"launch": when(BOOM, ValueError)}))
    bench.ask((2, 4))
    bench.ask((BOOM, 4))
    bench.run()
    assert bench.batches == [(1, 4, 4)]


def test_the_drain_rate_counts_no_second_twice(clock: list[float]) -> None:
    """A batch that waited behind another took what came after it; a request lasts from first to last."""
    bench = Bench(FakeBackend(immediate=False), max_batch_texts=1)

    def pass_time(_: FakeBatch) -> None:
        clock[0] += 2.0

    bench.backend.trouble["rows"] = pass_time  # type: ignore[assignment]
    tickets = [bench.ask((2, 3)), bench.ask((3, 3)), bench.ask((4, 3), (5, 3))]
    bench.run()
    assert bench.drains == [(1, 2.0)] * 4
    assert [(t.began - 1000, t.ended - 1000) for t in tickets] == [(0, 2), (0, 4), (2, 8)]


# Leaving


def test_closing_ends_the_loop_and_every_request_in_it() -> None:
    """Nobody waits for ever: what is on the device, what waits and what still comes gets 503."""
    bench = Bench(FakeBackend(immediate=False), max_batch_texts=1)

    def leave(batch: FakeBatch) -> None:
        if batch.keys == (2,):
            bench.inference.close()

    bench.backend.trouble["launch"] = leave  # type: ignore[assignment]
    bench.ask((2, 3))
    bench.ask((3, 3), (4, 3))
    bench.run()
    bench.ask((5, 3))
    assert bench.backend.events == [("launch", (2,))]
    assert [outcome(t) for t in bench.tickets] == [(NotReadyError, "this worker is leaving")] * 3
    assert (bench.told, bench.finished, bench.inference.queued) == ([], [0, 1, 2], (0, 0))


def test_closing_wakes_a_loop_that_waits() -> None:
    """The thread is free again at once."""
    bench = Bench()
    thread = threading.Thread(target=bench.inference.run)
    thread.start()
    bench.inference.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_text_wakes_a_loop_that_waits() -> None:
    """An idle device starts at once: there is no window to be waited for."""
    bench = Bench()
    done = threading.Event()
    waiting = threading.Event()
    wait = bench.inference._changed.wait

    def announced(timeout: float | None = None) -> bool:
        assert timeout is None
        waiting.set()
        return wait()

    bench.inference._changed.wait = announced  # type: ignore[method-assign]
    thread = threading.Thread(target=bench.inference.run)
    thread.start()
    assert waiting.wait(10)
    bench.ask((2, 3)).notify = lambda _: done.set()
    assert done.wait(10)
    bench.inference.close()
    thread.join(10)
    assert (bench.backend.passes(), keys(bench.tickets[0])) == ([(2,)], [2])


def test_an_abandoned_request_is_not_computed_again_and_not_told() -> None:
    """Its client left while its batch computed: the others get their rows, it gets nothing."""
    bench = Bench()
    gone, stays = bench.ask((2, 3)), bench.ask((3, 3))

    def leave(batch: FakeBatch) -> Exception | None:
        gone.abandoned = True
        return ValueError("try again") if len(batch.keys) > 1 else None

    bench.backend.trouble["rows"] = leave
    bench.run()
    assert bench.backend.passes() == [(2, 3), (3,)]
    assert (keys(gone), gone.error, keys(stays), bench.finished) == ([], None, [3], [1])


# One request is at fault


@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_request_fails_alone(stage: str) -> None:
    """Those that shared its batch are computed again, each for itself, and get their rows."""
    bench = Bench(FakeBackend(trouble={stage: when(BOOM, lambda: IndexError("out of range"))}))
    bench.ask((2, 3), (3, 3))
    bench.ask((BOOM, 3), (4, 3))
    bench.ask((5, 3))
    bench.run()
    error = (InferenceError, "the model failed on this request: IndexError; the log has more")
    assert [outcome(t) for t in bench.tickets] == [[2, 3], error, [5]]
    assert (bench.told, sorted(bench.finished)) == ([], [0, 1, 2])


def test_a_request_alone_in_its_batch_is_not_tried_again() -> None:
    """Nothing could come out differently."""
    bench = Bench(FakeBackend(trouble={"launch": when(BOOM, ValueError)}))
    bench.ask((BOOM, 3), (2, 3))
    bench.run()
    assert bench.backend.passes() == [(BOOM, 2)]


def test_what_waits_of_a_failed_request_is_forgotten() -> None:
    """Its permits are free again: the rest of it must not hold up those who got them."""
    bench = Bench(FakeBackend(trouble={"launch": when(BOOM, ValueError)}), max_batch_texts=2)
    bench.ask((BOOM, 3), (2, 3), (3, 3), (4, 3))
    bench.ask((5, 3))
    bench.run()
    assert bench.backend.passes() == [(BOOM, 2), (5,)]
    assert [type(t.error) for t in bench.tickets] == [InferenceError, type(None)]


def bugs(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the log says of failed passes, with the error's text."""
    told = [record for record in caplog.records if record.exc_info]
    return [f"{record.getMessage()}: {record.exc_info[1]}" for record in told if record.exc_info]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("token_vectors", [False, True])
def test_a_failure_of_every_text_does_not_cost_a_pass_for_each(
    stage: str, *, token_vectors: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Three in a row and a harmless text fail alike: all the others fail too, with one line in the log."""
    seen: list[tuple[tuple[int, ...], bool]] = []

    def broken(batch: FakeBatch) -> Exception:
        seen.append((batch.keys, batch.token_vectors))
        return ValueError("no such kernel")

    bench = Bench(FakeBackend(trouble={stage: broken}))
    for key in range(2, 60):
        bench.ask((key, 1), token_vectors=token_vectors)
    bench.run()
    tried = [tuple(range(2, 60)), (2,), (3,), (4,), (PROBE,)]
    assert seen == [(keys, token_vectors) for keys in tried]
    error = (InferenceError, "the model failed on this request: ValueError; the log has more")
    assert [outcome(t) for t in bench.tickets] == [error] * 58
    assert bugs(caplog) == ["a forward pass failed for 58 of its requests: no such kernel"]
    assert (bench.told, sorted(bench.finished)) == ([], list(range(58)))


def test_bad_requests_in_a_row_do_not_take_the_others_with_them(caplog: pytest.LogCaptureFixture) -> None:
    """As a harmless text can be computed, each request is; what failed alike is logged once."""
    bad = range(2, 10)
    backend = FakeBackend(
        trouble={"launch": lambda batch: IndexError("bad") if set(batch.keys) & set(bad) else None}
    )
    bench = Bench(backend)
    for key in (*bad, 20, 21):
        bench.ask((key, 1))
    bench.run()
    assert [keys(t) for t in bench.tickets[-2:]] == [[20], [21]]
    assert {type(t.error) for t in bench.tickets[:-2]} == {InferenceError}
    assert len(backend.passes()) == 1 + 10 + 1
    assert bugs(caplog) == ["a forward pass failed for 8 of its requests: bad"]


def test_failures_that_differ_are_all_told(caplog: pytest.LogCaptureFixture) -> None:
    """Other texts are other bugs: nothing is cut short, and each has its line."""
    bench = Bench(FakeBackend(trouble={"launch": lambda batch: ValueError(f"key {batch.keys[0]}")}))
    for key in range(2, 8):
        bench.ask((key, 1))
    bench.run()
    assert bench.backend.passes() == [(2, 3, 4, 5, 6, 7), *[(key,) for key in range(2, 8)]]
    assert bugs(caplog) == [f"a forward pass failed for 1 of its requests: key {n}" for n in range(2, 8)]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_wrong_number_of_rows_is_an_error(rows: int, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody gets the row of another text."""
    bench = Bench(FakeBackend(values=lambda _: np.zeros((rows, 2), np.float32)))
    bench.ask((2, 3), (3, 3))
    bench.run()
    error = "the model failed on this request: ValueError; the log has more"
    assert outcome(bench.tickets[0]) == (InferenceError, error)
    assert f"ValueError: {rows} rows instead of 2" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_text_that_gives_no_number_fails_its_own_request(value: float) -> None:
    """The others get their rows, and the process stays: a harmless text can still be computed."""
    bench = Bench(FakeBackend(values=lambda b: np.where(b.rows() == BOOM, value, b.rows())))
    bench.ask((2, 3))
    bench.ask((BOOM, 3))
    bench.ask((3, 3))
    bench.run()
    error = (InferenceError, "the model gives values that are not finite for a text of this request")
    assert [outcome(t) for t in bench.tickets] == [[2], error, [3]]
    assert bench.told == []


# The device is at fault


def test_a_device_that_gives_no_numbers_for_any_text_is_lost() -> None:
    """The probe tells: no request is at fault, each may try another worker."""
    bench = Bench(FakeBackend(values=not_a_number(PROBE, 2, 3)))
    bench.ask((2, 3))
    bench.ask((3, 3))
    bench.run()
    message = "the model gives values that are not finite, for any text"
    assert [outcome(t) for t in bench.tickets] == [(NotReadyError, f"the device failed: {message}")] * 2
    assert bench.told == [("lost", message)]


@pytest.mark.parametrize("error", [DeviceLostError("Xid 79"), ValueError("no such kernel")])
def test_a_probe_that_fails_in_any_way_means_a_lost_device(error: Exception) -> None:
    """A harmless text that cannot be computed is proof enough."""
    bench = Bench(FakeBackend(values=not_a_number(2), trouble={"launch": when(PROBE, lambda: error)}))
    bench.ask((2, 3))
    bench.run()
    assert bench.told == [("lost", "the model gives values that are not finite, for any text")]


def test_a_probe_without_room_proves_nothing() -> None:
    """A text that gives NaN beside a full device fails its own request, and the worker stays."""
    full = when(PROBE, lambda: OutOfMemoryError("no room"))
    bench = Bench(FakeBackend(values=not_a_number(2), trouble={"launch": full}))
    bench.ask((2, 3))
    bench.ask((3, 3))
    bench.run()
    assert [type(ticket.error) for ticket in bench.tickets] == [InferenceError, type(None)]
    assert bench.told == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("immediate", [True, False])
def test_a_lost_device_ends_the_loop_and_is_told_once(stage: str, *, immediate: bool) -> None:
    """Every request here, and every later one, gets 503 and when to come back; nothing more is launched."""
    backend = FakeBackend(immediate, trouble={stage: when(BOOM, lambda: DeviceLostError("Xid 79"))})
    bench = Bench(backend, max_batch_texts=1)
    for key in (BOOM, 2, 3):
        bench.ask((key, 3))
    bench.run()
    passes = backend.passes()
    bench.ask((4, 3))
    assert [outcome(t) for t in bench.tickets] == [(NotReadyError, "the device failed: Xid 79")] * 4
    assert {t.error.retry_after_s for t in bench.tickets if t.error} == {1}
    assert (bench.told, sorted(bench.finished)) == ([("lost", "Xid 79")], [0, 1, 2, 3])
    assert backend.passes() == passes


def test_a_device_that_is_lost_while_a_batch_is_tried_again_ends_the_loop_too() -> None:
    """What was delivered before stays delivered."""
    calls = iter([ValueError("a bug"), None, DeviceLostError("")])
    bench = Bench(FakeBackend(trouble={"launch": lambda _: next(calls)}))
    for key in (2, 3, 4):
        bench.ask((key, 3))
    bench.run()
    assert [outcome(t) for t in bench.tickets] == [[2], *[(NotReadyError, "the device failed: ")] * 2]
    assert bench.told == [("lost", "")]


def break_observer(bench: Bench) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space left")

    bench.batch = broken  # type: ignore[method-assign]


def break_trim(bench: Bench) -> None:
    def broken() -> None:
        raise OSError("no space left")

    bench.backend.trouble["launch"] = above(0)
    bench.backend.trim = broken  # type: ignore[method-assign]


def break_model(bench: Bench) -> None:
    bench.backend.trouble["rows"] = lambda _: SystemExit("no space left")  # type: ignore[return-value,assignment]


@pytest.mark.parametrize("breaking", [break_observer, break_trim, break_model])
def test_whatever_escapes_from_a_pass_ends_the_worker_and_not_in_silence(
    breaking: Callable[[Bench], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A loop that just ended would leave a worker that looks alive and serves nobody, for ever."""
    bench = Bench(max_batch_texts=2)
    breaking(bench)
    bench.ask((2, 3), (3, 3), (4, 3))
    bench.run()
    bench.ask((5, 3))
    kind = "SystemExit" if breaking is break_model else "OSError"
    message = f"the model thread failed: {kind}; the log has more"
    assert [outcome(t) for t in bench.tickets] == [(NotReadyError, message)] * 2
    told = [entry for entry in bench.told if entry[0] != "out of memory"]
    assert told == [("lost", f"the model thread failed: {kind}: no space left")]
    assert [record.message for record in caplog.records if record.levelname == "CRITICAL"] == [
        "the model thread failed"
    ]


# Out of memory


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_batch_that_does_not_fit_is_computed_in_parts(stage: str, *, padded: bool) -> None:
    """Memory is given back before each smaller try; every row is right in the end."""
    bench = Bench(FakeBackend(padded=padded, trouble={stage: above(60)}), TokenBudget(200, 50))
    tickets = [bench.ask(*[(10 * n + i, 20) for i in range(3)]) for n in range(1, 4)]
    bench.run()
    assert [keys(t) for t in tickets] == [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    tries = [keys for step, keys in bench.backend.events if step in (stage, "trim")]
    assert list(map(len, tries)) == [9, 0, 4, 5, 0, 2, 2, 0, 2, 3]  # 0: memory is given back
    assert bench.told[0] == ("out of memory", int(SHRINK * 180))
    assert not [entry for entry in bench.told if entry[0] == "lost"]


def test_the_budget_shrinks_to_what_the_pass_really_computed() -> None:
    """Where padding exists, it is part of what did not fit."""
    bench = Bench(FakeBackend(padded=True, trouble={"launch": above(130)}), TokenBudget(200, 50))
    bench.ask((2, 50), (3, 40), (4, 40))
    bench.run()
    assert bench.told == [("out of memory", int(SHRINK * 150))]
    assert keys(bench.tickets[0]) == [2, 3, 4]


def test_a_smaller_budget_holds_for_the_batches_that_follow() -> None:
    """Each failure teaches a little, until what is taken fits at once; no text is lost on the way."""
    bench = Bench(FakeBackend(trouble={"launch": above(100)}), TokenBudget(200, 50))
    ticket = bench.ask(*[(key, 20) for key in range(2, 27)])
    bench.run()
    assert list(map(len, bench.backend.passes())) == [10, 5, 5, 7, 3, 4, 5, 3]
    assert bench.told == [("out of memory", int(SHRINK * 200)), ("out of memory", int(SHRINK * 140))]
    assert keys(ticket) == list(range(2, 27))


def test_a_recovery_is_told(clock: list[float]) -> None:
    """The budget grows by a step before a batch is taken, if there was no trouble for a minute."""
    bench = Bench(budget=TokenBudget(1000, 100))
    bench.budget.shrink(400, clock[0])
    bench.ask((2, 3))
    clock[0] += RECOVER_S
    bench.run()
    assert bench.told == [("recovered", 350)]


def test_a_text_that_never_fits_fails_its_own_request(caplog: pytest.LogCaptureFixture) -> None:
    """503 for it alone, as memory may be free on another worker; the others get their rows."""
    error = OutOfMemoryError("tried 2 GiB")
    bench = Bench(FakeBackend(trouble={"launch": when(BOOM, lambda: error)}), TokenBudget(1000, 10))
    for key in (2, BOOM, 3):
        bench.ask((key, 20), (key, 20))
    bench.run()
    failed = (NotReadyError, "no memory for this request on the device")
    assert [outcome(t) for t in bench.tickets] == [[2, 2], failed, [3, 3]]
    assert "tried 2 GiB" in caplog.text
    assert not [entry for entry in bench.told if entry[0] != "out of memory"]


def test_trouble_at_the_floor_again_and_again_wears_the_worker_out() -> None:
    """Then only a fresh process helps; the loop goes on until it comes."""
    bench = Bench(FakeBackend(trouble={"launch": above(5)}), TokenBudget(100, 100), max_batch_texts=1)
    for key in range(token_budget.MANY - 1):
        bench.ask((key, 20))
    worn_out = ("worn out", "out of memory again and again: 20 tokens")
    late = bench.ask((2, 20))
    fits = bench.ask((3, 5))
    said: list[bool] = []
    late.notify = lambda _: said.append(worn_out in bench.told) or bench.finished.append(-1)
    bench.tickets[0].notify = lambda _: said.append(worn_out in bench.told) or bench.finished.append(0)
    bench.run()
    assert (said, bench.told.count(worn_out), keys(fits)) == ([False, True], 1, [3])


@pytest.mark.parametrize("stage", STAGES)
def test_what_an_out_of_memory_error_holds_is_free_when_memory_is_given_back(stage: str) -> None:
    """The frames of the error, and of the one behind it, keep tensors; emptying the cache would not help."""

    class Tensor:
        pass

    def allocate() -> None:
        tensor = Tensor()
        alive.append(weakref.ref(tensor))
        raise RuntimeError("CUDA out of memory")

    alive: list[weakref.ref[Tensor]] = []
    left: list[int] = []

    def fail(batch: FakeBatch) -> None:
        if batch.texts == 1:
            return
        tensor = Tensor()
        alive.append(weakref.ref(tensor))
        try:
            allocate()
        except RuntimeError as error:
            raise OutOfMemoryError("no room") from error

    class Watched(FakeBackend):
        def trim(self) -> None:
            left.append(sum(ref() is not None for ref in alive))

    bench = Bench(Watched(trouble={stage: fail}))  # type: ignore[dict-item]
    bench.ask((2, 20), (3, 20), (4, 20), (5, 20))
    gc.disable()
    try:
        bench.run()
    finally:
        gc.enable()
    assert left == [0, 0, 0]
    assert keys(bench.tickets[0]) == [2, 3, 4, 5]


TEXTS = st.lists(st.tuples(st.integers(2, 20), st.integers(1, 90)), min_size=1, max_size=6)


@given(
    requests=st.lists(TEXTS, max_size=12),
    room=st.integers(20, 200),
    padded=st.booleans(),
    immediate=st.booleans(),
    stage=st.sampled_from(STAGES),
)
def test_every_request_ends_with_its_rows_or_its_own_error(
    *, requests: list[list[tuple[int, int]]], room: int, padded: bool, immediate: bool, stage: str
) -> None:
    """Whatever the batches, memory, bugs and poison: the requests at fault fail, and no others."""

    def trouble(batch: FakeBatch) -> Exception | None:
        return ValueError("boom") if BOOM in batch.keys else above(room)(batch)

    backend = FakeBackend(immediate, padded, trouble={stage: trouble}, values=not_a_number(7))
    bench = Bench(backend, TokenBudget(300, 100))
    for texts in requests:
        bench.ask(*texts)
    bench.run()
    for texts, ticket in zip(requests, bench.tickets, strict=True):
        found = {key for key, _ in texts}
        if ticket.error is None:
            assert not found & {BOOM, 7}
            assert [row.tolist() for row in ticket.rows if row is not None] == [list(text) for text in texts]
        else:
            assert found & {BOOM, 7} or max(tokens for _, tokens in texts) > room
    assert sorted(bench.finished) == list(range(len(requests)))
    assert not [entry for entry in bench.told if entry[0] == "lost"]
