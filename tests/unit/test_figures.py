# SPDX-License-Identifier: Apache-2.0
"""Rates and quantiles between two status documents."""

from __future__ import annotations

from typing import Any

import pytest
from documents import LE, STAGES, document, totals

from service.commands.figures import between, quantile, same_life


def at(uptime: float, requests: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a document of a service that has answered so many requests."""
    return document(uptime=uptime, **changes) | {"totals": totals(requests)}


def test_rates_are_differences_over_the_services_own_clock() -> None:
    """A hundred requests of two texts in ten seconds, each ten tokens and half as many of padding."""
    found = between(at(100, 50), at(110, 150))
    assert found is not None
    assert (found.seconds, found.texts, found.tokens, found.batches) == (10, 20, 200, 10)
    assert (found.batch_texts, found.padding, found.refused) == (2, 0.2, 0)
    assert found.requests == {"200": 10, "429": 0}
    assert found.by_slot == {"0": 20}
    assert list(found.stages) == list(STAGES)
    total = found.stages["total"]
    assert (total.count, total.p50, total.mean) == (100, pytest.approx(0.0055), pytest.approx(0.005))


def test_an_idle_service_has_rates_of_nothing() -> None:
    """And no averages."""
    found = between(at(100, 50), at(110, 50))
    assert found is not None
    assert (found.texts, found.batch_texts, found.padding) == (0, None, None)
    assert found.stages["total"].p99 is None


@pytest.mark.parametrize(
    "after",
    [at(5, 3), at(110, 60, arbiter_pid=7), at(110, 60, host="pod-b"), at(100.05, 51)],
    ids=["uptime fell", "another arbiter", "another pod", "too close"],
)
def test_documents_that_cannot_be_compared_make_no_figures(after: dict[str, Any]) -> None:
    """A restart makes counters fall; another pod has counters of its own."""
    assert between(at(100, 50), after) is None


def test_a_life_goes_on_in_one_direction() -> None:
    """The same document twice is the same life."""
    assert same_life(at(100), at(100))
    assert not same_life(at(100), at(99))


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([10, 0, 0, 0, 0], 0.5, 0.0005),
        ([0, 10, 0, 0, 0], 1.0, 0.01),
        ([5, 5, 0, 0, 0], 0.5, 0.001),
        ([99, 0, 0, 1, 0], 0.99, 0.001),
        ([99, 0, 0, 1, 0], 1.0, 1.0),
        ([0, 0, 0, 0, 3], 0.5, 1.0),
        ([0, 0, 0, 0, 0], 0.5, None),
    ],
)
def test_quantiles_lie_within_their_bucket(counts: list[int], share: float, expected: float | None) -> None:
    """Evenly spread in it; beyond the last bound it is that bound."""
    found = quantile(LE, counts, share)
    assert found == (None if expected is None else pytest.approx(expected))
