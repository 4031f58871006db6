# SPDX-License-Identifier: Apache-2.0
"""From what was left behind to a collector: what is sent, what sent again, what is dropped and counted."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service import otlp, span_export
from service.metrics import SpanCounts
from service.otlp import Collector, ExportError
from service.settings import Settings
from service.span_export import Spans
from service.tickets import Entry, Ticket
from service.tracing import Span, begin_pass
from service.trail import Journey, Trail, followed

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Counters

    from service.trail import Pass

DEADLINE_S = 30.0


class Fake:
    """A collector in memory: raises the errors it was given, one a request, then takes everything."""

    def __init__(self, *errors: Exception, gate: threading.Event | None = None) -> None:
        self.taken: list[ExportTraceServiceRequest] = []
        self.tries, self.asked = 0, threading.Event()
        self._errors, self._gate = list(errors), gate

    def send(self, body: bytes) -> None:
        self.tries += 1
        self.asked.set()
        if self._gate is not None:
            self._gate.wait(DEADLINE_S)
        if self._errors:
            raise self._errors.pop(0)
        self.taken.append(ExportTraceServiceRequest.FromString(body))

    def close(self) -> None:
        pass

    @property
    def spans(self) -> int:
        return sum(
            len(scope.spans) for one in self.taken for r in one.resource_spans for scope in r.scope_spans
        )


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "TRIES_AFTER_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(span_export, "EVERY_S", 0.001)


@pytest.fixture
def spans_to(counters: Counters) -> Callable[[Any], Spans]:
    """Return a maker of exporters to a fake; they are not started."""
    return lambda collector: Spans(collector, 1.0, counters.slot, SpanCounts(counters.slot))


def one_pass() -> Pass:
    return begin_pass([Journey((b"t" * 16, b"s" * 8))], 0.0, 1.0, texts=1, requests=1, tokens=1)


def counted(counters: Counters) -> dict[str, float]:
    dropped = {labels[0]: value for labels, value in counters.read("warmfleet_spans_dropped_total").items()}
    return {k: v for k, v in dropped.items() if v} | {
        "exported": sum(counters.read("warmfleet_spans_exported_total").values())
    }


def test_what_is_left_is_exported(spans_to: Callable[[Any], Spans], counters: Counters) -> None:
    """All of it, at the end at the latest, and counted."""
    collector = Fake()
    spans = spans_to(collector)
    spans.start()
    for _ in range(200):
        spans.leave(one_pass())
    spans.close(DEADLINE_S)
    assert collector.spans == 200
    assert counted(counters) == {"exported": 200}


def test_what_may_be_taken_later_is_sent_again(spans_to: Callable[[Any], Spans], counters: Counters) -> None:
    """After a refused connection or a 503, three times; the spans are not lost, and nothing is logged."""
    collector = Fake(*[ExportError("it answered 503", again=True)] * 3)
    spans = spans_to(collector)
    spans.leave(one_pass())
    spans._export({})
    assert (collector.spans, collector.tries) == (1, 4)
    assert counted(counters) == {"exported": 1}


@pytest.mark.parametrize(
    ("errors", "tries"),
    [
        ([ExportError("it answered 400", again=False)], 1),
        ([ExportError("it answered 503", again=True)] * 4, 4),
        ([RuntimeError("a bug")], 1),
    ],
    ids=["refused", "never there", "a bug"],
)
def test_what_is_not_taken_is_dropped(
    spans_to: Callable[[Any], Spans],
    counters: Counters,
    caplog: pytest.LogCaptureFixture,
    errors: list[Exception],
    tries: int,
) -> None:
    """Counted, told once a minute and when it is over; the exporter goes on."""
    caplog.set_level(logging.INFO, "warmfleet")
    collector = Fake(*errors, *errors)
    spans = spans_to(collector)
    for _ in range(3):
        spans.leave(one_pass())
        spans._export({})
    assert collector.tries == 2 * tries + 1
    assert counted(counters) == {"exported": 1, "failed": 2}
    lost, again = [record.getMessage() for record in caplog.records]
    assert lost.startswith("1 spans could not be exported to the collector: ")
    assert again == "spans are exported to the collector again"


def test_a_full_queue_drops_and_counts(
    spans_to: Callable[[Any], Spans], counters: Counters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever leaves something never waits."""
    monkeypatch.setattr(span_export, "MOST_WAITING", 5)
    spans = spans_to(Fake())
    for _ in range(8):
        spans.leave(one_pass())
    assert counted(counters) == {"exported": 0, "full": 3}


def test_the_end_waits_for_no_collector(spans_to: Callable[[Any], Spans], counters: Counters) -> None:
    """What a collector that does not answer has not taken by then is dropped and counted."""
    gate = threading.Event()
    collector = Fake(gate=gate)
    spans = spans_to(collector)
    for _ in range(span_export.BATCH + 7):
        spans.leave(one_pass())
    spans.start()
    assert collector.asked.wait(DEADLINE_S)
    spans.close(0.2)
    found = counted(counters)
    gate.set()
    spans._thread.join(DEADLINE_S)
    assert found == {"exported": 0, "stopped": span_export.BATCH + 7}


