# SPDX-License-Identifier: Apache-2.0
"""A worker's day in fake time: seeded arrivals, lengths and abandonments against the Batcher.

A seed that fails is the test's id. What a pass costs follows a CPU: a fixed part, and a part for each
token computed.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from service.batching import PADDING, PASS_TOKENS, Batcher, BatchLimits

SEEDS = range(8)
TEXTS = 1500
SECONDS_PER_TOKEN = 1e-4
NAIVE_TEXTS = 32
"""Of the batches that one would make without looking at lengths."""


@dataclass(eq=False)
class Text:
    """One text; each is a request of its own."""

    number: int
    length: int
    arrives: float
    leaves: float
    group: str
    before: int = 0

    @property
    def owner(self) -> Text:
        return self


@dataclass
class Day:
    """What happened."""

    batches: list[list[Text]] = field(default_factory=list)
    abandoned: list[Text] = field(default_factory=list)
    longest_queue: int = 0

    @property
    def padding(self) -> float:
        """Tokens computed if each batch is padded to its longest, for each real one."""
        return padding(self.batches)


def padding(batches: list[list[Text]]) -> float:
    real = sum(text.length for batch in batches for text in batch)
    return sum(len(batch) * max(text.length for text in batch) for batch in batches) / real


def texts(seed: int, load: float) -> list[Text]:
    """Return texts whose lengths are log-normal, and that come at `load` times what can be computed."""
    random_ = random.Random(seed)
    result, time = [], 0.0
    for number in range(TEXTS):
        time += random_.expovariate(load / (60 * SECONDS_PER_TOKEN))
        length = min(512, max(3, round(random_.lognormvariate(3.5, 1.0))))
        leaves = time + random_.expovariate(1 / 2.0) if random_.random() < 0.1 else float("inf")
        group = random_.choices(["pooled", "tokens"], [9, 1])[0]
        result.append(Text(number, length, time, leaves, group))
    return result


def simulate(arriving: list[Text], limits: BatchLimits) -> Day:
    """Take a batch whenever the device is free and something waits; check the promises at every step."""
    batcher: Batcher[Text] = Batcher()
    waiting: dict[int, Text] = {}
    leaving: list[tuple[float, int]] = []
    coming = list(reversed(arriving))
    day, time = Day(), 0.0
    while coming or waiting:
        if not waiting:
            time = max(time, coming[-1].arrives)
        while coming and coming[-1].arrives <= time:
            text = coming.pop()
            text.before = len(waiting)
            batcher.add([text])
            waiting[text.number] = text
            heapq.heappush(leaving, (text.leaves, text.number))
        while leaving and leaving[0][0] <= time:
            text_gone = waiting.pop(heapq.heappop(leaving)[1], None)
            if text_gone is not None:
                assert batcher.discard(text_gone) == 1
                day.abandoned.append(text_gone)
        day.longest_queue = max(day.longest_queue, len(waiting))
        batch = batcher.take(limits)
        check(batch, waiting, limits)
        for text in batch:
            del waiting[text.number]
        for text in waiting.values():
            text.before -= bool(batch)
            assert text.before >= 0, f"text {text.number} starves"
        assert (len(batcher), batcher.tokens) == (len(waiting), sum(t.length for t in waiting.values()))
        if batch:
            day.batches.append(batch)
            time += (PASS_TOKENS + cost(batch, limits)) * SECONDS_PER_TOKEN
    return day


def cost(batch: list[Text], limits: BatchLimits) -> int:
    lengths = [text.length for text in batch]
    return len(lengths) * max(lengths) if limits.padded else sum(lengths)


def check(batch: list[Text], waiting: dict[int, Text], limits: BatchLimits) -> None:
    """The oldest is in it; one group; within the limits; in order where order is promised."""
    assert bool(batch) == bool(waiting)
    if not batch:
        return
    assert batch[0] is next(iter(waiting.values()))
    assert len({text.group for text in batch}) == 1
    assert len(batch) <= limits.texts
    assert len(batch) == 1 or cost(batch, limits) <= limits.tokens
    if limits.padded:
        waste = cost(batch, limits) - sum(text.length for text in batch)
        assert waste <= max(PASS_TOKENS, PADDING * cost(batch, limits))
    else:
        mine = [text for text in waiting.values() if text.group == batch[0].group]
        assert batch == mine[: len(batch)]


def naive(day: Day) -> float:
    """Return the padding of the same texts in batches in the order of arrival."""
    order = sorted((text for batch in day.batches for text in batch), key=lambda text: text.number)
    return padding([order[at : at + NAIVE_TEXTS] for at in range(0, len(order), NAIVE_TEXTS)])


@pytest.mark.parametrize("load", [0.5, 0.9, 3.0])
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_promises_hold_all_day(seed: int, load: float, *, padded: bool) -> None:
    """Idle, busy or overrun: nobody starves, no limit is exceeded, and who left is not computed."""
    arriving = texts(seed, load)
    day = simulate(arriving, BatchLimits(2048, NAIVE_TEXTS, padded))
    computed = [text for batch in day.batches for text in batch]
    assert sorted(text.number for text in computed + day.abandoned) == list(range(TEXTS))
    print(f"{len(day.batches)} batches, queue up to {day.longest_queue}, {len(day.abandoned)} abandoned")


@pytest.mark.parametrize("seed", SEEDS)
def test_little_is_padded_where_padding_exists(seed: int) -> None:
    """With a queue to choose from, padding is a third of the real tokens at most; in order, more than all."""
    day = simulate(texts(seed, 3.0), BatchLimits(2048, NAIVE_TEXTS, padded=True))
    print(f"computed per real token: {day.padding:.2f}, in the order of arrival {naive(day):.2f}")
    print(f"{len(day.batches)} batches, queue up to {day.longest_queue}, {len(day.abandoned)} abandoned")
    assert day.padding <= 1.35
    assert naive(day) > 2


def test_a_seed_decides_everything() -> None:
    """The same seed gives the same day, so that a failure can be looked at again."""
    limits = BatchLimits(2048, NAIVE_TEXTS, padded=True)
    first, second = (
        [[text.number for text in batch] for batch in simulate(texts(1, 0.9), limits).batches]
        for _ in range(2)
    )
    assert first == second
