# SPDX-License-Identifier: Apache-2.0
"""The stream of a running service: live, bounded, and no reason for anybody to wait."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from contextlib import ExitStack
from itertools import takewhile
from signal import SIGHUP, SIGKILL
from typing import TYPE_CHECKING, Any, Self

from harness import PATIENCE_S, Service, assert_invariants
from uvicorn.config import Config

from service import events
from service.accept import GatedServer
from service.events import MOST_STREAMS, Events
from service.worker import HTTP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

KEY = "hidden-key"
QUICK_S = 10.0
"""A stop takes some tenths of a second; one that waits for clients takes the graceful timeout, 30 s."""


class Stream:
    """A client of /events on a socket of its own. Use it in a `with`.

    Attributes:
        head: of the reply.
    """

    def __init__(self, service: Service) -> None:
        host, _, port = service.ops_bind.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        self._socket.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self._file = self._socket.makefile("rb")
        lines = iter(self._file.readline, b"")  # to the end, should the head never end
        self.head = b"".join(takewhile(lambda line: line != b"\r\n", lines)).decode().lower()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    @property
    def status(self) -> int:
        return int(self.head.split()[1])

    def messages(self) -> Iterator[tuple[str, Any]]:
        """Yield event and data of each message, as they come; end with the stream."""
        text = b""
        while size := int(self._file.readline() or b"0", 16):
            text += self._file.read(size)
            self._file.readline()
            *whole, text = text.split(b"\n\n")
            for message in whole:
                fields = dict(line.split(": ", 1) for line in message.decode().splitlines())
                if "event" in fields:
                    yield fields["event"], json.loads(fields["data"])

    def document(self) -> Any:
        """Return the next document."""
        event, data = next(self.messages())
        assert event == "status"
        return data


def test_streams_are_bounded_and_hold_up_nobody() -> None:
    """32 clients of one worker listen, one more asks /status; the stop says goodbye to all, and is quick."""
    with Service(workers=1, api_key=KEY) as service, ExitStack() as clients:
        service.wait_ready()
        streams = [clients.enter_context(Stream(service)) for _ in range(MOST_STREAMS)]
        assert {stream.status for stream in streams} == {200}
        assert "text/event-stream" in streams[0].head
        assert {stream.document()["service"]["answered_by"] for stream in streams} == {0}
        with Stream(service) as refused:
            assert refused.status == 503
            assert "retry-after: " in refused.head
        assert service.get("/status").json()["slots"][0]["load"] == 0  # a stream is no work
        assert KEY not in service.get("/status").text
        began = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < QUICK_S
        for stream in streams:
            *_, (event, data) = stream.messages()
            assert (event, data) == ("bye", {})
        assert_invariants(service)


def test_a_boot_is_watched_live() -> None:
    """From the first answer to ready on one stream, and each document is newer than the last."""
    with Service(workers=1, stub_scenario="slow_boot") as service:
        service.wait(lambda: service.get("/health").status_code == 200, what="an event loop answers")
        with Stream(service) as stream:
            seen = []
            for _, document in stream.messages():
                seen.append(document)
                if document["fleet"]["ready"]:
                    break
        times = [document["time"] for document in seen]
        assert times == sorted(set(times))
        assert seen[-1]["slots"][0]["boots"][-1]["outcome"] == "ready"
        assert_invariants(service)


def test_a_stream_outlives_its_worker_by_a_reconnect() -> None:
    """A roll says bye, a killed worker nothing; the next connection tells of the successors."""
    with Service(workers=2) as service:
        service.wait_ready()
        with Stream(service) as stream:
            stream.document()
            service.signal(SIGHUP)
            *_, (event, _data) = stream.messages()
            assert event == "bye"
        service.wait(
            lambda: all(
                row["generation"] == 2 and row["state"] == "ready" for row in service.workers().values()
            ),
            what="both have been replaced",
        )
        with Stream(service) as stream:
            slot = stream.document()["service"]["answered_by"]
            service.kill(slot, SIGKILL)
            with contextlib.suppress(ConnectionError, ValueError):  # cut off anywhere
                list(stream.messages())

        def replaced() -> bool:
            with Stream(service) as stream:
                row = stream.document()["slots"][slot]
                return row["generation"] == 3 and row["state"] == "ready"

        service.wait(replaced, what="a stream tells that the worker is back")
        assert_invariants(service)


def test_a_client_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is gone, whatever it had still to take, and the server ends without it."""
    monkeypatch.setattr(events, "STUCK_S", 0.2)

    async def make() -> bytes:
        return b"x" * 4_000_000

    async def serve() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            endpoint = Events(make, lambda: True, abort=lambda scope: server.abort(scope))  # noqa: PLW0108 - below
            server = GatedServer(Config(app=endpoint, log_config=None, **HTTP), [listener])
            server.config.load()
            serving = asyncio.create_task(server.serve())
            await server.accepting.wait()
            with socket.create_connection(listener.getsockname()) as client:
                await asyncio.to_thread(client.sendall, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                async with asyncio.timeout(PATIENCE_S):
                    await happens(lambda: endpoint.streams == 1)
                    await happens(lambda: not endpoint.streams and not server.server_state.connections)
            server.should_exit = True
            await serving

    async def happens(condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.01)

    asyncio.run(serve())
