# SPDX-License-Identifier: Apache-2.0
"""Our own accept on Gunicorn's shared listeners: one connection a wake, if the gate says so. Worker.

uvicorn's protocol classes do the HTTP. Stock asyncio accepts the whole backlog in one wake, so
the first worker to wake takes a burst alone.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from uvicorn.server import Server

from service.gate import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping, Sequence

    from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
    from uvicorn.config import Config

LOOK_AGAIN_S = 0.001
TICK_S = 0.05
SILENT_S = 1.0
"""A connection that has sent nothing for so long is no load: it may never send anything."""


class GatedServer(Server):
    """A uvicorn server that accepts by itself, one connection a wake, when its gate says so."""

    def __init__(
        self,
        config: Config,
        listeners: Sequence[socket.socket],
        verdict: Callable[[int, int], Verdict] | None = None,
    ) -> None:
        """Serve these listeners; without a verdict every connection is accepted."""
        super().__init__(config)
        self.extra_load: Callable[[], int] = lambda: 0
        self._listeners = list(listeners)
        self._verdict = verdict or (lambda _load, _looks: Verdict.ACCEPT)
        self._looks = 0
        self._unread: list[tuple[Any, float]] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self._closed = False
        self.accepting = asyncio.Event()

    @property
    def load(self) -> int:
        """Texts in work (a request without any counts as one), and connections not yet read."""
        return len(self.server_state.tasks) + self.extra_load() + self.unread

    @property
    def unread(self) -> int:
        """Connections accepted a moment ago that have not sent a whole request head yet."""
        old = time.monotonic() - SILENT_S
        self._unread = [(p, since) for p, since in self._unread if since >= old and not _has_spoken(p)]
        return len(self._unread)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the worker: two servers share its loop."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start without asyncio's accept, then watch the listeners."""
        del sockets
        await super().startup(sockets=[])
        self._loop = asyncio.get_running_loop()
        for listener in self._listeners:
            listener.setblocking(False)
            self._watch(listener)
        self.accepting.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, then let uvicorn finish what is in flight."""
        del sockets
        self.stop_accepting()
        await super().shutdown()

    def stop_accepting(self) -> None:
        """Take no connection any more; those queued stay in the kernel for the siblings."""
        if not self._closed:
            self._closed = True
            for listener in self._listeners:
                self._loop.remove_reader(listener.fileno())

    def accept_the_last(self) -> None:
        """Accept all that is queued, and have the kernel refuse the rest: left queued, it would be reset.

        The listener is shut, not closed: that holds for all workers, also for one that hangs.
        """
        for listener in self._listeners:
            while self._accept(listener):
                pass
            with suppress(OSError):  # a sibling was quicker
                listener.shutdown(socket.SHUT_RDWR)

    def close_silent(self) -> None:
        """Close connections that never sent a request; a warm worker will take the next attempt."""
        for connection in list(self.server_state.connections):
            if not _has_spoken(connection):
                connection.shutdown()

    def abort(self, scope: MutableMapping[str, Any]) -> None:
        """Cut off the connection that a request came on, with all that the client has not taken yet."""
        for connection in list(self.server_state.connections):
            if getattr(connection, "scope", None) is scope:  # HTTP/2 has several
                connection.transport.abort()

    def _watch(self, listener: socket.socket) -> None:
        if not self._closed:
            self._loop.add_reader(listener.fileno(), self._on_waiting, listener)

    def _on_waiting(self, listener: socket.socket) -> None:
        """Take the waiting connection, or look away for a while: a level-triggered reader would spin."""
        verdict = self._verdict(self.load, self._looks)
        if verdict is Verdict.ACCEPT:
            self._looks = 0
            self._accept(listener)
            return
        self._looks = self._looks + 1 if verdict is Verdict.LOOK_AGAIN else 0
        self._rest(listener, LOOK_AGAIN_S if verdict is Verdict.LOOK_AGAIN else TICK_S)

    def _rest(self, listener: socket.socket, seconds: float) -> None:
        self._loop.remove_reader(listener.fileno())
        self._loop.call_later(seconds, self._watch, listener)

    def _accept(self, listener: socket.socket) -> bool:
        """Accept one connection, if there still is one."""
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # a sibling was quicker
            return False
        except OSError as error:
            if error.errno == errno.EINVAL:  # a sibling has shut the listener: the service stops
                self.stop_accepting()
            else:
                self._rest(listener, 1.0)  # no descriptors or no network: trying again at once would spin
            return False
        connection.setblocking(False)
        protocol = self._protocol()  # kept: where there is TLS, the loop would return its own
        self._unread.append((protocol, time.monotonic()))
        task = self._loop.create_task(self._connect(connection, protocol))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return True

    async def _connect(self, connection: socket.socket, protocol: asyncio.Protocol) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection, ssl=self.config.ssl)
        except OSError:  # the client is gone, or spoke no TLS
            connection.close()

    def _protocol(self) -> asyncio.Protocol:
        config = self.config
        # uvicorn types the class as any asyncio.Protocol, whose constructor takes nothing.
        protocol: asyncio.Protocol = config.http_protocol_class(  # type: ignore[call-arg]
            config=config, server_state=self.server_state, app_state=self.lifespan.state, _loop=self._loop
        )
        return protocol


def _has_spoken(protocol: Any) -> bool:  # noqa: ANN401 - one of uvicorn's two HTTP protocols
    """Whether a connection has sent a request, or is gone."""
    transport = protocol.transport  # None until TLS is agreed on
    return protocol.cycle is not None or (transport is not None and transport.is_closing())


class Shedding:
    """ASGI wrapper: adds `Connection: close` to replies while `sheds()` says so."""

    def __init__(self, app: ASGI3Application, sheds: Callable[[], bool]) -> None:
        """Wrap the app."""
        self._app, self._sheds = app, sheds

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Pass everything on, and edit the head of the reply."""

        async def send_head(event: ASGISendEvent) -> None:
            if event["type"] == "http.response.start" and self._sheds():
                others = [pair for pair in event.get("headers", ()) if pair[0] != b"connection"]
                event["headers"] = [*others, (b"connection", b"close")]
            await send(event)

        await self._app(scope, receive, send_head)
