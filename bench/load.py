# SPDX-License-Identifier: Apache-2.0
"""The load generator: closed and open loops over kept connections, in the caller's process, on uvloop.

Requests are encoded beforehand, replies are framed but not parsed, nothing is ever retried. Runs by
`uvloop.run`; a request costs it about 0.1 ms of CPU.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from harness import HOST, WORDS, percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from random import Random

LOST = 0
"""Status of a request that got no reply: its connection was refused or lost."""
PAUSE_S = 0.05
"""What a client of the closed loop waits after anything but 200, so that it does not spin."""
QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 100)

# ---------------------------------------------------------------------------------------------
# Requests


@dataclass(frozen=True, slots=True)
class Call:
    """A request, ready to be written."""

    wire: bytes
    texts: int = 0
    kind: str = ""


def post(path: str, body: bytes, texts: int, kind: str = "") -> Call:
    """Return the POST of a JSON body."""
    head = f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
    return Call(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body, texts, kind)


def post_texts(path: str, texts: Sequence[str], key: str | None = None, kind: str = "") -> Call:
    """Return the POST of texts, as a bare array or under a key."""
    body = json.dumps(texts if key is None else {key: texts}).encode()
    return post(path, body, len(texts), kind)


def mixed_texts(random: Random, count: int) -> list[str]:
    """Return texts as long as those of `harness.mixed_text`, evenly drawn, in random order.

    One of each n-th part of the distribution: so any request of 32 texts, and any 32 requests of one, cost
    about the same, and a slow system that sees a few of them sees the same mixture as a fast one.
    """
    logs = statistics.NormalDist(3.33, 0.8)
    points = [min(1 - 1e-9, max(1e-9, (n + random.random()) / count)) for n in range(count)]
    lengths = [max(3, min(200, round(math.exp(logs.inv_cdf(point))))) for point in points]
    random.shuffle(lengths)
    return [" ".join(random.choices(WORDS, k=length)) for length in lengths]


# ---------------------------------------------------------------------------------------------
# Replies


@dataclass(slots=True)
class Reply:
    """The head of a reply, and its body if that was wanted."""

    status: int
    headers: dict[bytes, bytes]
    body: bytearray | None = None
    size: int = 0

    @classmethod
    def of(cls, head: bytes) -> Reply:
        """Read status line and headers."""
        first, *lines = head.split(b"\r\n")
        pairs = (line.partition(b":") for line in lines)
        return cls(int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in pairs})

    def json(self) -> Any:  # noqa: ANN401 - JSON is anything
        """Return the parsed body."""
        return json.loads(bytes(self.body or b""))


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection: one request at a time, and where its reply ends.

    Attributes:
        closed: nothing can be sent any more.
        local_port: what the server knows this connection by.
    """

    def __init__(self) -> None:
        self.closed, self.local_port = False, 0
        self._waiter: asyncio.Future[Reply] | None = None
        self._reply: Reply | None = None
        self._buffer = bytearray()
        self._left = 0.0
        self._chunked = self._trailer = self._keep = False

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, HOST, port)
        return connection

    def exchange(self, wire: bytes, *, keep: bool = False) -> asyncio.Future[Reply]:
        """Send a request; the future fails with an OSError if the connection is lost under it."""
        if self.closed or self._transport.is_closing():
            raise ConnectionResetError
        self._waiter = asyncio.get_running_loop().create_future()
        self._reply, self._keep = None, keep
        self._buffer.clear()
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
        self.local_port = transport.get_extra_info("sockname")[1]

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request that waits, unless its reply was to end so."""
        self.closed = True
        if self._waiter is not None and not self._waiter.done():
            if self._reply is not None and self._left == math.inf and exc is None:
                self._waiter.set_result(self._reply)
            else:
                self._waiter.set_exception(exc or ConnectionResetError("closed"))

    def data_received(self, data: bytes) -> None:
        """Read the head, then count the body."""
        if self._waiter is None or self._waiter.done():
            self.close()
        elif self._reply is not None:
            self._take(data)
        else:
            self._buffer += data
            end = self._buffer.find(b"\r\n\r\n")
            if end >= 0:
                rest = bytes(self._buffer[end + 4 :])
                self._begin(Reply.of(bytes(self._buffer[:end])))
                self._take(rest)

    def _begin(self, reply: Reply) -> None:
        """Note how the body's end will be known."""
        self._reply = reply
        self._buffer.clear()
        reply.body = bytearray() if self._keep else None
        self._chunked = reply.headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        self._trailer = False
        length = reply.headers.get(b"content-length")
        self._left = 0 if self._chunked else math.inf if length is None else int(length)

    def _take(self, data: bytes) -> None:
        """Take a piece of the body."""
        if self._chunked:
            self._buffer += data
            ended = self._chunks()
        else:
            self._body(data)
            self._left -= len(data)
            ended = self._left <= 0
        if ended:
            assert self._reply
            assert self._waiter
            if self._reply.headers.get(b"connection", b"").lower() == b"close":
                self.close()
            self._waiter.set_result(self._reply)

    def _body(self, data: bytes | bytearray) -> None:
        assert self._reply
        self._reply.size += len(data)
        if self._reply.body is not None:
            self._reply.body += data

    def _chunks(self) -> bool:
        """Take what is complete of a chunked body; tell whether that was all. `_left` counts CR LF too."""
        while True:
            if self._left:
                piece = self._buffer[: int(self._left)]
                self._body(piece[: max(0, int(self._left) - 2)])
                del self._buffer[: len(piece)]
                self._left -= len(piece)
            end = self._buffer.find(b"\r\n")
            if self._left or end < 0:
                return False
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            if self._trailer and not line:
                return True
            if not self._trailer:
                size = int(line.partition(b";")[0], 16)
                self._trailer, self._left = size == 0, size + 2 if size else 0


