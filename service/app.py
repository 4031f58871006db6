# SPDX-License-Identifier: Apache-2.0
"""The API listener, put together: endpoints, probes, errors, counting. Made in the arbiter; worker.

The way of a request through an endpoint of the model is told in `service.api.endpoint`.
"""

from __future__ import annotations

import time
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from service import __version__
from service.api import openai, tei
from service.api.dialects import error_body, error_reply
from service.api.jobs import model_type
from service.api.openapi import document
from service.api.steps import warm_engine
from service.backends.base import Kind
from service.errors import InvalidRequestError, RequestError
from service.metrics import REQUESTS, STAGE_SECONDS
from service.ops import reply
from service.payloads import health_payload, ready_payload
from service.reception import Reception
from service.security import read_keys
from service.trail import TRAIL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi.telemetry import TelemetryConfig
    from prometheus_client import Counter, Histogram
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from service.api.endpoint import Endpoint
    from service.backends.base import Backend
    from service.settings import Settings

UNKNOWN = "other"
"""Endpoint label of paths that do not exist: a scanner must not make label values."""
MODEL_PATH = "/v1/models/"

READY_OPEN = ("status", "model", "warmup_seconds", "detail")
READY_WITH_KEY = ("status", "ready_workers", "wanted_workers", "target_workers")
"""What `/ready` tells here without, and with, an API key set: errors in `detail` may hold paths."""

NO_TELEMETRY: TelemetryConfig = {"auto_configure": False, "tracing": False, "metrics": False, "logs": False}
"""FastAPI's own would see only what goes its way, and make a second span of it."""
EXPOSED = ("x-request-id", "server-timing", "retry-after", "x-shape", "x-dtype", "x-compute-tokens")
"""Headers of replies that a page of another origin may read."""


def create_app(settings: Settings) -> FastAPI:
    """Return the API; `state.fleet`, `state.slot` and `state.engine` are set in the worker.

    Raises:
        SettingsError: the API keys cannot be read.
    """
    app = Api(title="warmfleet", version=__version__, telemetry=NO_TELEMETRY)
    state = app.state
    state.settings, state.keys, state.created = settings, read_keys(settings), int(time.time())
    state.fleet = state.slot = state.engine = None
    endpoints: list[Endpoint[Any]] = []
    endpoints += [kind(state, endpoints) for kind in (*tei.ENDPOINTS, *openai.ENDPOINTS)]
    posts = {path: endpoint for endpoint in endpoints for path in endpoint.paths}
    app.router.routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
    app.router.routes += [Route(path, answer, methods=["GET"]) for path, answer in GETS.items()]
    app.add_exception_handler(RequestError, error_answer)
    app.add_exception_handler(HTTPException, no_route_answer)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    else:
        app.straight = posts
    tally = Tally(app)
    app.reception = Reception(app.answer, route=tally.route, count=tally, access_log=settings.access_log)
    app.described = document(endpoints, with_keys=bool(state.keys))
    return app


class Api(FastAPI):
    """FastAPI, whose middlewares and routing the endpoints of the model do without: a sixth of the cost.

    Attributes:
        straight: endpoints by the path to which they are posted; none where a middleware must see them.
        described: the OpenAPI document.
        reception: the door through which every request comes.
    """

    straight: Mapping[str, ASGIApp] = MappingProxyType({})
    described: dict[str, Any]
    reception: Reception

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document; FastAPI would describe only routes of its own making."""
        return self.described

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Come in by the door."""
        await self.reception(scope, receive, send)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go straight to an endpoint of the model, or FastAPI's way."""
        endpoint = self.straight.get(scope.get("path", ""))
        if endpoint is None or scope["type"] != "http" or scope["method"] != "POST":
            await super().__call__(scope, receive, send)
        else:
            await endpoint(scope, receive, send)


# Endpoints that ask nothing of the model


async def models(request: Request) -> Response:
    """List the model, as OpenAI does."""
    state = request.app.state
    state.keys.check(request.headers.get("authorization", "").encode("latin-1"))
    return json_reply(openai.list_models(state.settings, state.created))


