# SPDX-License-Identifier: Apache-2.0
"""The stub forward as a plain ASGI app for a stock Gunicorn: one request computes at a time.

`SLEEP_MS` is the forward; the reply's `x-pid` says which worker served.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

SLEEP_S = float(os.environ["SLEEP_MS"]) / 1e3
_lock: list[asyncio.Lock] = []


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:  # noqa: ANN401 - ASGI callables
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    if not _lock:
        _lock.append(asyncio.Lock())  # of the loop that runs
    async with _lock[0]:
        await asyncio.sleep(SLEEP_S)
    headers = [(b"content-length", b"2"), (b"x-pid", str(os.getpid()).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})
