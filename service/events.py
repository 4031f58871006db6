# SPDX-License-Identifier: Apache-2.0
"""`/events`: the status document as a stream, one for all listeners of a worker at each tick. Worker.

Theory of operation. One task makes documents while anybody listens; each stream sends the newest that it has
not sent yet, so a slow client skips some and holds nobody up. A client that takes nothing is cut off.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from service.lifecycle import State
from service.logging import get

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from starlette.types import Receive, Scope, Send

LOG = get()
MOST_STREAMS = 32
FAST_S, SLOW_S = 0.25, 1.0
"""Between two documents: while something changes, and while nothing does."""
FRESH_S = 2.0
"""A state entered since then has just changed."""
STUCK_S = 5.0
"""For a client to take what it was sent."""
BYE_S = 0.1
"""For all clients together to take the last message of a worker that leaves."""
MOVING = (State.SPAWNED, State.PINNED, State.WAITING, State.LOADING, State.WARMING, State.DRAINING)

RETRY = b"retry: 1000\n\n"
BYE = b"event: bye\ndata: {}\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the messages back
    (b"connection", b"close"),  # the stream is all that this connection is for
]
FULL_HEADERS = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", b"5")]


def _body(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def stirs(rows: Iterable[tuple[State, float]], now: float) -> bool:
    """Say whether something changes that people want to watch: a boot, a drain, a change of state.

    Args:
        rows: state of each slot, and since when it is in it.
        now: seconds of the same clock.
    """
    return any(state in MOVING or now - since < FRESH_S for state, since in rows)


class Events:
    """The ASGI endpoint, and the task that makes the documents."""

    def __init__(
        self,
        make: Callable[[], Awaitable[bytes]],
        changes: Callable[[], bool],
        *,
        abort: Callable[[Scope], None] = lambda scope: None,  # noqa: ARG005 - the default has no connections
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Tell of documents.

        Args:
            make: returns the document, on one line.
            changes: whether something changes now; asked four times a second, so it has to be quick.
            abort: cuts the connection of a request off.
            sleep: for tests.
            clock: seconds, for tests.
        """
        self._make, self._changes, self._abort = make, changes, abort
        self._sleep, self._clock = sleep, clock
        self._scopes: list[Scope] = []
        self._ticking: asyncio.Task[None] | None = None
        self._newest, self._made = b"", 0
        self._news = asyncio.Event()
        self._closed = False

    @property
    def streams(self) -> int:
        """How many clients listen."""
        return len(self._scopes)

    def close(self) -> None:
        """Say goodbye on every stream and end it; a moment later cut off whoever has not taken it."""
        self._closed = True
        self._tell()
        asyncio.get_running_loop().call_later(BYE_S, self._cut_off, list(self._scopes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream to one client until it goes, takes nothing any more, or the worker leaves."""
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await send(_body(b"", more=False))
            return
        if self._closed or self.streams >= MOST_STREAMS:
            await send({"type": "http.response.start", "status": 503, "headers": FULL_HEADERS})
            await send(_body(b"no more streams here; ask /status, or again in a while\n", more=False))
            return
        self._scopes.append(scope)
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick())
        streaming, gone = (asyncio.create_task(work) for work in (self._stream(send), _gone(receive)))
        try:
            await asyncio.wait({streaming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if streaming.done() and isinstance(streaming.exception(), TimeoutError):
                self._abort(scope)
                await asyncio.wait({gone}, timeout=BYE_S)
        finally:
            self._scopes.remove(scope)
            streaming.cancel()
            gone.cancel()
            await asyncio.gather(streaming, gone, return_exceptions=True)

    async def _stream(self, send: Send) -> None:
        """Send the newest document, and each that is newer than the last.

        Raises:
            TimeoutError: the client takes nothing.
        """

        async def put(message: dict[str, Any]) -> None:
            async with asyncio.timeout(STUCK_S):
                await send(message)

        await put({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await put(_body(RETRY))
        sent = 0
        while not self._closed:
            news = self._news
            if self._newest and self._made > sent:
                sent = self._made
                await put(_body(b"event: status\ndata: %b\n\n" % self._newest))
            else:
                await news.wait()
        await put(_body(BYE, more=False))

    async def _tick(self) -> None:
        """Make documents while anybody listens."""
        while self._scopes and not self._closed:
            try:
                self._newest = await self._make()
            except Exception:
                LOG.exception("the status document cannot be made")
            else:
                self._made += 1
                self._tell()
            await self._rest()
        self._newest, self._ticking = b"", None

    async def _rest(self) -> None:
        """Wait for the next tick, which comes early if something changes."""
        end = self._clock() + SLOW_S
        while self._scopes and not self._closed and self._clock() < end:
            await self._sleep(FAST_S)
            if self._changes():
                return

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _cut_off(self, scopes: list[Scope]) -> None:
        for scope in scopes:
            self._abort(scope)


async def _gone(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
