# SPDX-License-Identifier: Apache-2.0
"""What a request carries with it wherever it is worked on: its ids, and what a trace wants to know. Worker.

The log reads the ids off the context, so nobody passes them on. `asyncio.to_thread` and tasks take the
context along; `run_in_executor` does not, so whoever uses it hands over a copy.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

Place = tuple[bytes, bytes]
"""Trace id (16 bytes) and span id (8 bytes) of a span."""


@dataclass(slots=True, eq=False)
class Pass:
    """A forward pass with texts of traced requests; the times are of `time.perf_counter`, in seconds.

    Attributes:
        place: its own.
        began: when it was launched.
        ended: when its rows were there, or it failed.
        texts: in it, those of requests that are not traced included.
        requests: in it, likewise.
        tokens: in it, padding not counted.
        links: the traced requests.
        error: name of what it failed with, or empty.
    """

    place: Place
    began: float
    ended: float
    texts: int
    requests: int
    tokens: int
    links: list[Place]
    error: str = ""


@dataclass(slots=True, eq=False)
class Journey:
    """What a request that is traced leaves behind; the times are of `time.perf_counter`, 0 if never.

    Attributes:
        place: of its own span.
        parent_id: span id of the client's span, or empty.
        tracestate: as the client sent it.
        tokenizing: when tokenising began.
        queued: when its texts were put into the queue.
        launched: when the first of its passes began.
        landed: when the last of its rows was there.
        texts: how many it has.
        tokens: of its texts, specials included.
        passes: those that its texts were in; the model thread adds to them until the reply.
    """

    place: Place
    parent_id: bytes = b""
    tracestate: str = ""
    tokenizing: float = 0.0
    queued: float = 0.0
    launched: float = 0.0
    landed: float = 0.0
    texts: int = 0
    tokens: int = 0
    passes: list[Pass] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Trail:
    """A request's ids.

    Attributes:
        request_id: the client's own, or one of ours.
        trace_id: 32 hexadecimal digits; empty if nobody traces it.
        journey: what a trace wants to know; None if the request is not sampled.
    """

    request_id: str
    trace_id: str = ""
    journey: Journey | None = None


TRAIL: ContextVar[Trail | None] = ContextVar("warmfleet.trail", default=None)
"""Of the request that is being worked on; None outside of any."""


def journey() -> Journey | None:
    """Return what the current request is to leave behind; None if it is not traced."""
    trail = TRAIL.get()
    return None if trail is None else trail.journey


@contextmanager
def followed(trail: Trail | None) -> Iterator[None]:
    """Work for this request meanwhile, in a thread that works for many."""
    token = TRAIL.set(trail)
    try:
        yield
    finally:
        TRAIL.reset(token)
