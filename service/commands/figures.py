# SPDX-License-Identifier: Apache-2.0
"""Rates and quantiles between two status documents of one service. Pure; command line."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Document = Mapping[str, Any]

LEAST_S = 0.2
"""Between two documents; below it rates are noise."""


@dataclass(frozen=True)
class Stage:
    """Seconds that requests spent in one stage; None: there were none.

    Attributes:
        count: of requests.
        p50: half of them took no longer.
        p99: nearly all of them.
        mean: sum by count.
    """

    count: int
    p50: float | None
    p99: float | None
    mean: float | None


@dataclass(frozen=True)
class Figures:
    """What happened between two documents.

    Attributes:
        seconds: that lie between them.
        texts: a second.
        tokens: a second.
        requests: a second, by status.
        batches: a second.
        batch_texts: texts of a batch, on average; None: there was none.
        padding: share of the computed tokens; None: nothing was computed.
        stages: by name, in the service's order.
        by_slot: texts a second of each slot.
    """

    seconds: float
    texts: float
    tokens: float
    requests: Mapping[str, float]
    batches: float
    batch_texts: float | None
    padding: float | None
    stages: Mapping[str, Stage]
    by_slot: Mapping[str, float]

    @property
    def refused(self) -> float:
        """Requests a second that were answered 429."""
        return self.requests.get("429", 0.0)


def same_life(before: Document, after: Document) -> bool:
    """Whether two documents are of one service that was not restarted between them, in this order."""
    old, new = before["service"], after["service"]
    identity = ("host", "arbiter_pid")
    return (
        all(old.get(key) == new.get(key) for key in identity)
        and new["uptime_seconds"] >= old["uptime_seconds"]
    )


def between(before: Document, after: Document) -> Figures | None:
    """Return what happened between two documents; None if they are not comparable, or too close."""
    seconds = after["service"]["uptime_seconds"] - before["service"]["uptime_seconds"]
    if not same_life(before, after) or seconds < LEAST_S:
        return None
    old, new = before["totals"], after["totals"]

    def risen(name: str) -> float:
        return max(0.0, float(new.get(name, 0)) - float(old.get(name, 0)))

    batches, texts, tokens = risen("batches"), risen("texts"), risen("tokens")
    computed = tokens + risen("padding_tokens")
    return Figures(
        seconds,
        texts / seconds,
        tokens / seconds,
        {status: count / seconds for status, count in _risen(old["requests"], new["requests"]).items()},
        batches / seconds,
        risen("batch_texts") / batches if batches else None,
        risen("padding_tokens") / computed if computed else None,
        _stages(old["stages"], new["stages"]),
        {
            slot: max(0.0, row["texts"] - old["by_slot"].get(slot, {}).get("texts", 0)) / seconds
            for slot, row in new["by_slot"].items()
        },
    )


def _risen(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: max(0.0, count - before.get(name, 0)) for name, count in after.items()}


def _stages(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Stage]:
    bounds: Sequence[float] = after["le"]
    found = {}
    for name, counts in after["counts"].items():
        old = before["counts"].get(name) or [0] * len(counts)
        new = [max(0, now - then) for now, then in zip(counts, old, strict=True)]
        total = sum(new)
        spent = after["sums"].get(name, 0.0) - before["sums"].get(name, 0.0)
        found[name] = Stage(
            total,
            quantile(bounds, new, 0.5),
            quantile(bounds, new, 0.99),
            spent / total if total else None,
        )
    return found


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Return the value that a share of the counted ones does not exceed; None if nothing was counted.

    Within a bucket values count as evenly spread; beyond the last bound nothing is known but the bound.

    Args:
        bounds: upper bounds of the buckets, rising.
        counts: of each bucket, not cumulative; one more for what is beyond the last bound.
        share: 0 to 1.
    """
    total = sum(counts)
    if not total:
        return None
    rank = share * total
    for nth, reached in enumerate(accumulate(counts)):
        if reached >= rank and counts[nth]:
            if nth >= len(bounds):
                break
            low = bounds[nth - 1] if nth else 0.0
            return low + (bounds[nth] - low) * (rank - (reached - counts[nth])) / counts[nth]
    return bounds[-1]
