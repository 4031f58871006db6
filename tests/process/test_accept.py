# SPDX-License-Identifier: Apache-2.0
"""Who takes a connection: the gate and the fair accept, in a real service on the stub backend."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from types import SimpleNamespace
from typing import TYPE_CHECKING, Self

import httpx
import pytest
from harness import DEADLINE_S, Service, assert_invariants, until
from uvicorn.config import Config

from service.accept import GatedServer

if TYPE_CHECKING:
    from types import TracebackType

TEXTS = b'["hello world"]'
HEAD = "POST /embed HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
REQUEST = f"{HEAD}content-length: {len(TEXTS)}\r\n\r\n".encode() + TEXTS
COLD = ("spawned", "pinned", "waiting", "loading", "warming")


# Fair accept


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_burst_of_connections_is_spread_evenly(loop: str, tmp_path: Path) -> None:
    """400 simultaneous connections on 4 workers differ at most 5 % from even, on either event loop.

    One text a pass: where passes take many, whoever ends one first is rightly given more.
    """
    environ = {}
    if loop == "asyncio":
        (tmp_path / "uvloop.py").write_text("raise ImportError('hidden by the test')\n")
        environ["PYTHONPATH"] = str(tmp_path)
    with Service(environ=environ, workers=4, stub_forward_ms=20, max_batch_requests=1) as service:
        service.wait_ready()
        for pid in service.pids().values():
            assert ("uvloop" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")) == (loop == "uvloop")
        asyncio.run(burst(service, 40))  # a worker's first request is slower than the rest
        before = served(service)
        assert asyncio.run(burst(service, 400)) == Counter({200: 400})
        share = served(service) - before
        assert set(share) == {"s0", "s1", "s2", "s3"}
        assert all(95 <= count <= 105 for count in share.values()), share
        assert_invariants(service)


def test_keepalive_clients_move_to_the_workers_that_come_later(tmp_path: Path) -> None:
    """64 keep-alive clients that met one warm worker of four are spread over all soon after they are warm."""
    late = scenario(tmp_path, 'stage = "load"\nkind = "slow"\nslots = [1, 2, 3]\nseconds = 4')
    with Service(
        environ=late, workers=4, concurrent_loads=4, stub_forward_ms=4, max_batch_requests=1
    ) as service:
        service.wait_state(0, "ready")
        with Crowd(service, 64) as crowd:
            crowd.wait_for(128)
            assert all(state in COLD for slot, state in service.states().items() if slot)
            assert set(served(service)) == {"s0"}
            service.wait_ready()
            until(lambda: largest_share(connections(service)) < 0.4, 10, "connections are spread")
            before = served(service)
            crowd.wait_for(400)
            window = served(service) - before
            assert set(window) == {"s0", "s1", "s2", "s3"}
            assert largest_share(window) < 0.4, window
        assert set(crowd.answers) == {200}
        assert_invariants(service)


def test_stopped_sibling_slows_nobody() -> None:
    """A worker under SIGSTOP looks idle for ever; three of four go on at three quarters of the speed."""
    with Service(workers=4, stub_forward_ms=20) as service:
        service.wait_ready()
        with Crowd(service, 24, keepalive=False) as crowd:
            crowd.wait_for(100)
            full = crowd.seconds_for(300)
        until(lambda: not service.worker(1)["load"], what="it is idle")
        pid = service.kill(1, SIGSTOP)
        try:
            until(lambda: service.worker(1)["heartbeat_age_seconds"] > 0.6, what="its row is stale")
            with Crowd(service, 24, keepalive=False) as crowd:
                reduced = crowd.seconds_for(300)
        finally:
            os.kill(pid, SIGCONT)
        print(f"300 answers: {full:.2f} s from four workers, {reduced:.2f} s from three")
        assert reduced < full * 2.2
        assert set(crowd.answers) == {200}
        until(lambda: service.worker(1)["heartbeat_age_seconds"] < 0.6, what="it is back")
        assert_invariants(service)


def test_silent_connection_is_the_only_load_that_it_makes() -> None:
    """Connections that have sent their request are no unread ones, also behind one that stays silent."""
    server = GatedServer(Config(app="none"), [])
    open_transport = SimpleNamespace(is_closing=lambda: False)
    silent = SimpleNamespace(cycle=None, transport=open_transport)
    spoken = SimpleNamespace(cycle=object(), transport=open_transport)
    greeting = SimpleNamespace(cycle=None, transport=None)  # TLS is not agreed on yet
    now = time.monotonic()
    server._unread = [(silent, now - 2), (silent, now), (spoken, now), (spoken, now), (greeting, now)]
    assert server.unread == 2


# Cold workers


@pytest.mark.parametrize("generation", [1, 2], ids=["first boot", "respawn"])
def test_cold_worker_serves_nothing_while_a_sibling_is_warm(tmp_path: Path, generation: int) -> None:
    """Not one request reaches a worker that loads, as long as another is READY; none is refused either."""
    slow = f'stage = "load"\nkind = "slow"\nslots = [1]\nseconds = 3\ngenerations = [{generation}]'
    with Service(environ=scenario(tmp_path, slow), workers=2) as service:
        service.wait_state(0, "ready")
        if generation == 2:
            service.wait_ready()
            service.kill(1, SIGKILL)
        service.wait_state(1, "loading", generation)
        before = service.metrics().total("warmfleet_requests_total", slot="s1")
        seen = 0
        with service.load(clients=4) as load:
            while True:
                count = service.metrics().total("warmfleet_requests_total", slot="s1")
                if service.states()[1] not in COLD:  # read after the count
                    break
                assert count == before, "a cold worker served a request"
                seen = len(load.outcomes)
        assert seen > 20
        assert not load.lost
        assert_invariants(service)


def test_api_of_a_cold_fleet_answers_503_at_once() -> None:
    """While all are cold the API says 503, when to come back, and closes; its probes answer the truth."""
    with Service(workers=2, stub_load_ms=2500) as service:
        until(lambda: set(service.states().values()) & set(COLD), what="a worker is up")
        for _ in range(5):
            began = time.monotonic()
            reply = httpx.post(f"{service.url}/embed", content=TEXTS, trust_env=False)
            assert time.monotonic() - began < 1
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.headers["connection"] == "close"
            assert "no worker is warm yet" in reply.json()["error"]
        assert service.get("/health", ops=False).json() == {"status": "ok"}
        ready = service.get("/ready", ops=False)
        assert (ready.status_code, ready.json()["status"]) == (503, "starting")
        assert not set(service.states().values()) - set(COLD)
        service.wait_ready()
        assert service.get("/ready", ops=False).status_code == 200
        assert service.embed().ok
        assert_invariants(service)


def test_silent_connections_leave_a_cold_worker(tmp_path: Path) -> None:
    """Connections that a cold worker took and that stay silent are closed once a sibling is warm."""
    late = scenario(
        tmp_path,
        'stage = "load"\nkind = "slow"\nslots = [0]\nseconds = 3',
        'stage = "load"\nkind = "slow"\nslots = [1]\nseconds = 30',
    )
    with ExitStack() as stack, Service(environ=late, workers=2, concurrent_loads=2) as service:
        until(lambda: list(service.states().values()) == ["loading"] * 2, what="both are loading")
        pids = service.pids()
        clients = [stack.enter_context(client) for slot in (0, 1) for client in taken_by(service, slot, 20)]
        taken = connections(service)
        assert taken == dict.fromkeys(pids.values(), 20)
        service.wait_state(0, "ready")
        until(lambda: connections(service)[pids[1]] == 0, what="the cold worker has closed them")
        assert service.states()[1] == "loading"
        assert connections(service)[pids[0]] == taken[pids[0]]
        answers = Counter(exchange(client) for client in clients)
        assert answers == Counter({200: taken[pids[0]], None: taken[pids[1]]})


# No worker, for a while


def test_requests_wait_for_the_respawn_of_a_single_worker() -> None:
    """The only worker is killed: requests wait in the kernel's queue, and the next worker serves them."""
    with Service(workers=1, stub_load_ms=700) as service:
        service.wait_ready()
        service.kill(0, SIGKILL)
        answers = asyncio.run(burst(service, 8))
        assert answers == Counter({200: 8})
        assert service.worker(0)["generation"] == 2
        assert_invariants(service)


