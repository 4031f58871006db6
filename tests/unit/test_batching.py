# SPDX-License-Identifier: Apache-2.0
"""How texts are cut into forward passes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching import cut

LENGTHS = st.lists(st.integers(1, 12), max_size=20) | st.lists(st.integers(1, 600), max_size=60)
BUDGETS = st.integers(1, 40) | st.integers(1, 4096)


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 8, []),
        ([5], 8, [[0]]),
        ([9], 8, [[0]]),
        ([4, 4], 8, [[0, 1]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([3, 3, 3], 8, [[0, 1], [2]]),
        ([1, 8, 2], 8, [[1], [2, 0]]),
        ([2, 2, 9, 2, 2], 8, [[2], [0, 1, 3, 4]]),
    ],
)
def test_texts_are_cut_like_this(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    """The examples that one would draw on paper."""
    assert cut(lengths, budget) == expected


@given(LENGTHS, BUDGETS)
def test_every_text_is_in_exactly_one_batch(lengths: list[int], budget: int) -> None:
    """No text is lost, none is computed twice, and no batch is empty."""
    batches = cut(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@given(LENGTHS, BUDGETS)
def test_no_batch_costs_more_than_the_budget(lengths: list[int], budget: int) -> None:
    """Longest text times number of texts stays within the budget, unless a single text exceeds it."""
    for batch in cut(lengths, budget):
        assert len(batch) * max(lengths[index] for index in batch) <= budget or len(batch) == 1


@given(LENGTHS, BUDGETS)
def test_texts_come_longest_first_and_equal_ones_in_order(lengths: list[int], budget: int) -> None:
    """Similar lengths are neighbours, so that little is padded; among equals the earlier comes first."""
    order = [index for batch in cut(lengths, budget) for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


@given(LENGTHS, BUDGETS)
def test_no_batch_could_have_taken_the_next_text(lengths: list[int], budget: int) -> None:
    """A batch is closed only when it is full."""
    for batch, _ in pairwise(cut(lengths, budget)):
        assert (len(batch) + 1) * lengths[batch[0]] > budget
