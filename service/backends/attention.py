# SPDX-License-Identifier: Apache-2.0
"""Attention that stays inside each text of a packed batch. The only part of a model that sees text bounds.

A packed batch has no padding: the tokens of all texts, one after another. Everything in an encoder but
attention treats tokens one by one, and needs not know where a text ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Bounds:
    """Where the texts of a packed batch lie.

    Attributes:
        lengths: tokens of each text; equal ones should be neighbours, they are computed together.
        cumulative: int32 of shape (texts + 1,) on the device: where each text starts; the last is the end.
    """

    lengths: Sequence[int]
    cumulative: torch.Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(self.lengths)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbours of equal length: first token, texts, tokens of each."""
        runs, start = [], 0
        for length, group in groupby(self.lengths):
            texts = sum(1 for _ in group)
            runs.append((start, texts, length))
            start += texts * length
        return runs


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Bounds,
    *,
    scale: float | None = None,
    window: int | None = None,
    bias: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the attention of each token to the tokens of its own text.

    Args:
        query: shape (tokens, heads, size), as are key, value and the result.
        key: see query.
        value: see query.
        bounds: where the texts lie.
        scale: of the scores; default: one over the square root of `size`.
        window: tokens to each side that a token may attend to; default: all.
        bias: of a length, returns what is added to the scores, shape (heads, length, length).
    """
    if query.is_cuda and query.dtype is not torch.float32 and bias is None:
        return _kernel(query, key, value, bounds, scale=scale, window=window)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start, texts, length in bounds.runs:
        here = slice(start, start + texts * length)
        q, k, v = (t[here].view(texts, length, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
        mask = bias(length)[None] if bias else _band(length, window, query.device)
        attended = functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        out[here].view(texts, length, *out.shape[1:]).copy_(attended.transpose(1, 2))
    return out


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Bounds,
    *,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Call the variable-length kernel of torch 2.11 and later: half precision on CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    sides = (-1, -1) if window is None else (window, window)
    # The kernel takes any strides but that of the last dimension: slices of one product need no copy.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    starts, longest = bounds.cumulative, bounds.longest
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=sides)
    return cast("torch.Tensor", out)  # a pair only where more is asked for


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return who may attend to whom, None for all to all."""
    if window is None or length <= window + 1:
        return None
    places = torch.arange(length, device=device)
    return (places[:, None] - places[None, :]).abs() <= window
