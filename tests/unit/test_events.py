# SPDX-License-Identifier: Apache-2.0
"""The stream of documents: one a tick for everybody, none for nobody, and nobody holds the others up."""

from __future__ import annotations

import asyncio
from functools import wraps
from typing import TYPE_CHECKING, Any

import pytest

from service import events
from service.events import BYE, FAST_S, FRESH_S, MOST_STREAMS, MOVING, RETRY, SLOW_S, Events, stirs
from service.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

NOW = 100.0


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in an event loop of its own; one that hangs fails."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(50):
        await asyncio.sleep(0)


class Client:
    """One request for the stream.

    Attributes:
        got: the messages that it was sent, bodies as bytes.
        status: of the reply.
        stuck: it takes nothing any more.
    """

    def __init__(self, world: World, method: str = "GET") -> None:
        self.got: list[bytes] = []
        self.status, self.headers, self.ended, self.stuck = 0, {}, False, False
        self._left = asyncio.Event()
        self.scope: dict[str, Any] = {"type": "http", "method": method, "client": self}
        self.task = asyncio.create_task(world.events(self.scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
            return
        self.got.append(message["body"])
        self.ended = not message.get("more_body")

    def leave(self) -> None:
        self._left.set()


class World:
    """The endpoint, a clock that is moved by hand, and whatever happens around."""

    def __init__(self) -> None:
        self.time, self.made, self.changes, self.broken = NOW, 0, False, False
        self._sleepers: list[asyncio.Event] = []
        self.aborted: list[Client] = []
        self.events = Events(
            self._make,
            lambda: self.changes,
            abort=self._abort,
            sleep=self._sleep,
            clock=lambda: self.time,
        )

    async def _make(self) -> bytes:
        self.made += 1
        if self.broken:
            raise OSError("no such file")
        return b"%d" % self.made

    async def _sleep(self, seconds: float) -> None:
        assert seconds == FAST_S
        self._sleepers.append(asyncio.Event())
        await self._sleepers[-1].wait()

    def _abort(self, scope: Any) -> None:
        self.aborted.append(scope["client"])
        scope["client"].leave()

    async def join(self) -> Client:
        client = Client(self)
        await settle()
        return client

    async def wait(self, seconds: float) -> None:
        """Let so much time go by."""
        for _ in range(round(seconds / FAST_S)):
            self.time += FAST_S
            for sleeper in self._sleepers:
                sleeper.set()
            self._sleepers.clear()
            await settle()


def message(number: int) -> bytes:
    return b"event: status\ndata: %d\n\n" % number


@in_loop
async def test_a_stream_begins_with_a_document() -> None:
    """At once on connect, after the time in which to come again; no cache and no proxy may keep it."""
    world = World()
    client = await world.join()
    assert (client.status, client.got) == (200, [RETRY, message(1)])
    assert client.headers[b"content-type"].startswith(b"text/event-stream")
    assert client.headers[b"cache-control"] == b"no-store"
    client.leave()
    await client.task


@in_loop
async def test_a_quiet_fleet_is_told_of_once_a_second() -> None:
    """And not once more."""
    world = World()
    client = await world.join()
    await world.wait(5 * SLOW_S)
    assert client.got[1:] == [message(number) for number in range(1, 7)]
    client.leave()
    await client.task


@in_loop
async def test_a_change_is_told_of_within_a_quarter_of_a_second() -> None:
    """And so on for as long as there is change."""
    world = World()
    client = await world.join()
    await world.wait(SLOW_S)
    assert world.made == 2
    world.changes = True
    for more in range(1, 9):
        await world.wait(FAST_S)
        assert world.made == 2 + more
    world.changes = False
    await world.wait(SLOW_S - FAST_S)
    assert world.made == 10
    client.leave()
    await client.task


@in_loop
async def test_all_streams_share_one_document() -> None:
    """Whoever comes gets the newest at once, and no other is made for that."""
    world = World()
    clients = [await world.join() for _ in range(3)]
    assert world.made == 1
    await world.wait(SLOW_S)
    assert world.made == 2
    late = await world.join()
    assert late.got == [RETRY, message(2)]
    assert [client.got for client in clients] == [[RETRY, message(1), message(2)]] * 3
    for client in (*clients, late):
        client.leave()
        await client.task


@in_loop
async def test_nothing_is_made_while_nobody_listens() -> None:
    """Neither before the first client nor after the last; the next one gets a fresh document."""
    world = World()
    await world.wait(0)
    assert world.made == 0
    client = await world.join()
    client.leave()
    await client.task
    await world.wait(5 * SLOW_S)
    assert (world.made, world.events.streams) == (1, 0)
    client = await world.join()
    assert client.got == [RETRY, message(2)]
    client.leave()
    await client.task


@in_loop
async def test_one_stream_too_many_is_refused() -> None:
    """With 503 and when to come again, until another one leaves."""
    world = World()
    clients = [await world.join() for _ in range(MOST_STREAMS)]
    refused = await world.join()
    await refused.task
    assert (refused.status, int(refused.headers[b"retry-after"]) > 0, refused.ended) == (503, True, True)
    clients[0].leave()
    await clients[0].task
    clients[0] = await world.join()
    assert clients[0].status == 200
    for client in clients:
        client.leave()
        await client.task


@in_loop
async def test_a_slow_client_gets_the_newest_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes nothing at all is cut off."""
    world = World()
    slow, quick = await world.join(), await world.join()
    slow.stuck = True
    monkeypatch.setattr(events, "STUCK_S", 0.01)
    await world.wait(2 * SLOW_S)
    await slow.task
    assert world.aborted == [slow]
    assert slow.got == [RETRY, message(1)]
    await world.wait(SLOW_S)
    assert quick.got[-1] == message(4)
    assert world.events.streams == 1
    quick.leave()
    await quick.task


@in_loop
async def test_a_worker_that_leaves_says_bye() -> None:
    """On every stream, which ends then; and it takes no new one."""
    world = World()
    clients = [await world.join() for _ in range(3)]
    world.events.close()
    await asyncio.gather(*(client.task for client in clients))
    assert [(client.got[-1], client.ended) for client in clients] == [(BYE, True)] * 3
    late = await world.join()
    assert late.status == 503
    await late.task
    await world.wait(3 * SLOW_S)
    assert world.made == 1


@in_loop
async def test_a_worker_that_leaves_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has not taken the last message a moment later is cut off."""
    monkeypatch.setattr(events, "BYE_S", 0.01)
    world = World()
    client = await world.join()
    client.stuck = True
    world.events.close()
    await client.task
    assert world.aborted == [client]


@in_loop
async def test_a_document_that_cannot_be_made_is_missed(caplog: pytest.LogCaptureFixture) -> None:
    """The log says so, and the stream goes on with the next."""
    world = World()
    world.broken = True
    client = await world.join()
    await world.wait(SLOW_S)
    assert client.got == [RETRY]
    world.broken = False
    await world.wait(SLOW_S)
    assert client.got == [RETRY, message(3)]
    client.leave()
    await client.task


@in_loop
async def test_whoever_asks_for_the_head_gets_the_head() -> None:
    """And no stream."""
    world = World()
    client = Client(world, "HEAD")
    await client.task
    assert (client.status, client.got, world.made) == (200, [b""], 0)


@in_loop
async def test_a_request_that_is_cancelled_leaves_nothing_behind() -> None:
    """The server cancels what is left when its time is up."""
    world = World()
    client = await world.join()
    client.task.cancel()
    await asyncio.gather(client.task, return_exceptions=True)
    assert world.events.streams == 0


@pytest.mark.parametrize("state", list(State), ids=lambda state: state.label)
@pytest.mark.parametrize("age", [0.0, FRESH_S + 1])
def test_something_changes_while_a_slot_moves_or_has_just_moved(state: State, age: float) -> None:
    """Boots and drains are watched to their end; any other state for two seconds."""
    rows = [(State.READY, NOW - 1000), (state, NOW - age)]
    assert stirs(rows, NOW) is (state in MOVING or age == 0)


def test_a_fleet_without_rows_does_not_stir() -> None:
    """There is nothing that could."""
    assert not stirs([], NOW)
