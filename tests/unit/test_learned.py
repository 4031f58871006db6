# SPDX-License-Identifier: Apache-2.0
"""Which shapes of real traffic are remembered, warmed, and forgotten."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.learned import (
    HALF_LIFE_S,
    TEXT_STEPS,
    TOKEN_STEPS,
    LearnedShape,
    ShapeHistogram,
    bucket_of,
    decay_after,
)

PASSES = st.lists(
    st.tuples(
        st.integers(1, 40) | st.integers(1, 1 << 40),
        st.integers(1, 600) | st.integers(1, 1 << 50),
        st.floats(0, 100),
    ),
    max_size=60,
)


def counted(passes: list[tuple[int, int, float]]) -> ShapeHistogram:
    """Return a table of these passes."""
    histogram = ShapeHistogram()
    for texts, tokens, seconds in passes:
        histogram.add(texts, tokens, seconds)
    return histogram


def test_a_bucket_keeps_count_seconds_and_its_largest_pass() -> None:
    """Passes that are alike share a bucket; the one with the most tokens stands for them."""
    histogram = counted([(4, 100, 1.0), (7, 110, 2.0), (5, 110, 0.5), (4, 91, 0.25)])
    assert histogram.learned() == (LearnedShape(texts=7, tokens=110, count=4.0, seconds=3.75),)
    assert histogram.shapes_for() == [(7, 16)]


def test_most_costly_shapes_come_first_and_cheap_ones_are_left_out() -> None:
    """By seconds, not by count: a thousand quick passes matter less than one slow one."""
    quick = [(1, 8, 0.0001)] * 1000
    histogram = counted([*quick, (32, 4096, 60.0), (2, 512, 40.0)])
    assert histogram.shapes_for(0.99) == [(32, 128), (2, 256)]
    assert histogram.shapes_for(0.59) == [(32, 128)]
    assert histogram.shapes_for(1.0) == [(32, 128), (2, 256), (1, 8)]
    assert histogram.shapes_for(1.0, most=1) == [(32, 128)]


def test_nothing_learned_gives_nothing_to_warm() -> None:
    """An empty table, and one whose passes took no time."""
    assert ShapeHistogram().shapes_for() == []
    assert counted([(1, 8, 0.0)]).shapes_for() == []


@pytest.mark.parametrize(
    ("texts", "tokens", "seconds"),
    [(0, 8, 1.0), (1, 0, 1.0), (-1, 8, 1.0), (1, 8, -1.0), (1, 8, math.nan), (1, 8, math.inf)],
)
def test_what_cannot_be_a_pass_is_not_counted(texts: int, tokens: int, seconds: float) -> None:
    """So that the manifest can always be written."""
    assert len(counted([(texts, tokens, seconds)])) == 0


@given(PASSES, st.floats(0, 1), st.integers(1, 12))
def test_learned_shapes_cover_the_asked_share(
    passes: list[tuple[int, int, float]], share: float, most: int
) -> None:
    """What is warmed took at least the share of all seconds, unless `most` shapes are not enough."""
    histogram = counted(passes)
    shapes = histogram.shapes_for(share, most)
    learned = histogram.learned()
    covered = math.fsum(s.seconds for s in learned if (s.texts, s.tokens_each) in shapes)
    wanted = share * math.fsum(s.seconds for s in learned)
    assert len(shapes) <= most
    assert len(set(shapes)) == len(shapes)
    assert len(shapes) == most or covered >= wanted * (1 - 1e-9)


@given(PASSES, st.integers(1, 20000))
def test_shapes_fit_the_budget_of_a_pass(passes: list[tuple[int, int, float]], budget: int) -> None:
    """Neither rounding up nor a budget that was lowered since makes a batch that warm-up has no room for."""
    shapes = counted(passes).shapes_for(1.0, 1000, max_batch_tokens=budget)
    assert all(texts >= 1 and tokens >= 1 and texts * tokens <= budget for texts, tokens in shapes)


@given(PASSES)
def test_buckets_stay_bounded(passes: list[tuple[int, int, float]]) -> None:
    """Whatever the traffic, each pass has its place in a table of fixed size."""
    assert all(0 <= bucket_of(texts, tokens) < TEXT_STEPS * TOKEN_STEPS for texts, tokens, _ in passes)
    assert len(counted(passes)) <= min(len(passes), TEXT_STEPS * TOKEN_STEPS)


def test_every_shape_at_once_stays_bounded() -> None:
    """Even the whole plane of shapes."""
    plane = [(1 << row, round(2 ** (column / 2)), 1.0) for row in range(40) for column in range(80)]
    assert len(counted(plane)) <= TEXT_STEPS * TOKEN_STEPS


@pytest.mark.parametrize(("smaller", "larger"), [((1, 90), (1, 91)), ((3, 64), (4, 64)), ((1, 63), (1, 64))])
def test_steps_are_powers_of_two_and_of_its_root(smaller: tuple[int, int], larger: tuple[int, int]) -> None:
    """90 is below 64 times the root of two, 91 above."""
    assert bucket_of(*smaller) != bucket_of(*larger)


@given(PASSES, PASSES)
def test_merging_is_counting_together(
    some: list[tuple[int, int, float]], others: list[tuple[int, int, float]]
) -> None:
    """Two workers' tables make the table that one worker would have had."""
    merged, together = counted(some), counted(some + others)
    merged.merge(counted(others))
    assert {bucket_of(s.texts, s.tokens): (s.texts, s.tokens, s.count) for s in merged.learned()} == {
        bucket_of(s.texts, s.tokens): (s.texts, s.tokens, s.count) for s in together.learned()
    }
    assert math.fsum(s.seconds for s in merged.learned()) == pytest.approx(
        math.fsum(s.seconds for s in together.learned())
    )


@given(PASSES)
def test_a_table_begins_with_what_another_learned(passes: list[tuple[int, int, float]]) -> None:
    """As the manifest does from boot to boot."""
    histogram = counted(passes)
    assert ShapeHistogram(histogram.learned()).learned() == histogram.learned()


def test_merge_with_decay_forgets() -> None:
    """Old passes weigh less, then nothing; new ones weigh in full; the share goes to what comes now."""
    histogram = counted([(1, 512, 1.0)] * 4)
    histogram.merge(counted([(8, 64, 1.0)]), decay=0.5)
    assert histogram.learned() == (LearnedShape(1, 512, 2.0, 2.0), LearnedShape(8, 64, 1.0, 1.0))
    for _ in range(3):
        histogram.merge(counted([(8, 64, 1.0)]), decay=0.5)
    assert histogram.learned() == (LearnedShape(8, 64, 1.875, 1.875),)


def test_half_is_left_after_the_half_life() -> None:
    """A clock that was set back forgets nothing."""
    found = [decay_after(0), decay_after(HALF_LIFE_S), decay_after(2 * HALF_LIFE_S), decay_after(-5.0)]
    assert found == [1.0, 0.5, 0.25, 1.0]


def test_take_leaves_an_empty_table() -> None:
    """What was taken can be put back if it could not be written."""
    histogram = counted([(1, 512, 1.0)])
    taken = histogram.take()
    assert len(histogram) == 0
    histogram.add(1, 512, 2.0)
    histogram.merge(taken)
    assert histogram.learned() == (LearnedShape(1, 512, 2.0, 3.0),)
