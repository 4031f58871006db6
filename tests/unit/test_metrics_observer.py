# SPDX-License-Identifier: Apache-2.0
"""The engine's events as counters and histograms: every one adds what it says, and nothing else."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from service.backends.stub import StubBackend
from service.engine import Engine, Job, Limits, Observer, Times
from service.errors import TooLargeError
from service.metrics import BATCH_TEXTS_BUCKETS, DROP_REASONS, MetricsObserver, uncounted
from service.scoreboard import Scoreboard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from service.settings import Settings

COUNTERS = (
    "warmfleet_texts_total",
    "warmfleet_tokens_total",
    "warmfleet_rejected_texts_total",
    "warmfleet_padding_tokens_total",
    "warmfleet_out_of_memory_total",
)
BATCH = ("warmfleet_batch_texts", "warmfleet_batch_tokens", "warmfleet_batch_seconds")
STAGES = ("tokenize", "queue", "forward", "encode")
DECLARED = 512


@pytest.fixture
def board(counters: Any) -> Scoreboard:
    """Return a table in which the test's slot is warm."""
    board = Scoreboard(counters.slot + 1)
    board.rows[counters.slot].max_batch_tokens = DECLARED
    return board


@pytest.fixture
def observer(counters: Any, board: Scoreboard) -> MetricsObserver:
    """Return the observer of the test's slot."""
    return MetricsObserver(counters.slot, board)


def totals(counters: Any) -> dict[str, float]:
    """Return the counters without labels that are not 0, by name."""
    found = {name: counters.read(name)[()] for name in COUNTERS}
    return {name: value for name, value in found.items() if value}


def sums(counters: Any) -> dict[str, tuple[float, float]]:
    """Return count and sum of each pass histogram."""
    return {name: (counters.read(f"{name}_count")[()], counters.read(f"{name}_sum")[()]) for name in BATCH}


def test_every_series_is_there_from_the_start(counters: Any, observer: MetricsObserver) -> None:
    """A slot that has served nobody says 0, so that the first event already shows in `increase`."""
    assert totals(counters) == {}
    assert sums(counters) == dict.fromkeys(BATCH, (0, 0))
    assert counters.read("warmfleet_dropped_texts_total") == {(reason,): 0 for reason in DROP_REASONS}
    assert counters.read("warmfleet_request_stage_seconds_count") == {(stage,): 0 for stage in STAGES}


def test_a_request_adds_its_texts_its_tokens_and_each_stage(counters: Any, observer: MetricsObserver) -> None:
    """Two requests sum up; each stage has seen both."""
    observer.embedded(3, 21, Times(tokenize=0.25, queue=0.5, forward=2.0))
    observer.encoded(0.125)
    observer.embedded(1, 4, Times(tokenize=0.25, queue=0.0, forward=1.0))
    observer.encoded(0.125)
    assert totals(counters) == {"warmfleet_texts_total": 4, "warmfleet_tokens_total": 25}
    assert counters.read("warmfleet_request_stage_seconds_count") == {(stage,): 2 for stage in STAGES}
    assert counters.read("warmfleet_request_stage_seconds_sum") == {
        ("tokenize",): 0.5,
        ("queue",): 0.5,
        ("forward",): 3.0,
        ("encode",): 0.25,
    }


def test_refused_and_dropped_texts_are_counted_apart(counters: Any, observer: MetricsObserver) -> None:
    """A 429 is no drop, and each drop has its reason; none of them was embedded."""
    observer.rejected(32)
    observer.dropped("abandoned", 3)
    observer.dropped("deadline", 2)
    observer.dropped("abandoned", 1)
    assert totals(counters) == {"warmfleet_rejected_texts_total": 32}
    assert counters.read("warmfleet_dropped_texts_total") == {("abandoned",): 4, ("deadline",): 2}


def test_a_pass_adds_its_texts_what_it_computed_and_its_padding(
    counters: Any, observer: MetricsObserver
) -> None:
    """The padding ratio is padding over computed, both of the same passes."""
    observer.batch(texts=4, tokens=30, computed=40, seconds=0.25)
    observer.batch(texts=2, tokens=60, computed=60, seconds=0.5)
    assert totals(counters) == {"warmfleet_padding_tokens_total": 10}
    assert sums(counters) == {
        "warmfleet_batch_texts": (2, 6),
        "warmfleet_batch_tokens": (2, 100),
        "warmfleet_batch_seconds": (2, 0.75),
    }


def test_a_pass_that_computes_less_than_its_tokens_has_no_padding(
    counters: Any, observer: MetricsObserver
) -> None:
    """A backend that shares work between texts must not end the model thread with a negative count."""
    observer.batch(texts=2, tokens=60, computed=50, seconds=0.5)
    assert totals(counters) == {}


