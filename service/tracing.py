# SPDX-License-Identifier: Apache-2.0
"""Who is traced, and which spans follow from what a request left behind. Pure; worker.

POST /embed      server span, child of the client's if it sent `traceparent`
├─ tokenize
├─ queue
└─ forward       linked to each `forward pass` that had texts of the request
forward pass     a trace of its own, linked to the `forward` of each traced request in it
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from service.trail import Journey, Pass, Place, Trail

if TYPE_CHECKING:
    from collections.abc import Mapping

REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")
TRACEPARENT: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
TRACE_BYTES, SPAN_BYTES = 16, 8
SAMPLED: Final = 1
TRACESTATE_LIMIT: Final = 512
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
MOST_LINKS: Final = 128
"""Of one span, as OpenTelemetry's own limit is."""
SERVER_ERROR: Final = 500
CLIENT_GONE: Final = 499
"""Status of requests that nobody waited for; nginx's number."""

Value = str | int | float


@dataclass(frozen=True, slots=True)
class Visit:
    """A request as the door saw it; the times are of `time.perf_counter`, in seconds.

    Attributes:
        route: template of the path; None if the path does not exist.
        size: bytes of the reply's body.
    """

    journey: Journey
    request_id: str
    method: str
    path: str
    route: str | None
    scheme: str
    client: str | None
    user_agent: str
    status: int
    size: int
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Span:
    """A span, before it is put into OpenTelemetry's words; times are of `time.perf_counter`, in seconds."""

    name: str
    place: Place
    parent_id: bytes
    began: float
    ended: float
    attributes: dict[str, Value]
    links: list[Place] = field(default_factory=list)
    is_server: bool = False
    failed: bool = False
    tracestate: str = ""


# At the door


def arrive(headers: Mapping[bytes, bytes], ratio: float | None) -> Trail:
    """Return the ids of a request, and a journey if it is sampled.

    Args:
        headers: of the request, names in lower case.
        ratio: share of the requests to trace of which nobody has decided yet; None: spans are not made here,
            but a trace id that a client sent is still good for the log.
    """
    given = headers.get(b"x-request-id", b"")
    trail = Trail((given if REQUEST_ID.fullmatch(given) else os.urandom(12).hex().encode()).decode())
    sent = headers.get(b"traceparent")
    parent = parent_of(sent) if sent else None
    if parent is not None:
        (trace, parent_id), is_sampled = parent
        trail.trace_id = trace.hex()
        if ratio is not None and is_sampled:
            state = headers.get(b"tracestate", b"")[:TRACESTATE_LIMIT].decode("ascii", "ignore")
            trail.journey = Journey((trace, os.urandom(SPAN_BYTES)), parent_id, state)
    elif ratio is not None:
        ids = os.urandom(TRACE_BYTES + SPAN_BYTES)
        trace = ids[:TRACE_BYTES]
        trail.trace_id = trace.hex()
        if chosen(trace, ratio):
            trail.journey = Journey((trace, ids[TRACE_BYTES:]))
    return trail


def parent_of(traceparent: bytes) -> tuple[Place, bool] | None:
    """Read W3C's header: the client's span, and whether it is sampled; None if it is not valid."""
    found = TRACEPARENT.fullmatch(traceparent.strip())
    if found is None:
        return None
    version, trace, span, flags, rest = found.groups()
    if version == b"ff" or (version == b"00" and rest) or not trace.strip(b"0") or not span.strip(b"0"):
        return None
    place = bytes.fromhex(trace.decode()), bytes.fromhex(span.decode())
    return place, bool(int(flags, 16) & SAMPLED)


def chosen(trace_id: bytes, ratio: float) -> bool:
    """Decide by the id alone, as OpenTelemetry's TraceIdRatioBased does: who asks again decides alike."""
    return int.from_bytes(trace_id[8:], "big") < round(ratio * 2**64)


