# SPDX-License-Identifier: Apache-2.0
"""Who is traced, which ids a request gets, and which spans follow from what it left behind."""

from __future__ import annotations

from typing import Any

import pytest

from service.tracing import (
    MOST_LINKS,
    Visit,
    arrive,
    begin_pass,
    chosen,
    forward_of,
    parent_of,
    span_of,
    spans_in,
    spans_of,
)
from service.trail import Journey

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01".encode(), f"00-{TRACE}-{SPAN}-00".encode()
PLACE = bytes.fromhex(TRACE), bytes.fromhex(SPAN)

# Request ids


@pytest.mark.parametrize("given", [b"a", b"a-client's-own/id:1+2=3", b"~" * 128])
def test_a_client_may_choose_the_id(given: bytes) -> None:
    """Up to 128 characters that can be seen."""
    assert arrive({b"x-request-id": given}, None).request_id == given.decode()


@pytest.mark.parametrize(
    "given", [b"", b"a b", b"a\tb", b"a\nb", "ä".encode(), b"\x1b[1m", b"\x7f", b"a" * 129]
)
def test_what_is_no_id_gets_a_fresh_one(given: bytes) -> None:
    """Nothing that a log line or a header could break on is taken over; no two ids are the same."""
    ids = {arrive({b"x-request-id": given} if given else {}, None).request_id for _ in range(50)}
    assert len(ids) == 50
    assert {len(one) for one in ids} == {24}


# Who is traced


def test_a_traceparent_is_read_as_w3c_writes_it() -> None:
    """Trace, span, and whether it is sampled; other flags mean nothing here."""
    assert parent_of(SAMPLED) == (PLACE, True)
    assert parent_of(UNSAMPLED) == (PLACE, False)
    assert parent_of(f"00-{TRACE}-{SPAN}-02".encode()) == (PLACE, False)
    assert parent_of(f" 00-{TRACE}-{SPAN}-03 ".encode()) == (PLACE, True)
    assert parent_of(f"01-{TRACE}-{SPAN}-01-and-more".encode()) == (PLACE, True)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "00",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-0x",
    ],
)
def test_a_traceparent_that_is_not_valid_is_none(given: str) -> None:
    """The request begins a trace of its own."""
    assert parent_of(given.encode()) is None
    trail = arrive({b"traceparent": given.encode()}, 1.0)
    assert trail.journey is not None
    assert trail.trace_id not in ("", TRACE)
    assert trail.journey.parent_id == b""


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_client_decides(ratio: float) -> None:
    """Its decision goes before the ratio, and its trace is the request's."""
    yes, no = (arrive({b"traceparent": one, b"tracestate": b"a=1"}, ratio) for one in (SAMPLED, UNSAMPLED))
    assert (yes.trace_id, no.trace_id, no.journey) == (TRACE, TRACE, None)
    assert yes.journey is not None
    assert (yes.journey.place[0], yes.journey.parent_id, yes.journey.tracestate) == (*PLACE, "a=1")
    assert yes.journey.place[1] != PLACE[1]


def test_without_a_client_the_ratio_decides() -> None:
    """None of the requests at 0, all at 1; each has a trace id for the log."""
    for ratio, wanted in ((0.0, 0), (1.0, 100)):
        trails = [arrive({}, ratio) for _ in range(100)]
        assert sum(trail.journey is not None for trail in trails) == wanted
        assert len({trail.trace_id for trail in trails}) == 100


def test_the_ratio_decides_by_the_trace_id_alone() -> None:
    """As OpenTelemetry's own sampler does, so that every service of a trace decides alike."""
    low, high = bytes(16), b"\xff" * 16
    assert [chosen(low, ratio) for ratio in (0.0, 0.001, 1.0)] == [False, True, True]
    assert [chosen(high, ratio) for ratio in (0.0, 0.999, 1.0)] == [False, False, True]
    assert chosen(b"\xff" * 8 + (2**62).to_bytes(8, "big"), 0.26)
    assert not chosen(b"\xff" * 8 + (2**62).to_bytes(8, "big"), 0.25)


def test_where_no_spans_are_made_a_clients_trace_is_for_the_log() -> None:
    """Nothing is kept for a span, and nobody else gets a trace id."""
    sent, own = arrive({b"traceparent": SAMPLED}, None), arrive({}, None)
    assert (sent.trace_id, sent.journey) == (TRACE, None)
    assert (own.trace_id, own.journey) == ("", None)


# Spans


def journey(**marks: float) -> Journey:
    return Journey(PLACE, b"parent!!", "a=1", **marks)  # type: ignore[arg-type]


def visit(left: Journey, **others: Any) -> Visit:
    seen: dict[str, Any] = {
        "journey": left,
        "request_id": "request-1",
        "method": "POST",
        "path": "/embed",
        "route": "/embed",
        "scheme": "http",
        "client": "10.0.0.1",
        "user_agent": "curl",
        "status": 200,
        "size": 384,
        "began": 1.0,
        "ended": 2.0,
    }
    return Visit(**(seen | others))


