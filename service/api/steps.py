# SPDX-License-Identifier: Apache-2.0
"""The steps of a request around the model: engine, time limit, body, client, reply. Worker."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, TypeVar

from service.errors import DeadlineError, InvalidRequestError, NotReadyError, TooLargeError
from service.metrics import REHEARSAL
from service.slots import CPU
from service.trail import TRAIL

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from starlette.datastructures import State
    from starlette.types import Receive, Scope, Send

    from service.api.dialects import Headers
    from service.engine import Deadline, Engine

T = TypeVar("T")

WATCH_AFTER_S = 0.02
"""Only a request that takes longer is watched for a client that leaves: the watch costs a task."""
PIECE_BYTES = 1 << 20
"""A reply is handed over in such pieces, the next when the client has taken most of the one before."""


class ClientGone(Exception):  # noqa: N818 - nobody's error
    """The client has left; there is nobody to answer."""


class LateBodyError(DeadlineError):
    """The body did not arrive in time; what may still come of it is not read."""


def request_id() -> str:
    """Return the id of the request that is being answered; the door has chosen it."""
    trail = TRAIL.get()
    return trail.request_id if trail else "-"


def warm_engine(state: State, scope: Scope) -> Engine:
    """Return this worker's engine, or say that there is no warm one."""
    found: Engine | None = scope.get("state", {}).get(REHEARSAL, state.engine)
    if found is None:
        why = f": {state.fleet.readiness().detail}" if state.fleet else ""
        raise NotReadyError(f"no worker is warm yet{why}", retry_after_s=1)
    return found


def timeout_of(given: bytes | None) -> float | None:
    """Read `X-Request-Timeout`: seconds that the client is willing to wait."""
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequestError("X-Request-Timeout: this should be a number of seconds above 0")
    return seconds


async def read_body(receive: Receive, given: Mapping[bytes, bytes], limit: int, deadline: Deadline) -> bytes:
    """Read the body up to the limit, and no further, nor for longer than the request may take."""
    length = given.get(b"content-length", b"")
    too_large = f"the body is larger than the limit of {limit} bytes; split the request"
    if length.isdigit() and (len(length) > len(str(limit)) or int(length) > limit):
        raise TooLargeError(too_large)
    chunks, size = [], 0
    try:
        async with asyncio.timeout_at(deadline.at):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise TooLargeError(too_large)
                chunks.append(chunk)
                if not message.get("more_body"):
                    return b"".join(chunks)
    except TimeoutError:
        raise LateBodyError(f"the body did not arrive within {deadline.limit_s:g} s") from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Wait for the work; cancel it if the client leaves meanwhile, so that nothing is computed for nobody."""
    loop, me, left = asyncio.get_running_loop(), asyncio.current_task(), False
    watches: list[asyncio.Task[None]] = []

    async def watch() -> None:
        nonlocal left
        left = (await receive())["type"] == "http.disconnect"  # after its body a client says nothing else
        if left and me is not None:
            me.cancel()

    timer = loop.call_later(WATCH_AFTER_S, lambda: watches.append(loop.create_task(watch())))
    try:
        return await work
    except asyncio.CancelledError:
        if not left or me is None:
            raise
        me.uncancel()
        raise ClientGone from None
    finally:
        timer.cancel()
        for task in watches:
            task.cancel()


def compute_type(state: State) -> bytes:
    """Return what computes, for the header."""
    return b"cpu" if state.fleet is None or tuple(state.fleet.devices) == (CPU,) else b"gpu"


async def send_reply(send: Send, status: int, headers: Headers, body: bytes, timeout_s: float) -> None:
    """Send a reply; the last piece is left to the server, all before it have been taken by the client.

    Raises:
        TimeoutError: a large reply was not taken in time; the server breaks the connection.
    """
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if len(body) <= PIECE_BYTES:
        await send({"type": "http.response.body", "body": body})
        return
    async with asyncio.timeout(timeout_s):
        for start in range(0, len(body), PIECE_BYTES):
            end = start + PIECE_BYTES
            piece = body[start:end]
            await send({"type": "http.response.body", "body": piece, "more_body": end < len(body)})
