# SPDX-License-Identifier: Apache-2.0
"""A local OTLP/HTTP collector: keeps the spans that it is sent, or does what a bad one does."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

if TYPE_CHECKING:
    from types import TracebackType

HANG_S = 60.0


@dataclass(frozen=True)
class Got:
    """A span as it arrived; times in seconds since 1970, ids in hexadecimal digits."""

    name: str
    trace: str
    span: str
    parent: str
    began: float
    ended: float
    is_server: bool
    is_error: bool
    attributes: dict[str, Any]
    links: list[tuple[str, str]]
    resource: dict[str, Any]

    @property
    def place(self) -> tuple[str, str]:
        return self.trace, self.span


class Collector:
    """Listens on a free loopback port.

    Attributes:
        status: what it answers; 307 leads to `/elsewhere`.
        hangs: it takes requests and answers none.
        headers: of each request, names in lower case.
        paths: of each request.
    """

    def __init__(self) -> None:
        self.status, self.hangs = 200, False
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self._spans: list[Got] = []
        self._over = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                owner.paths.append(self.path)
                owner.headers.append({name.lower(): value for name, value in self.headers.items()})
                if owner.hangs:
                    owner._over.wait(HANG_S)
                    self.close_connection = True
                    return
                if owner.status == 200:
                    owner._spans.extend(read(body))
                self.send_response(owner.status)
                if owner.status == 307:
                    self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """What WARMFLEET_OTLP_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def spans(self) -> list[Got]:
        """Everything that has arrived so far."""
        return list(self._spans)

    def of(self, trace: str) -> list[Got]:
        """Return the spans of a trace."""
        return [one for one in self.spans if one.trace == trace]


def read(body: bytes) -> list[Got]:
    """Return the spans of a request."""
    return [
        Got(
            span.name,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.start_time_unix_nano / 1e9,
            span.end_time_unix_nano / 1e9,
            span.kind == span.SPAN_KIND_SERVER,
            span.status.code == span.status.STATUS_CODE_ERROR,
            _values(span.attributes),
            [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
            _values(whole.resource.attributes),
        )
        for whole in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in whole.scope_spans
        for span in scope.spans
    ]


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