async def one_model(request: Request) -> Response:
    """Describe the model, if it is called so."""
    state, name = request.app.state, request.path_params["model"]
    state.keys.check(request.headers.get("authorization", "").encode("latin-1"))
    openai.check_name(state.settings, name)
    return json_reply(openai.describe_model(state.settings, state.created, name))


async def info(request: Request) -> Response:
    """Describe the model and the limits, in text-embeddings-inference's words."""
    state = request.app.state
    state.keys.check(request.headers.get("authorization", "").encode("latin-1"))
    engine, settings = warm_engine(state, request.scope), state.settings
    backend, limits = engine.backend, engine.limits
    return json_reply(
        {
            "model_id": settings.model_id,
            "model_sha": settings.revision,
            "model_dtype": backend.dtype,
            "model_type": {model_type(backend): _describe(backend)},
            "max_concurrent_requests": limits.max_concurrent_texts,
            "max_input_length": backend.max_tokens,
            "max_batch_tokens": limits.max_batch_tokens,
            "max_batch_requests": limits.max_batch_texts,
            "max_client_batch_size": limits.max_client_batch_size,
            "auto_truncate": limits.auto_truncate,
            "prompts": list(backend.prompts),
            "request_timeout": limits.request_timeout_s,
            "backend": settings.backend,
            "packing": backend.packing,
            "workers": state.fleet.board.header.target,
            "version": __version__,
        }
    )


def _describe(backend: Backend) -> dict[str, Any]:
    if backend.kind is Kind.SCORES:
        return {
            "id2label": {str(number): label for number, label in enumerate(backend.labels)},
            "label2id": {label: number for number, label in enumerate(backend.labels)},
        }
    return {"dimension": backend.dimension, "normalized": backend.normalized}


async def health(_: Request) -> Response:
    """Alive: the same answer as on the ops listener."""
    return reply(health_payload())


async def ready(request: Request) -> Response:
    """Ready: the same status as on the ops listener, and no more of the reasons than a client may know."""
    state = request.app.state
    status, payload = ready_payload(state.fleet)
    return reply({name: payload[name] for name in (READY_WITH_KEY if state.keys else READY_OPEN)}, status)


GETS = {
    "/v1/models": models,
    "/v1/models/{model:path}": one_model,
    "/info": info,
    "/health": health,
    "/ready": ready,
}


def json_reply(payload: dict[str, Any]) -> Response:
    """Return JSON."""
    return Response(orjson.dumps(payload), media_type="application/json")


# Errors


async def error_answer(request: Request, error: Exception) -> Response:
    """Answer in the dialect of the path."""
    problem = error if isinstance(error, RequestError) else InvalidRequestError(str(error))
    trail = TRAIL.get()
    status, headers, body = error_reply(request.url.path, problem, trail.request_id if trail else "")
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


async def no_route_answer(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method in the same shape."""
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    body = error_body(request.url.path, status, HTTPStatus(status).phrase, "validation")
    return Response(body, status, headers, media_type="application/json")


# Counting


class Tally:
    """Counts every reply by endpoint and status, and times the whole of it."""

    def __init__(self, fastapi: FastAPI) -> None:
        """Count for an app, which says which slot this is."""
        self._state = fastapi.state
        self._paths = {getattr(route, "path", "") for route in fastapi.routes}
        self._counters: dict[tuple[str | None, int], Counter] = {}
        self._total: Histogram | None = None

    def route(self, path: str) -> str | None:
        """Return the endpoint of a path; None if there is none."""
        if path in self._paths:
            return path
        return f"{MODEL_PATH}{{model}}" if path.startswith(MODEL_PATH) else None

    def __call__(self, route: str | None, status: int, seconds: float) -> None:
        """Add to the two metrics; a child of them is looked up once, as that takes longer than adding."""
        counter = self._counters.get((route, status))
        if counter is None or self._total is None:
            slot = f"s{self._state.slot}"
            counter = self._counters[route, status] = REQUESTS.labels(slot, route or UNKNOWN, str(status))
            self._total = STAGE_SECONDS.labels(slot, "total")
        counter.inc()
        self._total.observe(seconds)
