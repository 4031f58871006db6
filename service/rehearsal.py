# SPDX-License-Identifier: Apache-2.0
"""One request through the whole app before the first real one: routing and encoding are lazy too. Worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from service.backends.base import PROBE_WORD
from service.engine import Observer
from service.errors import WarmupError
from service.metrics import REHEARSAL

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Message, Scope

    from service.engine import Engine

BODY = orjson.dumps([PROBE_WORD])


async def rehearse(app: FastAPI, engine: Engine) -> None:
    """Post a text to /embed in-process, uncounted; the reply must be what a client would want.

    Raises:
        WarmupError: the app answered with an error.
    """
    key = app.state.settings.api_key
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
    if key is not None:
        headers.append((b"authorization", b"Bearer " + key.get_secret_value().encode()))
    sent: list[Message] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    observer, engine.observer = engine.observer, Observer()
    try:
        await app(_scope(headers, engine), receive, send)
    finally:
        engine.observer = observer
    if sent[0]["status"] != 200:  # noqa: PLR2004 - OK
        reply = b"".join(message.get("body", b"") for message in sent).decode(errors="replace")
        msg = f"the app answered {sent[0]['status']} to its first request: {reply}"
        raise WarmupError(msg)


def _scope(headers: list[tuple[bytes, bytes]], engine: Engine) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/embed",
        "raw_path": b"/embed",
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "state": {REHEARSAL: engine},
    }
