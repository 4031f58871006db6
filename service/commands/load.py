# SPDX-License-Identifier: Apache-2.0
"""The clients of `warmfleet bench`: a closed loop over kept connections, one thread, uvloop. Command line.

Requests are encoded beforehand and replies are framed but not parsed, so that a request costs the client some
50 microseconds; whether that was little enough is judged afterwards, by the CPU time that the client took.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

import httptools
import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.ops_client import Address

    Tell = Callable[["Log", float], None]

LOST: Final = 0
"""Status of a request that got no reply."""
PAUSE_S = 0.05
"""What a client waits after anything but 200, so that it does not spin."""
GRACE_S = 10.0
"""For replies that are under way when the time is over."""
TELL_S = 0.2
BODIES = 64
WORDS: Final = (
    *("river", "mountain", "letter", "garden", "window", "summer", "people", "water", "music", "paper"),
    *("morning", "silver", "engine", "market", "island", "winter", "bridge", "forest", "school", "doctor"),
    *("family", "number", "question", "history", "machine", "village", "weather", "station", "kitchen"),
)


@dataclass(frozen=True)
class Work:
    """What is asked.

    Attributes:
        seconds: that requests are sent for.
        clients: connections, each with one request at a time.
        texts: of a request.
        words: of a text.
    """

    seconds: float
    clients: int
    texts: int
    words: int


@dataclass
class Log:
    """What came of it, a value for each request that was answered 200; times are seconds from the start.

    Attributes:
        statuses: replies by status; `LOST`: there was none.
        at: when each reply was complete.
        took: from sending to there.
        timings: the headers `Server-Timing`.
        seconds: from the start until the sending ended.
        cpu_s: processor time of this process meanwhile.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    at: array[float] = field(default_factory=lambda: array("d"))
    took: array[float] = field(default_factory=lambda: array("d"))
    timings: list[bytes] = field(default_factory=list)
    seconds: float = 0.0
    cpu_s: float = 0.0


def requests(address: Address, work: Work, key: str | None = None) -> list[bytes]:
    """Return different requests with as many texts of as many words, ready to be sent."""
    drawn = random.Random(0)  # noqa: S311 - texts, the same ones every time
    bearer = f"authorization: Bearer {key}\r\n" if key else ""
    made = []
    for _ in range(BODIES):
        texts = [" ".join(drawn.choices(WORDS, k=work.words)) for _ in range(work.texts)]
        body = json.dumps({"inputs": texts}).encode()
        head = (
            f"POST {address.prefix}/embed HTTP/1.1\r\nhost: {address.host}:{address.port}\r\n{bearer}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        made.append(head.encode() + body)
    return made


def run(address: Address, wires: list[bytes], work: Work, tell: Tell) -> Log:
    """Send until the time is over or Ctrl-C is pressed; return what came of it."""
    return uvloop.run(_run(address, wires, work, tell))


async def _run(address: Address, wires: list[bytes], work: Work, tell: Tell) -> Log:
    log, stop, loop = Log(), asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    began, cpu = time.perf_counter(), time.process_time()
    clients = [
        asyncio.create_task(_client(address, wires[nth % BODIES :] + wires[: nth % BODIES], log, stop, began))
        for nth in range(work.clients)
    ]
    while not stop.is_set() and (gone := time.perf_counter() - began) < work.seconds:
        tell(log, gone)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), min(TELL_S, work.seconds - gone))
    stop.set()
    log.seconds, log.cpu_s = time.perf_counter() - began, time.process_time() - cpu
    _, late = await asyncio.wait(clients, timeout=GRACE_S)
    for client in late:
        client.cancel()
        log.statuses[LOST] += 1
    await asyncio.gather(*late, return_exceptions=True)
    return log


async def _client(address: Address, wires: list[bytes], log: Log, stop: asyncio.Event, began: float) -> None:
    """Send one request after the other."""
    connection, nth = None, 0
    try:
        while not stop.is_set():
            try:
                if connection is None or connection.closed:
                    connection = await Connection.open(address)
                sent = time.perf_counter()
                reply = await connection.exchange(wires[nth % len(wires)])
            except OSError:
                status = LOST
            else:
                status, done = reply.status, time.perf_counter()
                if status == 200:  # noqa: PLR2004 - OK
                    log.at.append(done - began)
                    log.took.append(done - sent)
                    log.timings.append(reply.timing)
            nth += 1
            log.statuses[status] += 1
            if status != 200:  # noqa: PLR2004 - OK
                await asyncio.sleep(PAUSE_S)
    finally:
        if connection is not None:
            connection.close()


@dataclass(slots=True)
class Reply:
    """What is kept of a reply."""

    status: int = 0
    timing: bytes = b""


class Connection(asyncio.Protocol):
    """A connection with one request at a time.

    Attributes:
        closed: nothing can be sent any more.
    """

    def __init__(self) -> None:
        """Wait for the connection."""
        self.closed = False
        self._reply = Reply()
        self._waiter: asyncio.Future[Reply] | None = None
        self._parser = httptools.HttpResponseParser(self)

    @classmethod
    async def open(cls, address: Address) -> Connection:
        """Connect.

        Raises:
            OSError: nobody is there.
        """
        _, connection = await asyncio.get_running_loop().create_connection(
            cls, address.host, address.port, ssl=True if address.scheme == "https" else None
        )
        return connection

    def exchange(self, wire: bytes) -> asyncio.Future[Reply]:
        """Send a request; the future fails with an OSError if the connection is lost under it."""
        self._reply = Reply()
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(wire)
        return self._waiter

    def close(self) -> None:
        """Close, whatever is under way."""
        self.closed = True
        self._transport.abort()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request that waits."""
        self.closed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(exc if isinstance(exc, OSError) else ConnectionResetError("closed"))

    def data_received(self, data: bytes) -> None:
        """Read on; what is no HTTP ends the connection."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    # What the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep the one header that is of use."""
        if name.lower() == b"server-timing":
            self._reply.timing = value

    def on_message_complete(self) -> None:
        """Hand the reply over; the service may have announced that it closes now."""
        self._reply.status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(self._reply)