def test_batch_sizes_are_bucketed_by_powers_of_two(counters: Any, observer: MetricsObserver) -> None:
    """1, 2, 4 … 512: a pass lies in the first bucket that holds it, and in all beyond."""
    assert BATCH_TEXTS_BUCKETS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    for texts in (1, 3, 512, 513):
        observer.batch(texts, texts, texts, 0.1)
    found = {float(le): count for (le,), count in counters.read("warmfleet_batch_texts_bucket").items()}
    assert [found[size] for size in (1, 2, 4, 256, 512, float("inf"))] == [1, 1, 2, 2, 3, 4]


def test_out_of_memory_lowers_the_budget_on_the_scoreboard_at_once(
    counters: Any, observer: MetricsObserver, board: Scoreboard
) -> None:
    """The declared budget stays beside it, so that an alert can compare."""
    observer.out_of_memory(300)
    record = board.record(counters.slot)
    assert (record.max_batch_tokens, record.declared_batch_tokens) == (300, DECLARED)
    assert totals(counters) == {"warmfleet_out_of_memory_total": 1}


def test_a_recovery_raises_the_budget_and_is_no_event(
    counters: Any, observer: MetricsObserver, board: Scoreboard
) -> None:
    """At its floor the budget cannot shrink, and each event counts all the same; growing is none."""
    for budget in (256, 256):
        observer.out_of_memory(budget)
    for budget in (281, 306):
        observer.recovered(budget)
    assert board.record(counters.slot).max_batch_tokens == 306
    assert totals(counters) == {"warmfleet_out_of_memory_total": 2}


def test_the_next_worker_of_a_slot_goes_on_counting(
    counters: Any, observer: MetricsObserver, board: Scoreboard
) -> None:
    """A new observer finds the counters where the last one left them, and declares its own budget."""
    observer.embedded(2, 9, Times())
    board.rows[counters.slot].max_batch_tokens = 128
    MetricsObserver(counters.slot, board).embedded(1, 3, Times())
    assert totals(counters) == {"warmfleet_texts_total": 3, "warmfleet_tokens_total": 12}
    assert board.record(counters.slot).declared_batch_tokens == 128


# With an engine


@pytest.fixture
def make(stub_settings: Settings) -> Iterator[Callable[[Observer], Engine]]:
    """Return a maker of engines on the stub backend that compute in a thread of their own."""
    from concurrent.futures import ThreadPoolExecutor

    threads: list[tuple[Engine, ThreadPoolExecutor]] = []

    def make(observer: Observer) -> Engine:
        limits = Limits(
            max_batch_tokens=DECLARED,
            max_batch_texts=8,
            max_concurrent_texts=16,
            max_client_batch_size=16,
            auto_truncate=True,
            forward_timeout_s=60.0,
            request_timeout_s=60.0,
        )
        engine, thread = Engine(StubBackend(stub_settings), limits, observer=observer), ThreadPoolExecutor(1)
        engine.start(thread)
        threads.append((engine, thread))
        return engine

    yield make
    for engine, thread in threads:
        engine.close()
        thread.shutdown()


def test_what_an_engine_computes_is_what_is_counted(
    counters: Any, observer: MetricsObserver, make: Callable[[Observer], Engine]
) -> None:
    """Ten texts of three words are fifty tokens, in two passes of at most eight texts."""
    asyncio.run(make(observer).run(Job(["one two three"] * 10)))
    assert totals(counters) == {"warmfleet_texts_total": 10, "warmfleet_tokens_total": 50}
    (passes, texts), (_, computed), _ = sums(counters).values()
    assert (passes, texts, computed) == (2, 10, 50)


def test_a_rehearsal_is_not_counted(
    counters: Any, observer: MetricsObserver, make: Callable[[Observer], Engine]
) -> None:
    """Neither its texts nor its passes; what comes after it is, also after one that failed."""
    engine = make(observer)
    with uncounted(engine):
        asyncio.run(engine.run(Job(["not traffic"])))
    with pytest.raises(TooLargeError), uncounted(engine):
        asyncio.run(engine.run(Job(["too many"] * 17)))
    assert (totals(counters), sums(counters)) == ({}, dict.fromkeys(BATCH, (0, 0)))
    asyncio.run(engine.run(Job(["one two"])))
    assert totals(counters) == {"warmfleet_texts_total": 1, "warmfleet_tokens_total": 4}
    assert sums(counters)["warmfleet_batch_texts"] == (1, 1)
