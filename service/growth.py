# SPDX-License-Identifier: Apache-2.0
"""One step towards the planned number of workers, and who takes it. Pure; worker and arbiter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.slots import SlotRecord


def step(records: Sequence[SlotRecord], me: int, *, target: int, planned: int, loads: int) -> int:
    """Return +1 or -1 if this worker shall ask the arbiter for one worker more or fewer now, else 0.

    The lowest READY slot asks, so that two never do. The fleet grows only while fewer workers than load
    permits are on their way: each is measured before the next but those is added.

    Args:
        records: the scoreboard.
        me: the slot that asks.
        target: workers that Gunicorn keeps.
        planned: workers that shall run, a replacement included; 0: nothing was measured yet.
        loads: load permits.
    """
    ready = [record.slot for record in records if record.state is State.READY]
    if not planned or not ready or me != min(ready):
        return 0
    if target > planned:
        return -1
    warm = (State.READY, State.DRAINING)
    cold = sum(record.live and record.state not in warm and not record.out for record in records)
    live = sum(record.live and record.state is not State.DRAINING for record in records)
    return 1 if target < planned and live >= target and cold < loads else 0


@dataclass(frozen=True)
class Resize:
    """What a new number of workers leads to.

    Attributes:
        target: workers that Gunicorn shall keep.
        planned: workers that shall run from now on.
        clamped: whether less than was asked for fits.
    """

    target: int
    planned: int
    clamped: bool


def resized(new: int, old: int, *, planned: int, surge: int, fits: int, most: int, binding: bool) -> Resize:
    """Decide about TTIN and TTOU, a person's or the fleet's own.

    More than planned is a wish for more, as far as it fits; less than planned ends the growth.

    Args:
        new: workers asked for.
        old: workers until now.
        planned: workers that shall run; 0: nothing was measured yet.
        surge: 1 while a replacement runs beside the worker that it is for.
        fits: workers that fit; 0: unknown.
        most: that the table has rows for.
        binding: whether the budget is more than advice.
    """
    limit = min(most, fits) if fits and binding else most
    target = new if new <= old else min(new, max(old, limit))
    if not planned:
        return Resize(target, 0, target < new)
    if target > old:
        return Resize(target, planned if target <= planned + surge else target - surge, target < new)
    return Resize(target, min(planned, target), target < new)
