# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the ops listener: the real page, with documents that a test scripts. Use it in a `with`."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from harness import free_port

from service import assets

if TYPE_CHECKING:
    from collections.abc import Callable

    from scripted import Document


class Double:
    """Serves the page below a path prefix.

    Attributes:
        make: returns the document of now.
        tick: seconds between two documents of a stream.
        streams: whether `/events` is served, else 503.
        opened: how many streams were opened so far.
        listening: how many streams are open.
        asked: how often `/status` was asked for.
    """

    def __init__(self, make: Callable[[], Document], *, prefix: str = "", tick: float = 0.1) -> None:
        self.make = make
        self.tick = tick
        self.streams = True
        self.opened = self.listening = self.asked = 0
        self.leave = threading.Event()
        self._lock = threading.Lock()
        self._prefix = prefix
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self._port}{self._prefix}/"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen: on the port of before, if there was one; nobody's outgoing connection takes such a port."""
        self.leave = threading.Event()
        self._port = self._port or free_port()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Go away: streams end, connections are refused from now on."""
        if self._server:
            self.leave.set()
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def end_streams(self) -> None:
        """End every stream, as a worker does that goes; the next ones are served."""
        self.leave.set()
        self.leave = threading.Event()

    def wait_for(self, condition: Callable[[], bool], timeout: float = 45.0) -> None:
        """Wait until the browser has done something."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"not within {timeout:g} s"
            time.sleep(0.02)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        double = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                asked = urlsplit(self.path).path
                path = asked.removeprefix(double._prefix) if asked.startswith(f"{double._prefix}/") else ""
                with contextlib.suppress(ConnectionError):  # the browser has left
                    double._answer(self, path)

        return Handler

    def _answer(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        if path == "/events":
            self._stream(handler)
        elif path == "/status":
            self.asked += 1
            send(handler, 200, json.dumps(self.make()).encode(), {"content-type": "application/json"})
        elif path == "/" or path.removeprefix("/page/") in assets.load():
            name = "index.html" if path == "/" else path.removeprefix("/page/")
            reply = assets.load()[name].reply({})
            send(handler, reply.status_code, bytes(reply.body), dict(reply.headers))
        else:
            send(handler, 404, b"", {})

    def _stream(self, handler: BaseHTTPRequestHandler) -> None:
        if not self.streams:
            return send(handler, 503, b"", {"retry-after": "2"})
        leave = self.leave
        with self._lock:
            self.opened += 1
            self.listening += 1
        try:
            self._tell(handler, leave)
        finally:
            with self._lock:
                self.listening -= 1
        return None

    def _tell(self, handler: BaseHTTPRequestHandler, leave: threading.Event) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(b"retry: 1000\n\n")
        while not leave.is_set() and self.streams:
            handler.wfile.write(f"event: status\ndata: {json.dumps(self.make())}\n\n".encode())
            handler.wfile.flush()
            leave.wait(self.tick)


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    """Answer once."""
    handler.send_response(status)
    for name, value in (headers | {"content-length": str(len(body))}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