def test_requests_are_refused_when_the_hold_is_over() -> None:
    """The respawn takes longer than `cold_hold`: 503 with `Retry-After`, and no endless wait."""
    with Service(workers=1, stub_scenario="slow_respawn", cold_hold=0.2) as service:
        service.wait_ready()
        service.kill(0, SIGKILL)
        service.wait_state(0, "loading", 2)
        reply = httpx.post(f"{service.url}/embed", content=TEXTS, trust_env=False, timeout=DEADLINE_S)
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.headers["connection"] == "close"
        assert service.states()[0] == "loading"
        service.wait_state(0, "ready", 2)
        assert service.embed().ok
        assert_invariants(service)


# The listeners


def test_tls_on_main_only(tmp_path: Path) -> None:
    """Gunicorn's `certfile` encrypts the API; ops stays plain; a client that speaks no TLS harms nobody."""
    key, certificate = make_certificate(tmp_path)
    environ = {"GUNICORN_CMD_ARGS": f"--certfile {certificate} --keyfile {key}"}
    with ExitStack() as stack, Service(environ=environ, workers=2) as service:
        service.wait_ready()
        silent = stack.enter_context(connect(service))
        trust = ssl.create_default_context(cafile=certificate)
        with httpx.Client(verify=trust, trust_env=False, timeout=DEADLINE_S) as client:
            for _ in range(10):
                reply = client.post(
                    f"https://{service.bind}/embed", content=TEXTS, headers={"connection": "close"}
                )
                assert reply.status_code == 200
                assert len(reply.json()["embeddings"]) == 1
                assert exchange(stack.enter_context(connect(service))) is None  # plain text
        assert service.ready()[0] == 200
        assert exchange(silent) is None
        assert_invariants(service)