def begin_pass(journeys: list[Journey], began: float, ended: float, **told: int | str) -> Pass:
    """Return a pass with texts of these journeys, which is linked to them and they to it."""
    ids = os.urandom(TRACE_BYTES + SPAN_BYTES)
    links = [forward_of(journey) for journey in journeys[:MOST_LINKS]]
    made = Pass((ids[:TRACE_BYTES], ids[TRACE_BYTES:]), began, ended, links=links, **told)  # type: ignore[arg-type]
    for journey in journeys:
        journey.passes.append(made)
    return made


# Spans


def forward_of(journey: Journey) -> Place:
    """Return the place of a request's `forward`: it follows from its own, so a pass can know it early."""
    trace, span = journey.place
    return trace, _child(span, 3)


def _child(span: bytes, number: int) -> bytes:
    return (int.from_bytes(span, "big") ^ number).to_bytes(SPAN_BYTES, "big")


def spans_in(item: Visit | Pass) -> int:
    """Return how many spans will be made of it; cheaper than making them."""
    if isinstance(item, Pass):
        return 1
    journey = item.journey
    return 1 + sum(mark > 0 for mark in (journey.tokenizing, journey.queued, journey.launched))


def spans_of(visit: Visit) -> list[Span]:
    """Return the span of a request, then one for each stage that it came to."""
    journey = visit.journey
    trace, span_id = journey.place
    spans = [_server_span(visit)]
    marks = [journey.tokenizing, journey.queued, journey.launched, journey.landed]
    for number, name in enumerate(("tokenize", "queue", "forward")):
        began = marks[number]
        if not began:
            break  # later stages were not come to either
        ended = marks[number + 1] or visit.ended
        links = [made.place for made in journey.passes[:MOST_LINKS]] if name == "forward" else []
        failed = visit.status >= SERVER_ERROR and not marks[number + 1]
        attributes: dict[str, Value] = {"error.type": str(visit.status)} if failed else {}
        place = trace, _child(span_id, number + 1)
        spans.append(Span(name, place, span_id, began, ended, attributes, links, failed=failed))
    return spans


def _server_span(visit: Visit) -> Span:
    """Return the request's own span, with the attributes of OpenTelemetry's conventions for HTTP."""
    journey, method = visit.journey, visit.method if visit.method in METHODS else "_OTHER"
    verb = method if method in METHODS else "HTTP"
    attributes: dict[str, Value] = {
        "http.request.method": method,
        "url.path": visit.path,
        "url.scheme": visit.scheme,
        "http.response.body.size": visit.size,
        "warmfleet.request_id": visit.request_id,
    }
    optional: dict[str, Value | None] = {
        "http.request.method_original": None if method in METHODS else visit.method,
        "http.route": visit.route,
        "http.response.status_code": None if visit.status == CLIENT_GONE else visit.status,
        "client.address": visit.client,
        "user_agent.original": visit.user_agent or None,
        "warmfleet.texts": journey.texts or None,
        "warmfleet.tokens": journey.tokens or None,
        "error.type": str(visit.status) if visit.status >= SERVER_ERROR else None,
    }
    if visit.status == CLIENT_GONE:
        optional["error.type"] = "client_gone"
    attributes |= {name: value for name, value in optional.items() if value is not None}
    return Span(
        f"{verb} {visit.route}" if visit.route else verb,
        journey.place,
        journey.parent_id,
        visit.began,
        visit.ended,
        attributes,
        is_server=True,
        failed=visit.status >= SERVER_ERROR,
        tracestate=journey.tracestate,
    )


def span_of(made: Pass) -> Span:
    """Return the span of a pass."""
    attributes: dict[str, Value] = {
        "warmfleet.batch.texts": made.texts,
        "warmfleet.batch.requests": made.requests,
        "warmfleet.batch.tokens": made.tokens,
    }
    if made.error:
        attributes["error.type"] = made.error
    return Span(
        "forward pass",
        made.place,
        b"",
        made.began,
        made.ended,
        attributes,
        made.links,
        failed=bool(made.error),
    )
