# SPDX-License-Identifier: Apache-2.0
"""For the tests of the API: one worker's app, and requests to it without a socket."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from service.app import create_app
from service.backends.stub import StubBackend
from service.fleet import Fleet
from service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from numpy.typing import NDArray

    from service.engine import Result

KEY = "hunter2"


def app_with(slot: int, engine: object = None, **settings: Any) -> FastAPI:
    """Return the app of one worker; without an engine it is cold."""
    values = Settings(backend="stub", **settings)
    app = create_app(values)
    app.state.slot, app.state.engine = slot, engine
    app.state.fleet = Fleet.make(values, ("cpu",), values.first_workers)
    return app


def backend_of(**attributes: Any) -> StubBackend:
    """Return a stub that says something else of itself."""
    backend = StubBackend(Settings(backend="stub"))
    for name, value in attributes.items():
        setattr(backend, name, value)
    return backend


def send(app: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    """Send one request to the app, without a socket."""

    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(exchange())


def post(app: FastAPI, path: str, body: object = None, **request: Any) -> httpx.Response:
    """Post JSON."""
    return send(app, "POST", path, **({"json": body} | request if "content" not in request else request))


def matrix(result: Result) -> NDArray[np.float32]:
    """Return the rows as one array of shape (inputs, width)."""
    return np.stack(result.rows)


def outcome(reply: httpx.Response) -> tuple[int, Any]:
    return reply.status_code, reply.json()


async def exchange(
    app: FastAPI, path: str, messages: list[dict[str, Any]], headers: list[tuple[bytes, bytes]] | None = None
) -> list[dict[str, Any]]:
    """Post as a server would: the messages one after another, then nothing; return what was sent."""
    waiting, sent = itertools.chain(messages), []

    async def receive() -> dict[str, Any]:
        for message in waiting:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def keep(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": headers or [], "query_string": b""}
    await app(scope, receive, keep)
    return sent
