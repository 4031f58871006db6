# SPDX-License-Identifier: Apache-2.0
"""Spans in OpenTelemetry's protobuf, and their way to a collector by HTTP. Worker, exporter's thread.

The extra `otlp` has the messages. They are filled here and not by the SDK, whose spans are made while they
last; its exporter takes a redirect for success, too.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from service import __version__
from service.settings import pairs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from opentelemetry.proto.common.v1.common_pb2 import KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

    from service.tracing import Span, Value

PATH: Final = "/v1/traces"
TIMEOUT_S: Final = 10.0
LATER: Final = frozenset({429, 502, 503, 504})
"""Statuses after which the same may be sent again, by OTLP's specification."""
MOST_READ: Final = 1 << 16


class ExportError(Exception):
    """The collector did not take the spans; `again` says whether it may later."""

    def __init__(self, why: str, *, again: bool) -> None:
        super().__init__(why)
        self.again = again


def load() -> None:
    """Import the messages; in the arbiter once, for all workers to share."""
    import opentelemetry.proto.collector.trace.v1.trace_service_pb2  # noqa: F401


def resource(slot: int) -> dict[str, Value]:
    """Return what all spans of this process have in common; OTEL_* variables go before."""
    found: dict[str, Value] = {
        "service.name": "warmfleet",
        "service.version": __version__,
        "service.instance.id": f"{socket.gethostname()}/s{slot}",
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
        "warmfleet.slot": f"s{slot}",
    }
    with suppress(ValueError):  # OpenTelemetry's specification: all of it is left out
        found |= pairs(os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    if name := os.environ.get("OTEL_SERVICE_NAME"):
        found["service.name"] = name
    return found


def encode(spans: Iterable[Span], resource: Mapping[str, Value]) -> bytes:
    """Return one request to a collector."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest()
    whole = request.resource_spans.add()
    whole.resource.attributes.extend(_key_values(resource))
    scope = whole.scope_spans.add()
    scope.scope.name, scope.scope.version = "warmfleet", __version__
    # perf_counter does not jump; what it is on the clock of all machines is asked as late as possible.
    offset = time.time_ns() - time.perf_counter_ns()
    for span in spans:
        _fill(scope.spans.add(), span, offset)
    body: bytes = request.SerializeToString()
    return body


def _fill(message: Message, span: Span, offset: int) -> None:
    """Put a span into OpenTelemetry's words."""
    message.name = span.name
    message.trace_id, message.span_id = span.place
    message.parent_span_id = span.parent_id
    message.trace_state = span.tracestate
    message.kind = message.SPAN_KIND_SERVER if span.is_server else message.SPAN_KIND_INTERNAL
    message.start_time_unix_nano = int(span.began * 1e9) + offset
    message.end_time_unix_nano = int(span.ended * 1e9) + offset
    message.attributes.extend(_key_values(span.attributes))
    message.flags = 0x101  # sampled; whether the parent is remote is known: it is not
    if span.is_server and span.parent_id:
        message.flags |= 0x200  # it is
    for trace, place in span.links:
        message.links.add(trace_id=trace, span_id=place)
    if span.failed:
        message.status.code = message.status.STATUS_CODE_ERROR


def _key_values(values: Mapping[str, Value]) -> list[KeyValue]:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

    found = []
    for key, value in values.items():
        if isinstance(value, int):
            found.append(KeyValue(key=key, value=AnyValue(int_value=value)))
        elif isinstance(value, float):
            found.append(KeyValue(key=key, value=AnyValue(double_value=value)))
        else:
            text = value.encode("utf-8", "replace").decode()
            found.append(KeyValue(key=key, value=AnyValue(string_value=text)))
    return found


class Collector:
    """Where spans go: one connection, kept; no proxy is asked and no redirect followed.

    What it raises names the address at most: credentials are in headers, which nothing shows.
    """

    def __init__(self, endpoint: str, headers: Mapping[str, str]) -> None:
        """Connect at the first spans."""
        url = urlsplit(endpoint)
        self._path = url.path.rstrip("/").removesuffix(PATH) + PATH
        self._headers = {**headers, "content-type": "application/x-protobuf"}
        self._url = url
        self._connection: http.client.HTTPConnection | None = None

    def send(self, body: bytes) -> None:
        """Post one request.

        Raises:
            ExportError: it did not arrive, or was refused.
        """
        is_kept = self._connection is not None
        try:
            status = self._post(body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            if is_kept and isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                self.send(body)  # the collector has closed an idle connection: nothing to tell
                return
            raise ExportError(f"{type(error).__name__}: {error}", again=True) from None
        if not 200 <= status < 300:  # noqa: PLR2004 - success
            raise ExportError(f"it answered {status}", again=status in LATER)

    def _post(self, body: bytes) -> int:
        if self._connection is None:
            self._connection = self._connect()
        self._connection.request("POST", self._path, body, self._headers)
        reply = self._connection.getresponse()
        reply.read(MOST_READ)
        if not reply.isclosed() or reply.will_close:
            self.close()
        return reply.status

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._url.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        authorities = os.environ.get("OTEL_EXPORTER_OTLP_CERTIFICATE") or None
        tls = ssl.create_default_context(cafile=authorities)
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=tls)

    def close(self) -> None:
        """Close the connection; the next `send` makes a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
