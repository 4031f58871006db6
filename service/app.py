# SPDX-License-Identifier: Apache-2.0
"""The API listener: validate, hand to the engine, encode. Made in the arbiter, serves in the worker."""

from __future__ import annotations

import hmac
import math
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service import __version__
from service.engine import Engine  # noqa: TC001 - FastAPI reads the annotations
from service.errors import InvalidRequestError, NotReadyError, RequestError, TooLargeError, UnauthorizedError
from service.metrics import REHEARSAL, REQUESTS, STAGE_SECONDS
from service.ops import health_payload, ready_payload, reply
from service.schemas import EmbedObject, EmbedRequest

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.settings import Settings

UNKNOWN = "other"
"""Endpoint label of paths that do not exist: a scanner must not make label values."""

READY_OPEN = ("status", "model", "warmup_seconds", "detail")
READY_WITH_KEY = ("status", "ready_workers", "wanted_workers", "target_workers")
"""What `/ready` tells here without, and with, an API key set: errors in `detail` may hold paths."""

BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "anyOf": [{"type": "array", "items": {"type": "string"}}, EmbedObject.model_json_schema()]
                }
            }
        },
    }
}


def create_app(settings: Settings) -> FastAPI:
    """Return the API; `state.fleet`, `state.slot` and `state.engine` are set in the worker."""
    app = FastAPI(title="warmfleet", version=__version__, description="Embeddings from N warm workers.")
    app.state.settings = settings
    app.state.fleet = app.state.slot = app.state.engine = None
    app.add_exception_handler(RequestError, error_reply)
    app.add_exception_handler(HTTPException, no_route_reply)
    app.add_middleware(CountRequests, fastapi=app)
    key = [Depends(authorized)]  # of the route, not of the handler: asked for before all else
    app.add_api_route(
        "/embed", embed, methods=["POST"], response_class=Response, openapi_extra=BODY, dependencies=key
    )
    app.add_api_route("/info", info, methods=["GET"], dependencies=key)
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/ready", ready, methods=["GET"])
    return app


async def authorized(request: Request) -> None:
    """Let the request pass if no API key is set, or it carries the key."""
    key = request.app.state.settings.api_key
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.get_secret_value().encode()):
        msg = "the API key is missing or wrong; send `Authorization: Bearer <key>`"
        raise UnauthorizedError(msg)


async def engine(request: Request) -> Engine:
    """Return this worker's engine, or say that there is no warm one."""
    found: Engine | None = request.scope.get("state", {}).get(REHEARSAL, request.app.state.engine)
    if found is None:
        fleet = request.app.state.fleet
        why = f": {fleet.readiness().detail}" if fleet else ""
        msg = f"no worker is warm yet{why}"
        raise NotReadyError(msg, retry_after_s=1)
    return found


async def body(request: Request) -> bytes:
    """Read the body up to `max_body_bytes`, and no further."""
    limit = request.app.state.settings.max_body_bytes
    msg = f"the body is larger than the limit of {limit} bytes; split the request"
    if int(request.headers.get("content-length") or 0) > limit:
        raise TooLargeError(msg)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLargeError(msg)
        chunks.append(chunk)
    return b"".join(chunks)


async def embed_request(raw: Annotated[bytes, Depends(body)]) -> EmbedRequest:
    """Check what was sent."""
    return EmbedRequest.parse(raw)


async def embed(
    model: Annotated[Engine, Depends(engine)], request: Annotated[EmbedRequest, Depends(embed_request)]
) -> Response:
    """Embed texts: a bare array answers `{"embeddings": …}`, `{"inputs": …}` a list of vectors."""
    result = await model.embed(request.texts, truncate=request.truncate)
    began = time.perf_counter()
    reply_body = request.encode(result.vectors)
    model.observer.encoded(time.perf_counter() - began)
    return Response(
        reply_body,
        media_type="application/json",
        headers={"server-timing": result.times.server_timing()},
    )


async def info(model: Annotated[Engine, Depends(engine)], request: Request) -> dict[str, Any]:
    """Describe the model and the limits, in text-embeddings-inference's words."""
    settings: Settings = request.app.state.settings
    return {
        "model_id": settings.model_id,
        "model_sha": settings.revision,
        "model_dtype": model.backend.dtype,
        "model_type": {
            "embedding": {"dimension": model.backend.dimension, "normalized": model.backend.normalized}
        },
        "max_input_length": model.backend.max_tokens,
        "max_batch_tokens": model.limits.max_batch_tokens,
        "max_concurrent_requests": model.limits.max_concurrent_texts,
        "max_client_batch_size": model.limits.max_client_batch_size,
        "auto_truncate": model.limits.auto_truncate,
        "backend": settings.backend,
        "workers": request.app.state.fleet.board.header.target,
        "version": __version__,
    }


async def health() -> Response:
    """Alive: the same answer as on the ops listener."""
    return reply(health_payload())


async def ready(request: Request) -> Response:
    """Ready: the same status as on the ops listener, and no more of the reasons than a client may know."""
    status, payload = ready_payload(request.app.state.fleet)
    shown = READY_OPEN if request.app.state.settings.api_key is None else READY_WITH_KEY
    return reply({name: payload[name] for name in shown}, status)


async def error_reply(_: Request, error: Exception) -> JSONResponse:
    """Answer with text-embeddings-inference's error shape and, where it helps, `Retry-After`."""
    problem = error if isinstance(error, RequestError) else InvalidRequestError(str(error))
    headers = {}
    if problem.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(problem.retry_after_s)))
    if isinstance(problem, NotReadyError):
        headers["connection"] = "close"  # the next attempt shall find a warm worker
    if isinstance(problem, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": str(problem), "error_type": problem.kind}, problem.status, headers)


async def no_route_reply(_: Request, error: Exception) -> JSONResponse:
    """Answer an unknown path or method in the same shape."""
    assert isinstance(error, HTTPException)  # noqa: S101 - Starlette calls it for nothing else
    return JSONResponse(
        {"error": str(error.detail), "error_type": "validation"}, error.status_code, error.headers
    )


class CountRequests:
    """ASGI wrapper: counts every reply by endpoint and status, and times the whole of it."""

    def __init__(self, app: ASGIApp, fastapi: FastAPI) -> None:
        """Wrap the app; `fastapi` says which slot this is."""
        self._inner, self._fastapi = app, fastapi

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and note the status."""
        if scope["type"] != "http" or REHEARSAL in scope.get("state", ()):
            await self._inner(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._inner(scope, receive, note_status)
        finally:
            route = scope.get("route")
            slot = f"s{self._fastapi.state.slot}"
            REQUESTS.labels(slot, getattr(route, "path", UNKNOWN), str(status)).inc()
            STAGE_SECONDS.labels(slot, "total").observe(time.perf_counter() - began)