def test_a_request_is_a_span_with_three_children() -> None:
    """Each stage begins where the one before ended, inside the request's own span."""
    left = journey(tokenizing=1.1, queued=1.2, launched=1.5, landed=1.9)
    server, *stages = spans_of(visit(left))
    assert (server.name, server.place, server.parent_id, server.is_server) == (
        "POST /embed",
        PLACE,
        b"parent!!",
        True,
    )
    assert (server.began, server.ended, server.tracestate, server.failed) == (1.0, 2.0, "a=1", False)
    found = [(one.name, one.began, one.ended, one.parent_id) for one in stages]
    assert found == [
        ("tokenize", 1.1, 1.2, PLACE[1]),
        ("queue", 1.2, 1.5, PLACE[1]),
        ("forward", 1.5, 1.9, PLACE[1]),
    ]
    assert len({one.place for one in (server, *stages)}) == 4
    assert {one.place[0] for one in stages} == {PLACE[0]}


def test_a_request_has_the_attributes_of_the_http_conventions() -> None:
    """OpenTelemetry's names, and ours for what it has no names for."""
    left = journey()
    left.texts, left.tokens = 2, 9
    assert spans_of(visit(left))[0].attributes == {
        "http.request.method": "POST",
        "http.route": "/embed",
        "http.response.status_code": 200,
        "http.response.body.size": 384,
        "url.path": "/embed",
        "url.scheme": "http",
        "client.address": "10.0.0.1",
        "user_agent.original": "curl",
        "warmfleet.request_id": "request-1",
        "warmfleet.texts": 2,
        "warmfleet.tokens": 9,
    }


@pytest.mark.parametrize(
    ("others", "name", "failed", "attributes"),
    [
        ({"status": 422}, "POST /embed", False, {"http.response.status_code": 422}),
        ({"status": 503}, "POST /embed", True, {"http.response.status_code": 503, "error.type": "503"}),
        ({"status": 499}, "POST /embed", False, {"error.type": "client_gone"}),
        ({"route": None, "path": "/x"}, "POST", False, {"url.path": "/x"}),
        (
            {"method": "BREW"},
            "HTTP /embed",
            False,
            {"http.request.method": "_OTHER", "http.request.method_original": "BREW"},
        ),
    ],
    ids=["client's fault", "ours", "client gone", "no such path", "no such method"],
)
def test_what_went_wrong_is_on_the_span(
    others: dict[str, Any], name: str, *, failed: bool, attributes: dict[str, Any]
) -> None:
    """An error is what is ours to mend; names stay few, whatever paths and methods are tried."""
    span = spans_of(visit(journey(), **others))[0]
    assert (span.name, span.failed) == (name, failed)
    assert attributes.items() <= span.attributes.items()
    assert ("http.response.status_code" in span.attributes) == (others.get("status") != 499)
    assert ("http.route" in span.attributes) == (span.name != "POST")


def test_a_request_has_no_span_of_a_stage_that_it_never_came_to() -> None:
    """Where it ended, the stage ends with it, and has failed if the request has."""
    marks = {"tokenizing": 1.1, "queued": 1.2, "launched": 1.5}
    for count in range(4):
        left = journey(**dict(list(marks.items())[:count]))
        _, *stages = spans_of(visit(left, status=504))
        assert [one.name for one in stages] == ["tokenize", "queue", "forward"][:count]
        assert [one.failed for one in stages] == [False] * (count - 1) + [True] * (count > 0)
        assert all(one.ended == 2.0 for one in stages[-1:])
        assert spans_in(visit(left)) == 1 + count


def test_passes_and_requests_are_linked_both_ways() -> None:
    """A pass links to the `forward` of each request in it, and these to each pass they were in."""
    one, two = journey(tokenizing=1.1, queued=1.2, launched=1.3, landed=1.9), Journey((b"2" * 16, b"2" * 8))
    both = begin_pass([one, two], 1.3, 1.5, texts=5, requests=3, tokens=40)
    alone = begin_pass([one], 1.5, 1.9, texts=1, requests=1, tokens=8, error="OutOfMemoryError")
    forward = spans_of(visit(one))[3]
    assert forward.links == [both.place, alone.place]
    assert forward.place == forward_of(one)
    first, second = span_of(both), span_of(alone)
    assert first.links == [forward_of(one), forward_of(two)]
    assert (first.name, first.began, first.ended, first.parent_id) == ("forward pass", 1.3, 1.5, b"")
    assert first.attributes == {
        "warmfleet.batch.texts": 5,
        "warmfleet.batch.requests": 3,
        "warmfleet.batch.tokens": 40,
    }
    assert (first.failed, second.failed, second.attributes["error.type"]) == (False, True, "OutOfMemoryError")
    assert spans_in(both) == 1


def test_a_span_has_no_more_links_than_opentelemetry_allows() -> None:
    """The number of requests is an attribute all the same."""
    many = [Journey((bytes([number]) * 16, b"span" * 2)) for number in range(MOST_LINKS + 9)]
    made = begin_pass(many, 0.0, 1.0, texts=len(many), requests=len(many), tokens=1)
    assert len(span_of(made).links) == MOST_LINKS