def test_a_pass_without_a_traced_request_is_no_span(spans_to: Callable[[Any], Spans]) -> None:
    """Of those with one, the untraced requests count, and only the traced ones are linked."""
    spans = spans_to(Fake())
    traced = Journey((b"t" * 16, b"s" * 8))

    def entry(trail: Trail | None) -> Entry:
        with followed(trail):
            return Entry([1, 2, 3], Ticket(1, lambda _: None), 0, None, token_vectors=False)  # type: ignore[arg-type]

    nobody, unsampled = entry(None), entry(Trail("b"))
    spans.passed([nobody, unsampled], 0.0, 1.0, None)
    assert not spans._waiting
    spans.passed([nobody, unsampled, entry(Trail("c", "t", traced))], 0.0, 1.0, ValueError("x"))
    [made] = spans._waiting
    assert [made] == traced.passes
    assert (made.texts, made.requests, made.tokens, len(made.links), made.error) == (3, 3, 9, 1, "ValueError")


def test_without_an_endpoint_there_is_no_exporter() -> None:
    """Nothing is made and no thread started."""
    before = threading.active_count()
    assert Spans.of(Settings(backend="stub"), 0) is None
    assert threading.active_count() == before


# The messages


def test_a_span_is_put_into_opentelemetrys_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids, parent, kind, times on the wall's clock, attributes by type, links, status, flags."""
    monkeypatch.setattr(otlp.time, "time_ns", lambda: 1_000_000_000_000)
    monkeypatch.setattr(otlp.time, "perf_counter_ns", lambda: 50_000_000_000)
    span = Span(
        "POST /embed",
        (b"t" * 16, b"s" * 8),
        b"p" * 8,
        40.5,
        41.0,
        {"a": 1, "b": 0.5, "c": "x\ud800"},
        [(b"u" * 16, b"v" * 8)],
        is_server=True,
        failed=True,
        tracestate="k=v",
    )
    message = ExportTraceServiceRequest.FromString(otlp.encode([span], {"service.name": "mine"}))
    [resource] = message.resource_spans
    assert {one.key: one.value.string_value for one in resource.resource.attributes} == {
        "service.name": "mine"
    }
    [scope] = resource.scope_spans
    [found] = scope.spans
    assert (scope.scope.name, found.name, found.kind) == ("warmfleet", "POST /embed", found.SPAN_KIND_SERVER)
    assert (found.trace_id, found.span_id, found.parent_span_id) == (b"t" * 16, b"s" * 8, b"p" * 8)
    assert (found.start_time_unix_nano, found.end_time_unix_nano) == (990_500_000_000, 991_000_000_000)
    values = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in found.attributes}
    assert values == {"a": 1, "b": 0.5, "c": "x?"}
    assert [(link.trace_id, link.span_id) for link in found.links] == [(b"u" * 16, b"v" * 8)]
    assert (found.status.code, found.trace_state) == (found.status.STATUS_CODE_ERROR, "k=v")
    assert found.flags == 0x301


def test_a_span_without_a_parent_and_without_a_fault_says_so() -> None:
    """A root has no parent id; a status that is not an error is left unset, as the conventions want."""
    span = Span("forward pass", (b"t" * 16, b"s" * 8), b"", 0.0, 1.0, {})
    message = ExportTraceServiceRequest.FromString(otlp.encode([span], {}))
    found = message.resource_spans[0].scope_spans[0].spans[0]
    assert (found.parent_span_id, found.kind) == (b"", found.SPAN_KIND_INTERNAL)
    assert (found.status.code, found.flags) == (found.status.STATUS_CODE_UNSET, 0x101)


def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before our own; what is no list is left out."""
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    monkeypatch.delenv("OTEL_RESOURCE_ATTRIBUTES", raising=False)
    plain = otlp.resource(3)
    assert (plain["service.name"], plain["warmfleet.slot"]) == ("warmfleet", "s3")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=a,deployment.environment.name=x%20y")
    named = otlp.resource(3)
    assert (named["service.name"], named["deployment.environment.name"]) == ("a", "x y")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "b")
    assert otlp.resource(3)["service.name"] == "b"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "nonsense")
    assert otlp.resource(3) == plain | {"service.name": "b"}


@pytest.mark.parametrize(
    ("endpoint", "path"),
    [
        ("http://c:4318", "/v1/traces"),
        ("http://c:4318/", "/v1/traces"),
        ("http://c:4318/v1/traces", "/v1/traces"),
        ("https://c/otlp", "/otlp/v1/traces"),
    ],
)
def test_an_endpoint_is_a_base_to_which_otlps_path_is_added(endpoint: str, path: str) -> None:
    """Whoever wrote the whole address has it too."""
    assert Collector(endpoint, {})._path == path
