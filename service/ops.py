# SPDX-License-Identifier: Apache-2.0
"""The ops listener: probes, metrics and status for the whole fleet, from whichever worker answers. Worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from service import assets
from service.collector import exposition
from service.payloads import health_payload, ready_payload, workers_payload

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.requests import Request

    from service.events import Events
    from service.fleet import Fleet
    from service.status import Status

    Endpoint = Callable[[Request], Awaitable[Response]]


def create_ops_app(
    fleet: Fleet, listeners: Mapping[str, list[socket.socket]], status: Status, events: Events
) -> Starlette:
    """Return the app of the ops listener; it answers from the worker's first second."""

    async def health(_: Request) -> Response:
        return reply(health_payload())

    async def ready(_: Request) -> Response:
        code, payload = ready_payload(fleet)
        return reply(payload, code)

    async def workers(_: Request) -> Response:
        return reply(workers_payload(fleet))

    async def metrics(_: Request) -> Response:
        text = await asyncio.to_thread(exposition, fleet, listeners)  # reads files
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def whole_status(_: Request) -> Response:
        return json_reply(await asyncio.to_thread(status.dump))  # likewise

    endpoints: dict[str, Endpoint] = {
        "/health": health,
        "/livez": health,
        "/ready": ready,
        "/readyz": ready,
        "/workers": workers,
        "/metrics": metrics,
        "/status": whole_status,
    }
    routes = [Route(path, endpoint) for path, endpoint in endpoints.items()]
    return Starlette(routes=[*assets.routes(), *routes, Route("/events", events, methods=["GET"])])


def reply(payload: dict[str, Any], status: int = 200) -> Response:
    """Return JSON that no proxy may keep."""
    return json_reply(orjson.dumps(payload), status)


def json_reply(body: bytes, status: int = 200) -> Response:
    """Return JSON that was made already."""
    return Response(body, status, media_type="application/json", headers={"cache-control": "no-store"})
