# SPDX-License-Identifier: Apache-2.0
"""How texts are cut into forward passes. Pure; worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def cut(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Return batches of indices, similar lengths together, longest first.

    A padded batch costs its longest text times its number of texts; no batch costs more than
    `max_batch_tokens`, except one text that is longer by itself.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and longest * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches
