# SPDX-License-Identifier: Apache-2.0
"""Our metrics under text-embeddings-inference's names, derived at the scrape from our own. Pure; worker.

Nothing is counted twice: every value is a sum over the slots of families that were just collected.
What differs from the original is told in docs/metrics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    Known = Mapping[str, Metric]

INFERENCE = frozenset(
    (
        "/",
        "/embed",
        "/embed_all",
        "/embed_sparse",
        "/embeddings",
        "/predict",
        "/rerank",
        "/similarity",
        "/v1/embeddings",
    )
)
"""Endpoints whose requests it counts."""
METHOD = "batch"
"""It tells requests of a single text from lists; to us a single text is a batch of one."""
ANSWERED, GONE = "200", "499"
FAILURES = {
    "404": "validation",
    "413": "batch_size",
    "422": "validation",
    "429": "overloaded",
    "500": "inference",
    "503": "unhealthy",
    "504": "timeout",
}
"""Its word for a status. Others, such as 401, are answered before it counts anything."""
STAGES = {
    "te_request_duration": ("total", "Seconds of a request."),
    "te_request_tokenization_duration": ("tokenize", "Seconds of a request in the tokenizer."),
    "te_request_queue_duration": ("queue", "Seconds of a request in the queue."),
    "te_request_inference_duration": ("forward", "Seconds of a request in the model."),
}


def te_families(families: Iterable[Metric]) -> Iterator[Metric]:
    """Yield the families that dashboards and autoscalers made for text-embeddings-inference ask for."""
    known = {family.name: family for family in families}
    yield from _requests(known)
    yield from _texts(known)
    for name, (stage, text) in STAGES.items():
        yield from _histogram(name, text, known, "warmfleet_request_stage_seconds", stage=stage)
    yield from _histogram("te_batch_next_size", "Texts of a pass.", known, "warmfleet_batch_texts")
    text = "Tokens computed in a pass, padding included."
    yield from _histogram("te_batch_next_tokens", text, known, "warmfleet_batch_tokens")
    queued = _total(known, "warmfleet_queue_texts")
    yield GaugeMetricFamily("te_queue_size", "Texts that wait for a pass.", queued)


def _requests(known: Known) -> Iterator[Metric]:
    answered, gone = 0.0, 0.0
    failed = dict.fromkeys(FAILURES.values(), 0.0)
    requests = known.get("warmfleet_requests")
    for sample in requests.samples if requests else ():
        status = sample.labels["status"]
        if sample.labels["endpoint"] not in INFERENCE:
            continue
        if status == ANSWERED:
            answered += sample.value
        elif status == GONE:
            gone += sample.value
        elif status in FAILURES:
            failed[FAILURES[status]] += sample.value
    count = answered + gone + sum(failed.values())
    failed["dropped"] = _total(known, "warmfleet_dropped_texts", reason="abandoned")
    method = {"method": METHOD}
    yield _counter("te_request_count", "Requests that came to an end.", [(method, count)])
    yield _counter("te_request_success", "Requests answered with 200.", [(method, answered)])
    text = "Requests answered with an error, and texts whose client left (dropped)."
    yield _counter("te_request_failure", text, [({"err": err}, value) for err, value in failed.items()])


def _texts(known: Known) -> Iterator[Metric]:
    embedded = _total(known, "warmfleet_texts")
    dropped = _total(known, "warmfleet_dropped_texts")
    yield _counter("te_embed_count", "Texts embedded or given up.", [({}, embedded + dropped)])
    yield _counter("te_embed_success", "Texts embedded.", [({}, embedded)])


def _counter(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    """Return a counter called as it calls it: without `_total`, for which promtool wants it untyped."""
    family = Metric(name, text, "untyped")
    for labels, value in samples:
        family.add_sample(name, labels, value)
    return family


def _histogram(name: str, text: str, known: Known, source: str, **labels: str) -> Iterator[Metric]:
    """Yield the sum of a histogram over its slots; nothing, before the first worker is warm."""
    buckets: dict[str, float] = {}
    for sample in known[source].samples if source in known else ():
        if sample.name == f"{source}_bucket" and labels.items() <= sample.labels.items():
            limit = sample.labels["le"]
            buckets[limit] = buckets.get(limit, 0.0) + sample.value
    if buckets:
        family = HistogramMetricFamily(name, text)
        total = _total(known, source, f"{source}_sum", **labels)
        family.add_metric([], sorted(buckets.items(), key=lambda bucket: float(bucket[0])), total)
        yield family


def _total(known: Known, source: str, sample_name: str = "", **labels: str) -> float:
    """Return the sum of a family's samples, of those that carry the labels."""
    return sum(
        sample.value
        for sample in (known[source].samples if source in known else ())
        if (not sample_name or sample.name == sample_name) and labels.items() <= sample.labels.items()
    )
