# SPDX-License-Identifier: Apache-2.0
"""A real Gunicorn on free loopback ports: start it, look at it, hurt it, and check what must always hold.

Example:
    with Service(workers=2, stub_scenario="slow_load") as service:
        service.wait_ready()
        with service.load(clients=4) as load:
            service.kill(0, signal.SIGKILL)
            ...
        assert_invariants(service)
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest

from service.cgroups import cgroup_folders, counts, number, read_text
from service.settings import Settings, variables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

ROOT = Path(__file__).parents[2]
SCENARIOS = Path(__file__).parent / "scenarios"

DEADLINE_S = 20.0
"""Within which every request must be answered or refused: no request waits for ever."""
PATIENCE_S = 45.0
"""For conditions on a noisy machine; a test fails long after it would have passed."""
PROBE_S = 2.0
"""For one answer of the ops listener."""
POLL_S = 0.02
STALE_S = 3.0
"""A worker that was silent for longer does not count as ready."""
DONE = ("Z", "X", None)
"""States of a process that runs no more: zombie, dead, gone."""

# Never of the surroundings: our settings under every name, and what would make Gunicorn another one.
FOREIGN = {variable for name in Settings.model_fields for variable in variables(name)} | {
    "GUNICORN_CMD_ARGS",
    "GUNICORN_FD",
    "GUNICORN_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "PROMETHEUS_MULTIPROC_DIR",
    "WEB_CONCURRENCY",
}
SAMPLE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
MONOTONIC = re.compile(r"_(total|count|sum|bucket)$")


@dataclass(frozen=True)
class Process:
    """A line of /proc."""

    pid: int
    state: str
    parent: int
    group: int


def process(pid: int) -> Process | None:
    """Read one process, or None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, fields[0], int(fields[1]), int(fields[2]))


