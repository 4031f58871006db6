# SPDX-License-Identifier: Apache-2.0
"""text-embeddings-inference's names: every value is a sum of our own, and the names are its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from service import te_metrics
from service.app import create_app
from service.metrics import DROP_REASONS
from service.settings import Settings
from service.te_metrics import FAILURES, INFERENCE, te_families

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prometheus_client.metrics_core import Metric

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
NOT_INFERENCE = {"/tokenize", "/decode"}
"""POST endpoints that text-embeddings-inference does not count either."""
LIMITS = ("0.5", "2.0", "10.0", "+Inf")


def requests(*samples: tuple[str, str, str, float]) -> Metric:
    """Return our requests: slot, endpoint, status, count."""
    family = CounterMetricFamily("warmfleet_requests", "x", labels=["slot", "endpoint", "status"])
    for *labels, value in samples:
        family.add_metric(labels, value)
    return family


def dropped(*samples: tuple[str, str, float]) -> Metric:
    family = CounterMetricFamily("warmfleet_dropped_texts", "x", labels=["slot", "reason"])
    for *labels, value in samples:
        family.add_metric(labels, value)
    return family


def by_slot(kind: type[CounterMetricFamily | GaugeMetricFamily], name: str, *values: float) -> Metric:
    family = kind(name, "x", labels=["slot"])
    for slot, value in enumerate(values):
        family.add_metric([f"s{slot}"], value)
    return family


def histogram(name: str, *rows: tuple[dict[str, str], Sequence[int], float]) -> Metric:
    """Return one of our histograms: labels, counts up to each limit, sum."""
    family = HistogramMetricFamily(name, "x", labels=list(rows[0][0]))
    for labels, counts, total in rows:
        family.add_metric(list(labels.values()), list(zip(LIMITS, counts, strict=True)), total)
    return family


def samples(*families: Metric) -> dict[tuple[str, ...], float]:
    """Return what comes of our families, by name and label values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in te_families(families)
        for sample in family.samples
    }


def test_requests_are_those_of_the_model_over_all_slots() -> None:
    """Probes, tokenisation, unknown paths and what the key or the method ruled out are no requests to it."""
    found = samples(
        requests(
            ("s0", "/embed", "200", 5),
            ("s1", "/v1/embeddings", "200", 4),
            ("s1", "/rerank", "200", 1),
            ("s0", "/", "429", 3),
            ("s0", "/embed", "499", 2),
            ("s0", "/embed", "401", 100),
            ("s0", "/embed", "405", 100),
            ("s0", "/health", "200", 100),
            ("s0", "/tokenize", "200", 100),
            ("s0", "other", "404", 100),
        )
    )
    assert found["te_request_count", "batch"] == 15
    assert found["te_request_success", "batch"] == 10


@pytest.mark.parametrize(("status", "err"), FAILURES.items())
def test_each_failure_has_a_word(status: str, err: str) -> None:
    """An error status is one failure with the word that docs/metrics.md gives for it."""
    found = samples(requests(("s0", "/embed", status, 2), ("s1", "/embed", status, 1)))
    failures = {labels[0]: value for (name, *labels), value in found.items() if name == "te_request_failure"}
    assert failures == dict.fromkeys(("dropped", *FAILURES.values()), 0) | {err: 3}
    assert re.search(rf"\b{status}\b[ \w]*`{err}`", DOCS.read_text(encoding="utf-8"))


def test_dropped_are_the_texts_whose_client_left() -> None:
    """They are failures, and no requests: those count by their status, which is 499."""
    assert DROP_REASONS == ("abandoned", "deadline")
    found = samples(
        dropped(("s0", "abandoned", 2), ("s1", "abandoned", 3), ("s0", "deadline", 7)),
        by_slot(CounterMetricFamily, "warmfleet_texts", 20, 10),
    )
    assert found["te_request_failure", "dropped"] == 5
    assert found["te_request_count", "batch"] == 0
    assert (found["te_embed_count",], found["te_embed_success",]) == (42, 30)


