# SPDX-License-Identifier: Apache-2.0
"""Which of the waiting texts go into the next forward pass. Pure, and without a clock; worker.

Batches are not waited for: while one computes, the next forms by itself. The oldest text is in
every batch, so nobody starves: a text that n others came before waits for n batches at most. Where
no padding is computed the others follow in the order of arrival; where it is, they are those
whose length is nearest to the oldest one's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

PADDING = 0.25
"""Of the tokens of a padded batch: more padding costs more than another pass."""
PASS_TOKENS = 32
"""What a pass costs by itself, in tokens: so much padding is always worth it."""


class Sized(Protocol):
    """A waiting text.

    Attributes:
        length: its tokens.
        owner: the request that it belongs to.
        group: only texts of one group may share a batch.
    """

    @property
    def length(self) -> int: ...  # noqa: D102 - above
    @property
    def owner(self) -> Hashable: ...  # noqa: D102 - above
    @property
    def group(self) -> Hashable: ...  # noqa: D102 - above


T = TypeVar("T", bound=Sized)


@dataclass(frozen=True)
class BatchLimits:
    """Of one forward pass.

    Attributes:
        tokens: computed, padding included; a single text may exceed it.
        texts: number of texts.
        padded: whether every text is padded to the longest.
    """

    tokens: int
    texts: int
    padded: bool


class Batcher(Generic[T]):
    """The texts that wait for a forward pass, in the order of their arrival."""

    def __init__(self) -> None:
        """Begin empty."""
        self._waiting: OrderedDict[int, T] = OrderedDict()
        self._number = 0
        self.tokens = 0

    def __len__(self) -> int:
        """Return how many texts wait."""
        return len(self._waiting)

    def add(self, entries: Sequence[T]) -> None:
        """Let texts wait."""
        for entry in entries:
            self._waiting[self._number] = entry
            self._number += 1
            self.tokens += entry.length

    def discard(self, owner: Hashable) -> int:
        """Forget the waiting texts of a request, and return how many there were."""
        mine = [number for number, entry in self._waiting.items() if entry.owner is owner]
        for number in mine:
            self.tokens -= self._waiting.pop(number).length
        return len(mine)

    def clear(self) -> list[T]:
        """Remove and return all of them."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        self.tokens = 0
        return waiting

    def take(self, limits: BatchLimits) -> list[T]:
        """Remove and return the next batch, the oldest text first; empty if nothing waits."""
        if not self._waiting:
            return []
        oldest = next(iter(self._waiting.values()))
        group = list(self._candidates(oldest, limits))
        chosen = _nearest(group, limits) if limits.padded else _first(group, limits)
        batch = []
        for number in chosen:
            entry = self._waiting.pop(number)
            self.tokens -= entry.length
            batch.append(entry)
        return batch

    def _candidates(self, oldest: T, limits: BatchLimits) -> Iterator[tuple[int, T]]:
        """Yield those that may share a batch with the oldest; all of them only if lengths matter."""
        seen = 0
        for number, entry in self._waiting.items():
            if entry.group != oldest.group:
                continue
            yield number, entry
            seen += entry.length
            if not limits.padded and seen > limits.tokens:
                return


def _first(group: list[tuple[int, T]], limits: BatchLimits) -> list[int]:
    """Choose in the order of arrival."""
    chosen: list[int] = []
    tokens = 0
    for number, entry in group[: limits.texts]:
        tokens += entry.length
        if chosen and tokens > limits.tokens:
            break
        chosen.append(number)
    return chosen


def _nearest(group: list[tuple[int, T]], limits: BatchLimits) -> list[int]:
    """Choose the oldest and, one by one, the text whose length is nearest to it, while padding pays."""
    (oldest, entry), *_ = group
    ranked = sorted(group, key=lambda pair: pair[1].length)
    lengths = [pair[1].length for pair in ranked]
    low = bisect_left(lengths, entry.length)
    while ranked[low][0] != oldest:
        low += 1
    high = low + 1
    chosen, tokens = [oldest], entry.length
    while len(chosen) < limits.texts:
        below = lengths[low - 1] if low else None
        above = lengths[high] if high < len(ranked) else None
        if below is None and above is None:
            break
        down = above is None or (below is not None and entry.length - below <= above - entry.length)
        length = below if down else above
        assert length is not None  # noqa: S101 - one of the two is there
        longest = max(lengths[high - 1], length)
        cost = longest * (len(chosen) + 1)
        waste = cost - tokens - length
        if cost > limits.tokens or waste > max(PASS_TOKENS, PADDING * cost):
            break
        low, high = (low - 1, high) if down else (low, high + 1)
        chosen.append(ranked[low][0] if down else ranked[high - 1][0])
        tokens += length
    return chosen