def processes() -> list[Process]:
    """Read every process of the machine."""
    found = [process(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [one for one in found if one is not None]


def runs(pid: int) -> bool:
    """Say whether a process still runs; a zombie does not."""
    found = process(pid)
    return found is not None and found.state not in DONE


def until(condition: Callable[[], Any], timeout: float = PATIENCE_S, what: str = "") -> Any:
    """Return the first true value of the condition; a refused connection counts as false."""
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(httpx.TransportError):
            if value := condition():
                return value
        assert time.monotonic() < end, f"not within {timeout:g} s: {what or condition}"
        time.sleep(POLL_S)


def free_port() -> int:
    """Return a port below the range that outgoing connections take theirs from."""
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def new_client(*, keepalive: bool = False, timeout: float = DEADLINE_S) -> httpx.Client:
    """Return a client that asks no proxy; without `keepalive` each request is a connection of its own."""
    return httpx.Client(
        limits=httpx.Limits(max_keepalive_connections=None if keepalive else 0),
        timeout=timeout,
        trust_env=False,
        verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # empty: loading the bundle takes longer than a boot
    )


@dataclass(frozen=True)
class Outcome:
    """What became of one request: a status, or the error in words."""

    sent: float
    seconds: float
    status: int | None
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether vectors came back."""
        return self.status == 200

    @property
    def refused(self) -> bool:
        """Whether there was no listener (any more), so that nothing was taken on and lost."""
        return self.error.startswith("ConnectError") and "refused" in self.error


@dataclass(frozen=True)
class Metrics:
    """One scrape: name and labels to value."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text format, as far as the service uses it."""
        matches = [SAMPLE.match(line) for line in text.splitlines() if line and not line.startswith("#")]
        assert all(matches), text
        found = [match.group("name", "labels", "value") for match in matches if match]
        return cls(
            {(name, frozenset(LABEL.findall(labels or ""))): float(value) for name, labels, value in found}
        )

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of all samples that carry these labels."""
        wanted = set(labels.items())
        return sum(value for (n, found), value in self.samples.items() if n == name and wanted <= found)

    @property
    def counters(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """The samples that may only grow."""
        return {key: value for key, value in self.samples.items() if MONOTONIC.search(key[0])}


class Load:
    """Clients that send one text after another until told to stop, or for `seconds`, with short pauses."""

    def __init__(
        self, url: str, *, clients: int, keepalive: bool, pause: float = 0.005, seconds: float = 90.0
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._url, self._keepalive, self._pause = url, keepalive, pause
        self._end = time.monotonic() + seconds
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        with new_client(keepalive=self._keepalive) as client:
            while not self._stop.wait(self._pause) and time.monotonic() < self._end:
                self.outcomes.append(send(client, self._url, ["hello world"]))

    def wait_for(self, count: int, timeout: float = PATIENCE_S) -> None:
        """Let that many further requests succeed."""
        seen = len(self.outcomes)
        until(lambda: sum(o.ok for o in self.outcomes[seen:]) >= count, timeout, f"{count} further answers")

    def stop(self) -> None:
        """Send no more, and let every request end."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def lost(self) -> list[Outcome]:
        """What was sent and not answered with vectors."""
        return [outcome for outcome in self.outcomes if not outcome.ok]


def send(client: httpx.Client, url: str, texts: Sequence[str]) -> Outcome:
    """Embed texts, and keep what became of it."""
    sent = time.monotonic()
    try:
        status, error = client.post(f"{url}/embed", json=list(texts)).status_code, ""
    except httpx.TransportError as failure:
        status, error = None, f"{type(failure).__name__}: {failure}"
    return Outcome(sent, time.monotonic() - sent, status, error)


class MemoryGroup:
    """A cgroup with a memory limit, of version 1 or 2, for a service to run in. Use it in a `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def make(cls, limit_bytes: int) -> Self:
        """Make one below our own cgroup or one around it, whichever lets us; skip the test if none does."""
        problem = "no memory controller is to be seen"
        for parent in cgroup_folders(controller="memory"):
            version_1 = (parent / "memory.limit_in_bytes").exists()
            if not version_1 and "memory" not in read_text(parent / "cgroup.subtree_control").split():
                continue
            made = cls(parent / f"warmfleet-test-{os.getpid()}-{random.randrange(1 << 32):08x}")
            try:
                made.folder.mkdir()
                made.limit(limit_bytes)
                subprocess.run([*made.entering, "true"], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                problem = f"{parent}: {error}"
                made.remove()
            else:
                return made
        pytest.skip(f"this machine lets us set no memory limit: {problem}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def entering(self) -> tuple[str, ...]:
        """The beginning of a command line that is to run in this group, with all its children."""
        return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"))

    def limit(self, limit_bytes: int) -> None:
        """Set the limit; no swap beside it, where there is any."""
        sizes = {"memory.limit_in_bytes": limit_bytes, "memory.memsw.limit_in_bytes": limit_bytes}
        if not (self.folder / "memory.limit_in_bytes").exists():
            sizes = {"memory.max": limit_bytes, "memory.swap.max": 0}
        first, second = sizes
        (self.folder / first).write_text(str(sizes[first]), encoding="ascii")
        if (self.folder / second).exists():
            (self.folder / second).write_text(str(sizes[second]), encoding="ascii")

    @property
    def used_bytes(self) -> int:
        """What the group has now, file pages included."""
        return number(self.folder / "memory.usage_in_bytes") or number(self.folder / "memory.current")

    @property
    def peak_bytes(self) -> int:
        """The most that it ever had."""
        return number(self.folder / "memory.max_usage_in_bytes") or number(self.folder / "memory.peak")

    @property
    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        version_2 = counts(self.folder / "memory.events")
        return (version_2 or counts(self.folder / "memory.oom_control")).get("oom_kill", 0)

    def remove(self) -> None:
        """Remove it, once the kernel has let go of the last process."""

        def gone() -> bool:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            return not self.folder.exists()

        until(gone, 10, f"{self.folder} is empty")


class Service:
    """`python -m gunicorn -c gunicorn_conf.py` in a process group of its own. Settings are keyword arguments.

    Each has an empty cache of its own, unless told `cache_dir`: no boot knows what another has measured.

    Attributes:
        arbiter: pid of Gunicorn's main process.
        code: exit code, once it has ended.
        outcomes: every request that went to the API.
        scrapes: every reading of /metrics, in order.
    """

    def __init__(
        self,
        *,
        environ: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        group: MemoryGroup | None = None,
        **settings: Any,
    ) -> None:
        self.bind, self.ops_bind = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.prefix = tuple(prefix)
        self._entering = group.entering if group else ()
        self.code: int | None = None
        self.outcomes: list[Outcome] = []
        self.scrapes: list[Metrics] = []
        if isinstance(name := settings.get("stub_scenario"), str):
            settings["stub_scenario"] = SCENARIOS / f"{name}.toml"
        defaults = {"backend": "stub", "device": "cpu", "bind": self.bind, "ops_bind": self.ops_bind}
        chosen = defaults | {"drain_grace": 0.1} | settings  # most tests drain idle workers
        ours = {f"WARMFLEET_{name.upper()}": str(value) for name, value in chosen.items()}
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in FOREIGN and not name.startswith("WARMFLEET_")
        }
        self.environ = kept | ours | (environ or {})

    def __enter__(self) -> Self:
        self._log = tempfile.NamedTemporaryFile(prefix="warmfleet-test-", suffix=".log")
        self._cache = tempfile.TemporaryDirectory(prefix="warmfleet-test-", ignore_cleanup_errors=True)
        self.environ.setdefault("WARMFLEET_CACHE_DIR", self._cache.name)
        self._client = new_client()
        self._popen = subprocess.Popen(
            [*self._entering, *self.prefix, sys.executable, "-m", "gunicorn", "-c", "gunicorn_conf.py"],
            cwd=ROOT,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.group = self._popen.pid
        self.arbiter = self._only_child() if self.prefix else self._popen.pid
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.stop()
                self.assert_nothing_runs()
        except BaseException:
            kind = AssertionError
            raise
        finally:
            self._end_group()
            self._client.close()
            if kind is not None:
                print(f"--- log of the service (exit code {self.code}) ---\n{self.log}")
            self._log.close()
            self._cache.cleanup()

    # Looking

    @property
    def log(self) -> str:
        """All that was logged so far."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    @property
    def url(self) -> str:
        """Base of the API."""
        return f"http://{self.bind}"

    def get(self, path: str, *, ops: bool = True) -> httpx.Response:
        """Ask the ops listener, or the main one, once; the service must be up."""
        return self._client.get(f"http://{self.ops_bind if ops else self.bind}{path}")

    def ask(self, path: str) -> httpx.Response:
        """Ask the ops listener; again, as a probe would, if the worker that took it hangs or dies."""

        def answer() -> httpx.Response | None:
            try:
                return self._client.get(f"http://{self.ops_bind}{path}", timeout=PROBE_S)
            except httpx.ConnectError:
                raise
            except httpx.TransportError:
                return None

        end = time.monotonic() + DEADLINE_S
        while (reply := answer()) is None:
            assert time.monotonic() < end, f"{path} is not answered"
        return reply

    def ready(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of /ready."""
        reply = self.ask("/ready")
        return reply.status_code, reply.json()

    def workers(self) -> dict[int, dict[str, Any]]:
        """Return the rows of /workers by slot."""
        rows = self.ask("/workers").json()["workers"]
        by_slot = {row["slot"]: row for row in rows}
        assert len(by_slot) == len(rows), f"a slot is listed twice: {rows}"
        return by_slot

    def worker(self, slot: int) -> dict[str, Any]:
        """Return the row of one slot; empty if it was never used."""
        return self.workers().get(slot, {})

    def states(self) -> dict[int, str]:
        """Return the state of each slot."""
        return {slot: row["state"] for slot, row in self.workers().items()}

    def pids(self) -> dict[int, int]:
        """Return the process of each slot that has one."""
        return {slot: row["pid"] for slot, row in self.workers().items() if row["pid"]}

    def budget(self) -> dict[str, Any]:
        """Return the sum behind the number of workers, as /workers has it."""
        found: dict[str, Any] = self.ask("/workers").json()["budget"]
        return found

    def metrics(self) -> Metrics:
        """Scrape."""
        self.scrapes.append(Metrics.parse(self.ask("/metrics").text))
        return self.scrapes[-1]

    def embed(self, texts: Sequence[str] = ("hello world",)) -> Outcome:
        """Send one request on a connection of its own."""
        self.outcomes.append(send(self._client, self.url, texts))
        return self.outcomes[-1]

    def send(self, texts: Sequence[str]) -> Callable[[], Outcome]:
        """Send one request and do not wait; the function returned does."""
        answered: list[Outcome] = []
        thread = threading.Thread(target=lambda: answered.append(send(self._client, self.url, texts)))
        thread.start()

        def outcome() -> Outcome:
            thread.join()
            self.outcomes.append(answered[0])
            return answered[0]

        return outcome

    @contextlib.contextmanager
    def load(self, *, clients: int = 4, keepalive: bool = False, **options: float) -> Iterator[Load]:
        """Send requests all the while, from a moment when they succeed."""
        load = Load(self.url, clients=clients, keepalive=keepalive, **options)
        try:
            load.wait_for(2 * clients)
            yield load
        finally:
            load.stop()
            self.outcomes += load.outcomes

    # Waiting

    def wait(self, condition: Callable[[], Any], timeout: float = PATIENCE_S, what: str = "") -> Any:
        """Wait for a condition while the service runs; return its first true value."""

        def checked() -> Any:
            ended = self._popen.poll() is not None
            try:
                value = condition()
            except httpx.TransportError:
                value = None
            assert value or not ended, f"ended with {self._popen.returncode} before: {what}"
            return value

        return until(checked, timeout, what)

    def wait_ready(self, timeout: float = PATIENCE_S) -> dict[str, Any]:
        """Wait until /ready answers 200; return its body."""

        def body() -> dict[str, Any] | None:
            status, answer = self.ready()
            return answer if status == 200 else None

        found: dict[str, Any] = self.wait(body, timeout, "/ready answers 200")
        return found

    def wait_state(self, slot: int, state: str, generation: int = 1) -> dict[str, Any]:
        """Wait until a slot is in a state, in this generation or a later one; return its row."""

        def row() -> dict[str, Any] | None:
            found = self.worker(slot)
            return found if found and found["state"] == state and found["generation"] >= generation else None

        found: dict[str, Any] = self.wait(row, what=f"slot {slot}, generation {generation} is {state}")
        return found

    def wait_log(self, text: str, timeout: float = PATIENCE_S) -> None:
        """Wait until the log has a text, whether or not the service still runs."""
        until(lambda: text in self.log, timeout, f"log: {text}")

    def wait_end(self, timeout: float = PATIENCE_S) -> int:
        """Wait until the arbiter has ended by itself; return its exit code."""
        self.code = self._popen.wait(timeout)
        return self.code

    # Hurting

    def kill(self, slot: int, signum: int) -> int:
        """Send a signal to the worker of a slot; return its pid."""
        pid: int = self.workers()[slot]["pid"]
        os.kill(pid, signum)
        return pid

    def signal(self, signum: int) -> None:
        """Send a signal to the arbiter."""
        os.kill(self.arbiter, signum)

    def stop(self, signum: int = SIGTERM) -> int:
        """Ask the service to stop, unless it has ended already; return the exit code."""
        if self._popen.poll() is None:
            self.signal(signum)
        return self.wait_end()

    # Afterwards

    def survivors(self) -> list[Process]:
        """Return what still runs of the process group."""
        return [found for found in processes() if found.group == self.group and found.state not in DONE]

    def assert_nothing_runs(self, timeout: float = 5.0) -> None:
        """Invariant: nothing runs after the arbiter is gone."""
        until(lambda: not self.survivors(), timeout, "the process group is empty")

    def _only_child(self) -> int:
        children = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children")
        return int(until(lambda: children.read_text(encoding="utf-8").split(), 10, "the prefix forks")[0])

    def _end_group(self) -> None:
        """End all that is left; the group is ours, and its number cannot be reused while members live."""
        if self._popen.poll() is None or self.survivors():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, SIGKILL)
        self.code = self._popen.wait()


def assert_invariants(service: Service) -> None:
    """Check what holds after every fault, while the service runs or once it has ended.

    No request waits for ever · /ready is true within one heartbeat · no slot leaks, no two live
    workers share a slot · counters never go backwards · nothing runs after the arbiter is gone ·
    no exception went by unhandled.
    """
    late = [o for o in service.outcomes if "Timeout" in o.error or o.seconds > DEADLINE_S]
    assert not late, f"requests waited for ever: {late[:5]}"
    assert "Traceback (most recent call last)" not in service.log
    if service.code is None:
        until(lambda: _table_is_true(service), what="table, processes and /ready agree")
        service.metrics()
    else:
        service.assert_nothing_runs()
    for before, after in zip(service.scrapes, service.scrapes[1:], strict=False):
        for key, value in before.counters.items():
            assert after.counters.get(key, -1) >= value, f"went backwards: {key}, from {value}"


def _table_is_true(service: Service) -> bool:
    """Compare two readings of the table, between which nothing moved, with /ready and with /proc."""
    before = service.workers()
    status, ready = service.ready()
    alive = [found for found in processes() if found.state not in DONE]
    children = {found.pid for found in alive if found.parent == service.arbiter}
    after = service.workers()
    if _places(before) != _places(after):
        return False
    live = [row for row in after.values() if row["state"] != "empty"]
    pids = [row["pid"] for row in live]
    shared = [pid for pid, count in Counter(pids).items() if count > 1]
    assert not shared, f"slots share processes {shared}: {live}"
    if set(pids) != children or _places({row["slot"]: row for row in ready["workers"]}) != _places(after):
        return False  # a fork, a death or a move in between; that it stays so is the failure
    warm = sum(row["state"] == "ready" and row["heartbeat_age_seconds"] <= STALE_S for row in live)
    truth = ready["status"] != "draining" and warm >= ready["wanted_workers"]
    return ready["ready_workers"] == warm and (status == 200) == truth == (ready["status"] == "ready")


def _places(rows: dict[int, dict[str, Any]]) -> dict[int, tuple[Any, ...]]:
    return {slot: (row["pid"], row["state"], row["generation"]) for slot, row in rows.items()}
