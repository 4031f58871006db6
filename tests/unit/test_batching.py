# SPDX-License-Identifier: Apache-2.0
"""Which of the waiting texts share a forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching import PADDING, PASS_TOKENS, Batcher, BatchLimits

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(eq=False)
class Text:
    """A waiting text; `owner` is anything, compared by identity."""

    length: int
    owner: Any = None
    group: Any = 0
    before: int = 0


OWNERS = [object() for _ in range(3)]
LENGTHS = st.integers(1, 12) | st.integers(1, 600)
TEXTS = st.lists(st.builds(Text, length=LENGTHS, group=st.sampled_from("aab")), max_size=60)
LIMITS = st.builds(
    BatchLimits,
    tokens=st.integers(1, 40) | st.integers(1, 4096),
    texts=st.integers(1, 4) | st.integers(1, 64),
    padded=st.booleans(),
)


def cost(batch: Sequence[Text], *, padded: bool) -> int:
    """Return the tokens that a pass computes."""
    lengths = [text.length for text in batch]
    return max(lengths) * len(lengths) if padded else sum(lengths)


def batches(texts: Sequence[Text], limits: BatchLimits) -> list[list[Text]]:
    """Return the batches that the texts are cut into if nothing comes after them."""
    batcher: Batcher[Text] = Batcher()
    batcher.add(texts)
    result = []
    while batch := batcher.take(limits):
        result.append(batch)
    assert (len(batcher), batcher.tokens) == (0, 0)
    return result


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 8, []),
        ([5], 8, [[5]]),
        ([9], 8, [[9]]),
        ([4, 4], 8, [[4, 4]]),
        ([4, 4, 1], 8, [[4, 4], [1]]),
        ([1, 8, 2], 8, [[1], [8], [2]]),
        ([2, 2, 9, 2, 2], 8, [[2, 2], [9], [2, 2]]),
    ],
)
def test_packed_texts_are_cut_like_this(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    """Without padding the order of arrival decides, and a text too long for the rest waits for the next."""
    limits = BatchLimits(budget, 32, padded=False)
    cut = [[text.length for text in batch] for batch in batches([Text(n) for n in lengths], limits)]
    assert cut == expected


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 400, []),
        ([100, 10, 100, 12, 98], 310, [[100, 100, 98], [10, 12]]),
        ([10, 100, 12, 98, 100], 310, [[10, 12], [100, 100, 98]]),
        ([100, 130, 90], 400, [[100, 90, 130]]),
        ([100, 130, 60], 250, [[100], [130], [60]]),  # the nearest does not fit: what is farther pads more
        ([5, 9, 2, 30], 400, [[5, 2, 9], [30]]),
        ([500], 400, [[500]]),
        ([50, 50], 99, [[50], [50]]),
    ],
)
def test_padded_texts_are_cut_like_this(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    """Where padding exists, the oldest is joined by those nearest to its length, the shorter on a tie."""
    limits = BatchLimits(budget, 32, padded=True)
    cut = [[text.length for text in batch] for batch in batches([Text(n) for n in lengths], limits)]
    assert cut == expected


def test_an_empty_queue_gives_an_empty_batch() -> None:
    """Taking from nothing is no error, and changes nothing."""
    batcher: Batcher[Text] = Batcher()
    assert batcher.take(BatchLimits(8, 8, padded=True)) == []
    assert (len(batcher), batcher.tokens, batcher.clear()) == (0, 0, [])


@given(TEXTS, LIMITS)
def test_every_text_is_in_exactly_one_batch(texts: list[Text], limits: BatchLimits) -> None:
    """No text is lost, and none is computed twice."""
    taken = [id(text) for batch in batches(texts, limits) for text in batch]
    assert sorted(taken) == sorted(map(id, texts))


@given(TEXTS, LIMITS)
def test_no_batch_exceeds_a_limit(texts: list[Text], limits: BatchLimits) -> None:
    """Tokens computed and texts stay within the limits, but for a text that alone exceeds the tokens."""
    for batch in batches(texts, limits):
        assert len(batch) <= limits.texts
        assert len(batch) == 1 or cost(batch, padded=limits.padded) <= limits.tokens


@given(TEXTS, LIMITS)
def test_groups_are_never_mixed(texts: list[Text], limits: BatchLimits) -> None:
    """Token vectors and pooled ones, and prompts of unlike length, cannot share a pass."""
    for batch in batches(texts, limits):
        assert len({text.group for text in batch}) == 1


@given(TEXTS, LIMITS)
def test_padding_is_bounded(texts: list[Text], limits: BatchLimits) -> None:
    """A batch has a quarter of padding at most, or as much as another pass would cost."""
    for batch in batches(texts, limits):
        computed = cost(batch, padded=True)
        waste = computed - cost(batch, padded=False)
        assert not limits.padded or waste <= max(PASS_TOKENS, PADDING * computed)


@given(TEXTS, LIMITS)
def test_without_padding_each_group_is_first_come_first_served(
    texts: list[Text], limits: BatchLimits
) -> None:
    """Nobody overtakes in its group, and a batch is closed only if the next text would not have fitted."""
    limits = BatchLimits(limits.tokens, limits.texts, padded=False)
    cut = sorted(batches(texts, limits), key=lambda batch: batch[0].group)  # stable: their order stays
    for group, mine in groupby(cut, key=lambda batch: batch[0].group):
        parts = list(mine)
        assert [text for batch in parts for text in batch] == [t for t in texts if t.group == group]
        for batch, following in pairwise(parts):
            full = len(batch) == limits.texts
            assert full or cost([*batch, following[0]], padded=False) > limits.tokens


@given(st.lists(st.builds(Text, length=LENGTHS, group=st.sampled_from("aab")) | LIMITS, max_size=80))
def test_nobody_starves(steps: list[Text | BatchLimits]) -> None:
    """A text waits for at most as many batches as texts came before it, whatever comes after it."""
    batcher: Batcher[Text] = Batcher()
    waiting: list[Text] = []
    for step in [*steps, *[BatchLimits(64, 4, padded=True)] * len(steps)]:
        if isinstance(step, Text):
            step.before = len(waiting)
            batcher.add([step])
            waiting.append(step)
            continue
        batch = batcher.take(step)
        assert batch[:1] == waiting[:1]
        waiting = [text for text in waiting if text not in batch]
        for text in waiting:
            text.before -= 1
            assert text.before >= 0
        assert (len(batcher), batcher.tokens) == (len(waiting), sum(text.length for text in waiting))
    assert not waiting


@given(st.lists(st.builds(Text, length=LENGTHS, owner=st.sampled_from(OWNERS)), max_size=40))
def test_a_discarded_request_is_forgotten_and_no_other(texts: list[Text]) -> None:
    """Exactly the texts of one request leave the queue; the others keep their order."""
    batcher: Batcher[Text] = Batcher()
    batcher.add(texts)
    gone = OWNERS[1]
    mine, others = [t for t in texts if t.owner is gone], [t for t in texts if t.owner is not gone]
    assert (batcher.discard(gone), batcher.discard(gone)) == (len(mine), 0)
    assert (len(batcher), batcher.tokens) == (len(others), sum(text.length for text in others))
    assert batcher.clear() == others
    assert (len(batcher), batcher.tokens) == (0, 0)


def test_requests_that_are_equal_are_not_the_same() -> None:
    """A request is discarded by identity: one that looks alike stays."""
    batcher: Batcher[Text] = Batcher()
    mine: list[int] = []
    batcher.add([Text(1, mine), Text(2, [])])
    assert batcher.discard(mine) == 1
    assert [text.length for text in batcher.clear()] == [2]


@dataclass(eq=False)
class Counted:
    """Counts how often its length is asked for."""

    tokens: int
    looks: list[int] = field(default_factory=lambda: [0])
    owner: Any = None
    group: Any = 0

    @property
    def length(self) -> int:
        self.looks[0] += 1
        return self.tokens


@pytest.mark.parametrize(("padded", "most"), [(False, 5 * 50), (True, 4 * 5000)])
def test_thousands_may_wait(*, padded: bool, most: int) -> None:
    """A take looks at little more than its batch, and where lengths matter a few times at each text."""
    looks = [0]
    batcher: Batcher[Counted] = Batcher()
    batcher.add([Counted(8 + 37 * number % 120, looks) for number in range(5000)])
    while len(batcher):
        looks[0] = 0
        assert batcher.take(BatchLimits(4096, 50, padded=padded))
        assert looks[0] <= most