def test_worker_without_descriptors_neither_spins_nor_dies() -> None:
    """When accept fails for want of descriptors, the worker waits, and serves again once there are some."""
    with ExitStack() as stack, Service(workers=1) as service:
        service.wait_ready()
        pid = service.pids()[0]
        descriptors = Path(f"/proc/{pid}/fd")
        limit = len(list(descriptors.iterdir())) + 8
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))
        with ExitStack() as crowd:
            for _ in range(40):
                crowd.enter_context(connect(service))
            until(lambda: len(list(descriptors.iterdir())) >= limit, what="all descriptors are taken")
            began, used = time.monotonic(), cpu_seconds(pid)
            until(lambda: time.monotonic() > began + 1.5)
            assert cpu_seconds(pid) - used < 0.5
        answer = stack.enter_context(connect(service))
        assert exchange(answer) == 200
        assert service.pids() == {0: pid}
        assert_invariants(service)


# Clients


class Crowd:
    """Clients that ask again as soon as they are answered, on an event loop in a thread of its own."""

    def __init__(self, service: Service, clients: int, *, keepalive: bool = True) -> None:
        self.answers: Counter[int | None] = Counter()
        self._address = address(service)
        self._clients, self._keepalive = clients, keepalive
        self._stop = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        self._thread.join()

    def wait_for(self, count: int) -> None:
        """Let that many further requests be answered."""
        goal = self.answers.total() + count
        until(lambda: self.answers.total() >= goal, what=f"{count} further answers")

    def seconds_for(self, count: int) -> float:
        """Return how long that many answers take."""
        began = time.monotonic()
        self.wait_for(count)
        return time.monotonic() - began

    async def _run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(self._clients)))

    async def _client(self) -> None:
        end = time.monotonic() + 60
        while not self._stop and time.monotonic() < end:
            try:
                reader, writer = await asyncio.open_connection(*self._address)
            except OSError:  # not up yet
                await asyncio.sleep(0.05)
                continue
            closing = False
            while not (closing or self._stop):
                status, closing = await ask(reader, writer, keepalive=self._keepalive)
                self.answers[status] += 1
            writer.close()


