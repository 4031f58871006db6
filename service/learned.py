# SPDX-License-Identifier: Apache-2.0
"""Which batch shapes real traffic has, and which of them the next boot should warm. Pure; worker.

Theory of operation. A pass is a number of texts and of tokens, never a text. Passes are counted in a table
of fixed size: powers of two of texts, steps of the root of two of tokens. The manifest carries the table
from boot to boot, and it forgets by time: whatever was counted before weighs half after `HALF_LIFE_S`. Time
rather than boots, so that it does not matter how many workers write, how often, or in which order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

TEXT_STEPS = 16
"""Powers of two: up to 32768 texts, beyond which all is one bucket."""
TOKEN_STEPS = 40
"""Steps of the root of two: up to 741455 tokens, likewise."""
HALF_LIFE_S = 7 * 24 * 3600.0
LEAST_COUNT = 0.5
"""What is left of one pass after one half-life; a bucket with less is forgotten."""


@dataclass(frozen=True)
class LearnedShape:
    """A bucket of the table as the manifest keeps it.

    Attributes:
        texts: of the pass with the most tokens.
        tokens: of that pass, all texts together.
        count: passes, those of earlier days for less than one each.
        seconds: that the passes took, weighed likewise.
    """

    texts: int
    tokens: int
    count: float
    seconds: float

    @property
    def tokens_each(self) -> int:
        """Tokens of each text if all were equally long."""
        return -(-self.tokens // self.texts)


@dataclass(slots=True)
class _Bucket:
    """A `LearnedShape` in the making."""

    texts: int
    tokens: int
    count: float = 0.0
    seconds: float = 0.0


def decay_after(seconds: float, half_life_s: float = HALF_LIFE_S) -> float:
    """Return what weighs one now, so many seconds later; a clock that went back changes nothing."""
    return math.exp2(-max(0.0, seconds) / half_life_s)


class ShapeHistogram:
    """The table of passes. One thread adds; another may `take` what is there meanwhile."""

    def __init__(self, shapes: Iterable[LearnedShape] = ()) -> None:
        """Begin with what an earlier table `learned`."""
        self._buckets: dict[int, _Bucket] = {}
        for shape in shapes:
            self._add(shape.texts, shape.tokens, shape.count, shape.seconds)

    def __len__(self) -> int:
        """Return the number of buckets in use, at most `TEXT_STEPS * TOKEN_STEPS`."""
        return len(self._buckets)

    def add(self, texts: int, tokens: int, seconds: float) -> None:
        """Count one pass: some microseconds. What cannot be a pass is not counted."""
        if texts > 0 and tokens > 0 and 0.0 <= seconds < math.inf:
            self._add(texts, tokens, 1.0, seconds)

    def _add(self, texts: int, tokens: int, count: float, seconds: float) -> None:
        place = bucket_of(texts, tokens)
        bucket = self._buckets.get(place)
        if bucket is None:
            bucket = self._buckets[place] = _Bucket(texts, tokens)
        bucket.tokens, bucket.texts = max((bucket.tokens, bucket.texts), (tokens, texts))
        bucket.count += count
        bucket.seconds += seconds

    def take(self) -> ShapeHistogram:
        """Return what was counted so far and begin anew; `merge` it back if it could not be kept."""
        taken = ShapeHistogram()
        taken._buckets, self._buckets = self._buckets, taken._buckets
        return taken

    def merge(self, other: ShapeHistogram, decay: float = 1.0) -> None:
        """Let what is here weigh `decay` times as much, and add all of the other."""
        if decay < 1.0:
            for place, bucket in list(self._buckets.items()):
                bucket.count *= decay
                bucket.seconds *= decay
                if bucket.count < LEAST_COUNT:
                    del self._buckets[place]
        for shape in other.learned():
            self._add(shape.texts, shape.tokens, shape.count, shape.seconds)

    def learned(self) -> tuple[LearnedShape, ...]:
        """Return the buckets, most costly first."""
        # A copy: the other thread may add a bucket meanwhile.
        found = [LearnedShape(b.texts, b.tokens, b.count, b.seconds) for b in list(self._buckets.values())]
        return tuple(sorted(found, key=lambda shape: (-shape.seconds, shape.tokens, shape.texts)))

    def shapes_for(
        self, share: float = 0.99, most: int = 8, *, max_batch_tokens: int | None = None
    ) -> list[tuple[int, int]]:
        """Return the batches to warm as (texts, tokens of each): those that took `share` of the time.

        Args:
            share: of all seconds, 0 to 1.
            most: batches, the most costly first, even if that is less than the share.
            max_batch_tokens: budget of one pass; what exceeds it, by the rounding up of tokens or since the
                budget was lowered, is cut.
        """
        shapes = self.learned()
        wanted = share * sum(shape.seconds for shape in shapes)
        covered = 0.0
        result: dict[tuple[int, int], None] = {}
        for shape in shapes:
            texts, tokens = shape.texts, shape.tokens_each
            if max_batch_tokens is not None:
                tokens = min(tokens, max_batch_tokens)
                texts = min(texts, max_batch_tokens // tokens)
            full = len(result) >= most and (texts, tokens) not in result
            if full or covered >= wanted:
                break
            result[texts, tokens] = None
            covered += shape.seconds
        return list(result)


def bucket_of(texts: int, tokens: int) -> int:
    """Return the place of a pass in the table, in whole numbers: the square's bits are the root's steps."""
    row = min(texts.bit_length() - 1, TEXT_STEPS - 1)
    column = min((tokens * tokens).bit_length() - 1, TOKEN_STEPS - 1)
    return row * TOKEN_STEPS + column
