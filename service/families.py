# SPDX-License-Identifier: Apache-2.0
"""Metric families, made of samples. Worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from service.slots import SlotRecord

    Found = Iterator[GaugeMetricFamily | CounterMetricFamily]
    Samples = dict[tuple[str, ...], float]


def slot_name(record: SlotRecord) -> str:
    """Return what the label `slot` calls it."""
    return f"s{record.slot}"


def gauge(
    name: str, text: str, samples: Mapping[tuple[str, ...], float], labels: list[str] | None = None
) -> GaugeMetricFamily:
    """Return a gauge with these samples, by the values of its labels."""
    family = GaugeMetricFamily(f"warmfleet_{name}", text, labels=labels or [])
    for values, value in samples.items():
        family.add_metric(list(values), value)
    return family


def counter(
    name: str, text: str, samples: Mapping[tuple[str, ...], float], labels: list[str]
) -> CounterMetricFamily:
    """Return a counter likewise; `_total` is added to its name."""
    family = CounterMetricFamily(f"warmfleet_{name}", text, labels=labels)
    for values, value in samples.items():
        family.add_metric(list(values), value)
    return family