async def burst(service: Service, connections: int) -> Counter[int | None]:
    """Open so many connections at once, send one request on each, and count the answers by status."""

    async def one() -> int | None:
        reader, writer = await asyncio.open_connection(*address(service))
        status, _ = await ask(reader, writer, keepalive=False)
        writer.close()
        return status

    return Counter(await asyncio.gather(*(one() for _ in range(connections))))


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, keepalive: bool
) -> tuple[int | None, bool]:
    """Send one request; return status, None for a connection that closed instead, and whether it is over."""
    request = REQUEST if keepalive else REQUEST.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    try:
        writer.write(request)
        async with asyncio.timeout(DEADLINE_S):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            size = int(head.partition("content-length: ")[2].split("\r\n")[0])
            json.loads(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None, True
    return int(head.split()[1]), "connection: close" in head


def exchange(client: socket.socket) -> int | None:
    """Send a request on a connection; return the status, or None if it is closed without an answer."""
    try:
        client.sendall(REQUEST)
        answer = client.recv(65536)
    except ConnectionError:
        return None
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") and b" 400 " not in answer[:20] else None


def address(service: Service) -> tuple[str, int]:
    host, _, port = service.bind.rpartition(":")
    return host, int(port)


def connect(service: Service) -> socket.socket:
    """Open a connection to the API and say nothing."""
    return socket.create_connection(address(service), timeout=DEADLINE_S)


def taken_by(service: Service, slot: int, count: int) -> list[socket.socket]:
    """Open silent connections that this one of two workers accepts, for its sibling is stopped meanwhile."""
    before = connections(service).total()
    sibling = service.kill(1 - slot, SIGSTOP)
    try:
        clients = [connect(service) for _ in range(count)]
        until(lambda: connections(service).total() == before + count, what="all are accepted")
    finally:
        os.kill(sibling, SIGCONT)
    return clients


# Looking


def served(service: Service) -> Counter[str]:
    """Return the answered requests by slot."""
    counts: Counter[str] = Counter()
    for (name, labels), value in service.metrics().samples.items():
        found = dict(labels)
        if name == "warmfleet_requests_total" and found["endpoint"] == "/embed" and found["status"] == "200":
            counts[found["slot"]] += int(value)
    return counts


def connections(service: Service) -> Counter[int]:
    """Return the open API connections by the process that has accepted them."""
    port, established = f":{address(service)[1]:04X}", "01"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    ours = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(port) and row[3] == established}
    owned: Counter[int] = Counter()
    for pid in service.pids().values():
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                owned[pid] += str(descriptor.readlink()) in ours
            except FileNotFoundError:  # closed meanwhile
                continue
    return owned


def largest_share(counts: Counter[int] | Counter[str]) -> float:
    return max(counts.values()) / max(1, counts.total())


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Making


def scenario(folder: Path, *faults: str) -> dict[str, str]:
    """Write a scenario; return the environment that names it."""
    file = folder / "scenario.toml"
    file.write_text("".join(f"[[fault]]\n{fault}\n" for fault in faults))
    return {"WARMFLEET_STUB_SCENARIO": str(file)}


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a key and a certificate for 127.0.0.1, signed by itself."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    )
    extra = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*command.split(), *extra], check=True, capture_output=True)
    return key, certificate