async def fetch(port: int, path: str, timeout_s: float = 10.0) -> Reply | None:
    """GET a path on a connection of its own; None if there was no reply."""
    with suppress(OSError):
        async with asyncio.timeout(timeout_s):
            connection = await Connection.open(port)
            try:
                return await connection.exchange(
                    f"GET {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n".encode(), keep=True
                )
            finally:
                connection.close()
    return None


# ---------------------------------------------------------------------------------------------
# Loops


@dataclass(slots=True, eq=False)
class Outcome:
    """What became of a request.

    Attributes:
        call: the request.
        due_at: when it had to be sent; latency counts from here, so a late client hides nothing.
        done_at: the last byte of its reply, or the end of its connection; 0: nothing yet.
        status: of the reply; LOST without one.
        error: why there was none.
        retry_after: what the reply said, in seconds.
        local_port: of its connection; 0: there was none.
    """

    call: Call
    due_at: float
    done_at: float = 0.0
    status: int = LOST
    error: str = ""
    retry_after: float | None = None
    local_port: int = 0

    @property
    def seconds(self) -> float:
        """Its latency."""
        return self.done_at - self.due_at


@dataclass
class Load:
    """One run of a loop against a port.

    Attributes:
        port: where to.
        done: what was answered or lost, in that order.
        pending: what is under way; after the run, what the deadline cut off.
        texts: how many were answered with 200.
        began_at: the start of the loop.
        ended_at: its end.
    """

    port: int
    done: list[Outcome] = field(default_factory=list)
    pending: dict[int, Outcome] = field(default_factory=dict)
    texts: int = 0
    began_at: float = 0.0
    ended_at: float = 0.0

    async def closed_loop(
        self,
        calls: Iterator[Call],
        *,
        clients: int,
        seconds: float,
        least: int = 0,
        deadline_s: float = math.inf,
    ) -> None:
        """Keep so many clients busy for so long and for at least so many replies, then wait for the rest.

        At the deadline, counted from the start, connections are closed under what is still pending.
        """
        self.began_at = time.perf_counter()
        until = self.began_at + seconds

        async def client() -> None:
            connection = None
            while time.perf_counter() < until or len(self.done) < least:
                outcome = Outcome(next(calls), time.perf_counter())
                connection = await self._perform(outcome, connection)
                if outcome.status != 200:
                    await asyncio.sleep(PAUSE_S)
            if connection is not None:
                connection.close()

        await self._finish([asyncio.create_task(client()) for _ in range(clients)], deadline_s)

    async def open_loop(
        self, calls: Iterator[Call], *, rate: float, seconds: float, random: Random, deadline_s: float = 60.0
    ) -> None:
        """Send as a Poisson process, whatever becomes of it, on any idle connection or a new one."""
        self.began_at = due = time.perf_counter()
        idle: list[Connection] = []
        tasks: set[asyncio.Task[None]] = set()

        async def arrive(outcome: Outcome) -> None:
            connection = idle.pop(random.randrange(len(idle))) if idle else None
            connection = await self._perform(outcome, connection)
            if connection is not None:
                idle.append(connection)

        while (due := due + random.expovariate(rate)) < self.began_at + seconds:
            if (wait_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            task = asyncio.create_task(arrive(Outcome(next(calls), due)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await self._finish([*tasks], seconds + deadline_s)
        for connection in idle:
            connection.close()

    async def _perform(self, outcome: Outcome, connection: Connection | None) -> Connection | None:
        """Send one request, note what became of it; return the connection if it can be used again."""
        self.pending[id(outcome)] = outcome
        try:
            if connection is None or connection.closed:
                connection = await Connection.open(self.port)
            outcome.local_port = connection.local_port
            reply = await connection.exchange(outcome.call.wire)
        except OSError as error:
            outcome.error = type(error).__name__
        except asyncio.CancelledError:
            if connection is not None:
                connection.close()
            raise
        else:
            outcome.status = reply.status
            if after := reply.headers.get(b"retry-after"):
                outcome.retry_after = float(after)
            if reply.status == 200:
                self.texts += outcome.call.texts
        outcome.done_at = time.perf_counter()
        del self.pending[id(outcome)]
        self.done.append(outcome)
        return connection if connection is not None and not connection.closed else None

    async def _finish(self, tasks: list[asyncio.Task[None]], deadline_s: float) -> None:
        """Wait for all, or until the deadline; then cut off what is left."""
        if tasks:
            left_s = self.began_at + deadline_s - time.perf_counter()
            finished, late = await asyncio.wait(
                tasks, timeout=None if math.isinf(left_s) else max(0.0, left_s)
            )
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            for task in finished:
                task.result()
        self.ended_at = time.perf_counter()

    # What came of it

    def of(self, status: int = 200) -> list[Outcome]:
        """Return the outcomes with a status."""
        return [outcome for outcome in self.done if outcome.status == status]

    def statuses(self) -> dict[str, int]:
        """Return how many replies of each status there were; losses under their reason."""
        return dict(Counter(str(one.status) if one.status else one.error for one in self.done))

    def latency_ms(self) -> dict[str, float]:
        """Return the quantiles of those answered with 200, and their number.

        What the deadline cut off counts with the time it had waited: a bound from below.
        """
        waited = [self.ended_at - one.due_at for one in self.pending.values()]
        return latency_ms([one.seconds for one in self.of(200)] + waited) | {"cut_off": len(waited)}


def latency_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return quantiles in milliseconds, and how many there were."""
    found = {f"p{q}": 1e3 * percentile(seconds, q) for q in QUANTILES} if seconds else {}
    return {"n": len(seconds)} | found


# ---------------------------------------------------------------------------------------------
# Meanwhile


@dataclass(slots=True)
class Look:
    """One reply to a probe; no status: there was none."""

    at: float
    seconds: float
    status: int | None
    note: Any = None


class Probe:
    """Asks a path again and again, each time on a new connection, as a kubelet does."""

    def __init__(
        self, port: int, path: str, every_s: float, note: Callable[[Reply], Any] | None = None
    ) -> None:
        """Prepare; `note` takes from a reply what its look shall keep."""
        self.looks: list[Look] = []
        self._port, self._path, self._every_s, self._note = port, path, every_s, note

    async def run(self) -> None:
        """Ask until cancelled; a slow reply delays no other."""
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(self._look())
                due += self._every_s
                await asyncio.sleep(max(0.0, due - time.perf_counter()))

    async def _look(self) -> None:
        at = time.perf_counter()
        reply = await fetch(self._port, self._path)
        look = Look(at, time.perf_counter() - at, reply.status if reply else None)
        if reply and self._note:
            look.note = self._note(reply)
        self.looks.append(look)

    def summary(self) -> dict[str, Any]:
        """Return latencies, and replies by status."""
        counts = Counter(str(look.status or "none") for look in self.looks)
        return latency_ms([look.seconds for look in self.looks if look.status]) | {"statuses": dict(counts)}


class Trend:
    """A figure read every few seconds in a thread, and the line through it."""

    def __init__(self, read: Callable[[], float], every_s: float) -> None:
        """Prepare."""
        self.points: list[tuple[float, float]] = []
        self._read, self._every_s = read, every_s

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            value = await asyncio.to_thread(self._read)
            self.points.append((time.perf_counter(), value))
            await asyncio.sleep(self._every_s)


def slope_per_minute(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the slope of the line through (seconds, value) points by minute, and its standard error."""
    if len(points) < 3:
        return float("nan"), float("nan")
    times, values = [at / 60 for at, _ in points], [value for _, value in points]
    slope, base = statistics.linear_regression(times, values)
    residue = sum((value - base - slope * at) ** 2 for at, value in zip(times, values, strict=True))
    mean = statistics.fmean(times)
    width = sum((at - mean) ** 2 for at in times)
    return slope, math.sqrt(residue / (len(points) - 2) / width)


async def beside(main: Any, *others: Any) -> None:  # noqa: ANN401 - coroutines
    """Run coroutines until the first of them has ended, then stop the others."""
    tasks = [asyncio.create_task(other) for other in others]
    try:
        await main
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for result in ended:
            if isinstance(result, Exception):
                raise result


def fits(texts: Iterable[Sequence[float]], count: int) -> bool:
    """Tell whether a reply holds so many vectors of one length."""
    vectors = list(texts)
    return len(vectors) == count and len({len(vector) for vector in vectors}) == 1
