# SPDX-License-Identifier: Apache-2.0
"""An error in the words of the API that was asked: OpenAI's, or text-embeddings-inference's. Pure; worker."""

from __future__ import annotations

import math
from typing import Any

import orjson

from service.errors import NotReadyError, RequestError, UnauthorizedError, UnknownModelError

JSON = (b"content-type", b"application/json")
Headers = list[tuple[bytes, bytes]]
SERVER_ERROR = 500
"""From here on the fault is ours, and a report of it needs the request's id."""

OPENAI_TYPES: dict[int, tuple[str, str | None]] = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "request_too_large"),
    422: ("invalid_request_error", None),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "timeout"),
}
"""Status: `type` and `code` as OpenAI has them."""


def speaks_openai(path: str) -> bool:
    """Say whether a path belongs to OpenAI's API."""
    return path.startswith("/v1/") or path == "/embeddings"


def error_body(path: str, status: int, message: str, kind: str, code: str | None = None) -> bytes:
    """Return an error in the dialect of the path."""
    if not speaks_openai(path):
        return orjson.dumps({"error": message, "error_type": kind})
    field, colon, _ = message.partition(": ")
    if field.split(".")[0] == "inputs":  # the engine's word for what OpenAI calls input
        message = "input" + message.removeprefix("inputs")
        field = "input" + field.removeprefix("inputs")
    about_field = status == 422 and colon and " " not in field  # noqa: PLR2004 - what `validation` errors have
    name, usual_code = OPENAI_TYPES.get(status, ("invalid_request_error", None))
    error: dict[str, Any] = {
        "message": message,
        "type": name,
        "param": field.split(".")[0] if about_field else None,
        "code": code or usual_code,
    }
    return orjson.dumps({"error": error})


def error_reply(path: str, error: RequestError, request_id: str = "") -> tuple[int, Headers, bytes]:
    """Return status, headers and body of an error; whoever reports a 5xx can name its request."""
    status = int(error.status)
    message = f"{error} (request {request_id})" if status >= SERVER_ERROR and request_id else str(error)
    code = "model_not_found" if isinstance(error, UnknownModelError) else None
    headers: Headers = [JSON]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    if isinstance(error, NotReadyError):
        headers.append((b"connection", b"close"))  # the next attempt shall find a warm worker
    if isinstance(error, UnauthorizedError):
        headers.append((b"www-authenticate", b"Bearer"))
    return status, headers, error_body(path, status, message, error.kind, code)
