# SPDX-License-Identifier: Apache-2.0
"""One request through the whole app before the first real one: routing and encoding are lazy too. Worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import orjson

from service.backends.base import PROBE_WORD
from service.errors import WarmupError
from service.metrics import REHEARSAL, uncounted

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Message, Scope

    from service.engine import Engine

BODY = orjson.dumps({"inputs": PROBE_WORD})
PATH = "/"
"""The model's own endpoint, whatever type of model it is."""


async def rehearse(app: FastAPI, engine: Engine) -> None:
    """Post a text in-process, uncounted and without a key; the reply must be what a client would want.

    Raises:
        WarmupError: the app answered with an error.
    """
    sent: list[Message] = []
    unread: list[Message] = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> Message:
        return unread.pop() if unread else await asyncio.Future()  # a client that waits says nothing more

    async def send(message: Message) -> None:
        sent.append(message)

    with uncounted(engine):
        await app(_scope(engine), receive, send)
    if sent[0]["status"] != 200:  # noqa: PLR2004 - OK
        reply = b"".join(message.get("body", b"") for message in sent).decode(errors="replace")
        msg = f"the app answered {sent[0]['status']} to its first request: {reply}"
        raise WarmupError(msg)


def _scope(engine: Engine) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))],
        "client": None,
        "server": None,
        "state": {REHEARSAL: engine},
    }
