# SPDX-License-Identifier: Apache-2.0
"""Attention within the texts of a packed batch, against one softmax over all its tokens with a mask."""

from __future__ import annotations

import random

import pytest
import torch

from service.backends.attention import Bounds, attend

HEADS, SIZE = 3, 8


def bounds(lengths: list[int]) -> Bounds:
    """Return the bounds of texts of some lengths."""
    return Bounds(lengths, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32))


def inputs(tokens: int) -> list[torch.Tensor]:
    """Return query, key and value as a model gives them: views into one tensor."""
    torch.manual_seed(tokens)
    return list(torch.randn(tokens, 3, HEADS, SIZE).unbind(1))


def plain(
    lengths: list[int],
    *,
    scale: float = SIZE**-0.5,
    window: int | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention of all tokens to all, those of other texts masked."""
    query, key, value = (t.transpose(0, 1) for t in inputs(sum(lengths)))
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(length) for length in lengths])
    distance = place[:, None] - place[None, :]
    mine = text[:, None] == text[None, :]
    if window is not None:
        mine &= distance.abs() <= window
    scores = query @ key.transpose(1, 2) * scale
    if table is not None:
        scores += table[:, distance]
    return (scores.masked_fill(~mine, float("-inf")).softmax(-1) @ value).transpose(0, 1)


LENGTHS = [[1], [5], [1, 1, 1], [2, 2, 3, 7, 7, 7, 12], [12, 3, 3, 5, 1], [40, 40]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", [None, 0, 2, 6, 100])
def test_tokens_attend_to_their_own_text_within_the_window(lengths: list[int], window: int | None) -> None:
    """Any mix of lengths, sorted or not, with a local window shorter and longer than the texts."""
    found = attend(*inputs(sum(lengths)), bounds(lengths), window=window)
    assert found.is_contiguous()
    torch.testing.assert_close(found, plain(lengths, window=window), rtol=0, atol=2e-6)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_scale_and_bias_reach_the_scores(lengths: list[int]) -> None:
    """A model may scale its scores otherwise, and add what depends on the distance of two tokens."""
    table = torch.randn(HEADS, 100)  # indices wrap around: distance -1 is the last

    def bias(length: int) -> torch.Tensor:
        place = torch.arange(length)
        return table[:, place[:, None] - place[None, :]]

    found = attend(*inputs(sum(lengths)), bounds(lengths), scale=0.1, bias=bias)
    torch.testing.assert_close(found, plain(lengths, scale=0.1, table=table), rtol=0, atol=2e-6)


def test_neighbours_of_equal_length_are_one_run() -> None:
    """What is computed together: first token, texts, tokens of each."""
    assert bounds([2, 2, 3, 1, 1, 1, 2]).runs == [(0, 2, 2), (4, 1, 3), (7, 3, 1), (10, 1, 2)]
    assert bounds([2, 2, 3, 1]).longest == 3


def test_bfloat16_is_rounded_and_nothing_else() -> None:
    """Half precision keeps the direction."""
    lengths = [random.Random(1).randint(1, 20) for _ in range(10)]
    found = attend(*(t.bfloat16() for t in inputs(sum(lengths))), bounds(lengths), window=4)
    assert found.dtype is torch.bfloat16
    cosines = torch.cosine_similarity(found.float(), plain(lengths, window=4), dim=-1)
    assert float(cosines.min()) >= 0.999
