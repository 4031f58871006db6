# SPDX-License-Identifier: Apache-2.0
"""The door of a listener: a request gets its ids there, and leaves a count, a line and a trace. Worker."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

from service.metrics import REHEARSAL
from service.tracing import CLIENT_GONE, Visit, arrive
from service.trail import TRAIL

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.span_export import Spans

ACCESS = logging.getLogger("warmfleet.access")
LINE: Final = (
    "%(method)s %(path)s %(status)d %(bytes)d bytes %(seconds).6f s from %(client)s by %(user_agent)s"
)
ERROR: Final = 400
LONGEST: Final = 256
"""Characters of a path or a user agent in the log and in a trace: who sends it chooses its length."""


class Reception:
    """ASGI wrapper: every reply says the request's id, whoever made it.

    Attributes:
        spans: takes what traced requests leave behind; None: spans are not made.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        route: Callable[[str], str | None] = lambda _path: None,
        count: Callable[[str | None, int, float], None] = lambda _route, _status, _seconds: None,
        access_log: str = "off",
    ) -> None:
        """Stand before an app.

        Args:
            app: what answers.
            route: returns the template of a path, None if there is no such path.
            count: told route, status and seconds of each reply.
            access_log: which replies get a line, `off`, `errors` or `all`.
        """
        self._app, self._route, self._count = app, route, count
        self._least = {"off": 1000, "errors": ERROR, "all": 0}[access_log]
        self.spans: Spans | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and note what became of it."""
        if scope["type"] != "http" or REHEARSAL in scope.get("state", ()):
            await self._app(scope, receive, send)
            return
        began, status, size, spans = time.perf_counter(), CLIENT_GONE, 0, self.spans
        headers = dict(scope["headers"])
        trail = arrive(headers, spans.ratio if spans else None)
        TRAIL.set(trail)  # and left so: the server, too, may have something to say of this request
        request_id = (b"x-request-id", trail.request_id.encode())

        async def note(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), request_id]
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception:
            status = 500
            raise
        finally:
            ended = time.perf_counter()
            route = self._route(scope["path"])
            self._count(route, status, ended - began)
            if status >= self._least:
                ACCESS.info(LINE, _line(scope, headers, status, size, ended - began))
            if spans is not None and (journey := trail.journey) is not None:
                spans.leave(
                    Visit(
                        journey,
                        trail.request_id,
                        scope["method"],
                        _path(scope),
                        route,
                        scope.get("scheme", "http"),
                        _client(scope),
                        _printable(headers.get(b"user-agent", b"")),
                        status,
                        size,
                        began,
                        ended,
                    )
                )


def _line(
    scope: Scope, headers: dict[bytes, bytes], status: int, size: int, seconds: float
) -> dict[str, Any]:
    """Return the fields of an access record: never a query or another header, which may hold keys."""
    return {
        "method": scope["method"],
        "path": _path(scope),
        "status": status,
        "bytes": size,
        "seconds": round(seconds, 6),
        "client": _client(scope) or "-",
        "user_agent": _printable(headers.get(b"user-agent", b"")) or "-",
    }


def _path(scope: Scope) -> str:
    """Return the path as it was sent, without the query: what it encodes cannot break a line."""
    raw = (scope.get("raw_path") or scope["path"].encode()).partition(b"?")[0]
    return _printable(raw) if raw.startswith(b"/") else "-"  # what a proxy is asked for may hold a password


def _client(scope: Scope) -> str | None:
    """Return the client's address; None on a unix socket."""
    client = scope.get("client")
    return client[0] if client else None


def _printable(raw: bytes) -> str:
    """Return text of one line and limited length."""
    text = raw[:LONGEST].decode("latin-1")
    return text if text.isprintable() else text.encode("unicode_escape").decode()