def test_histograms_are_summed_over_the_slots() -> None:
    """Buckets, count and sum of both slots, one stage to one name, in the order of their limits."""
    stages = {"total": 1, "tokenize": 2, "queue": 3, "forward": 4, "encode": 5}
    rows = [
        ({"slot": slot, "stage": stage}, [n, 2 * n, 2 * n, 3 * n], 0.5 * n)
        for slot in ("s0", "s1")
        for stage, n in stages.items()
    ]
    families = list(te_families([histogram("warmfleet_request_stage_seconds", *rows)]))
    found = {
        family.name: [(s.name.removeprefix(family.name), s.labels.get("le"), s.value) for s in family.samples]
        for family in families
        if family.type == "histogram"
    }
    assert found == {
        f"te_request_{name}": [
            ("_bucket", "0.5", 2 * n),
            ("_bucket", "2.0", 4 * n),
            ("_bucket", "10.0", 4 * n),
            ("_bucket", "+Inf", 6 * n),
            ("_count", None, 6 * n),
            ("_sum", None, n),
        ]
        for name, n in {
            "duration": 1,
            "tokenization_duration": 2,
            "queue_duration": 3,
            "inference_duration": 4,
        }.items()
    }


def test_passes_and_queue_have_its_names() -> None:
    """Size and tokens of a pass are histograms, the queue's length is a gauge."""
    found = samples(
        histogram("warmfleet_batch_texts", ({"slot": "s0"}, [0, 1, 2, 2], 6)),
        histogram("warmfleet_batch_tokens", ({"slot": "s0"}, [0, 0, 1, 2], 21)),
        by_slot(GaugeMetricFamily, "warmfleet_queue_texts", 4, 0, 3),
    )
    assert (found["te_batch_next_size_count",], found["te_batch_next_size_sum",]) == (2, 6)
    assert (found["te_batch_next_tokens_count",], found["te_batch_next_tokens_sum",]) == (2, 21)
    assert found["te_queue_size",] == 7


def test_a_service_without_a_warm_worker_has_zeros_and_no_histograms() -> None:
    """An autoscaler that asks during the boot finds an empty queue instead of no answer."""
    found = samples()
    assert set(found.values()) == {0}
    assert {name for name, *_ in found} == {
        "te_request_count",
        "te_request_success",
        "te_request_failure",
        "te_embed_count",
        "te_embed_success",
        "te_queue_size",
    }


def test_every_name_is_documented_and_no_other() -> None:
    """docs/metrics.md has a row for each family, with its labels."""
    empty = ({"slot": "s0"}, [0, 0, 0, 0], 0)
    stages = [
        ({"slot": "s0", "stage": stage}, [0, 0, 0, 0], 0)
        for stage in ("total", "tokenize", "queue", "forward")
    ]
    families = te_families(
        [
            histogram("warmfleet_request_stage_seconds", *stages),
            histogram("warmfleet_batch_texts", empty),
            histogram("warmfleet_batch_tokens", empty),
        ]
    )
    made = {family.name: ", ".join(set(family.samples[0].labels) - {"le"}) for family in families}
    rows = re.findall(r"^\| `(te_\w+)` \| ([\w, ]*?) ?\|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == made


def test_every_endpoint_of_the_model_is_known() -> None:
    """An endpoint that is added to the API must be counted as a request to the model, or named here."""
    routes = create_app(Settings(backend="stub")).routes
    posts = {
        getattr(route, "path", "") for route in routes if "POST" in (getattr(route, "methods", None) or ())
    }
    assert posts == INFERENCE | NOT_INFERENCE


def test_it_reads_families_that_exist() -> None:
    """Each of our names in the module is a family of the counter files, or of the scoreboard."""
    from prometheus_client.metrics import MetricWrapperBase

    from service import metrics

    source = Path(te_metrics.__file__).read_text(encoding="utf-8")
    counted = {m._name for m in vars(metrics).values() if isinstance(m, MetricWrapperBase)}
    assert set(re.findall(r'"(warmfleet_\w+)"', source)) - counted == {"warmfleet_queue_texts"}
