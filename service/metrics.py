# SPDX-License-Identifier: Apache-2.0
"""Every metric: counters in files shared by slot, states read off the scoreboard at each scrape. Worker.

Files carry the slot, not the pid: their number is bounded for ever, and a counter goes on where
the slot's last worker left it. All metrics have labels, so importing this module opens no file.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from service import __version__
from service.engine import Observer
from service.lifecycle import State
from service.memory import listen_queue_length
from service.scoreboard import now

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping

    from prometheus_client.registry import Collector

    from service.engine import Times
    from service.fleet import Fleet
    from service.slots import SlotRecord

    Families = Iterator[GaugeMetricFamily | CounterMetricFamily]

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
PREFIX = "warmfleet-metrics-"
_identity = {"name": "arbiter"}

# Bound before the first metric exists; prometheus_client would take the pid.
values.ValueClass = values.MultiProcessValue(process_identifier=lambda: _identity["name"])

# From 0.5 ms (one short text on a GPU) to a minute (a full queue on a CPU), about 2 to 2.5 apart.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

REQUESTS = Counter(
    "warmfleet_requests", "Requests answered on the API listener.", ["slot", "endpoint", "status"], registry=None
)
STAGE_SECONDS = Histogram(
    "warmfleet_request_stage_seconds",
    "Seconds of a request by stage: tokenize, queue, forward, and total (all of it, encoding included).",
    ["slot", "stage"],
    buckets=SECONDS,
    registry=None,
)
TEXTS = Counter("warmfleet_texts", "Texts embedded.", ["slot"], registry=None)
TOKENS = Counter("warmfleet_tokens", "Tokens embedded, padding not counted.", ["slot"], registry=None)
REJECTED = Counter("warmfleet_rejected_texts", "Texts refused with 429.", ["slot"], registry=None)


def open_directory(configured: str | None) -> Path:
    """Arbiter, before the fork: make or wipe the folder of the counter files and remove what dead services left.

    A service holds a lock on its folder; one that can be locked belongs to nobody any more.
    """
    if configured:
        folder = Path(configured)
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*.db"):
            file.unlink(missing_ok=True)
    else:
        shared = Path("/dev/shm")  # noqa: S108 - memory, not a predictable file: mkdtemp names it
        parent = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
        for stale in parent.glob(PREFIX + "*"):
            if stale.stat().st_uid == os.getuid():
                _remove_if_unused(stale)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        _lock(folder)
    os.environ[DIRECTORY] = str(folder)
    return folder


def _lock(folder: Path) -> int | None:
    """Lock a folder for as long as this process, or a fork of it, lives; None if somebody holds it."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _remove_if_unused(folder: Path) -> None:
    fd = _lock(folder)
    if fd is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def adopt(slot: int) -> None:
    """Worker, right after the fork: write to the slot's files from now on, and drop those that are damaged.

    A worker killed while its file grew leaves one that nobody can read; every scrape would fail.
    """
    _identity["name"] = f"s{slot}"
    for file in Path(os.environ[DIRECTORY]).glob(f"*_s{slot}.db"):
        try:
            MmapedDict(str(file), read_mode=True)
        except (RuntimeError, ValueError, OSError):
            file.unlink(missing_ok=True)


class MetricsObserver(Observer):
    """The engine's events as counters and histograms of one slot."""

    def __init__(self, slot: int) -> None:
        """Bind the slot's children once; the hot path only adds."""
        name = f"s{slot}"
        self._texts, self._tokens = TEXTS.labels(name), TOKENS.labels(name)
        self._rejected = REJECTED.labels(name)
        self._stages = {stage: STAGE_SECONDS.labels(name, stage) for stage in ("tokenize", "queue", "forward")}

    def embedded(self, texts: int, tokens: int, times: Times) -> None:
        """Count the texts and observe each stage."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        for stage, child in self._stages.items():
            child.observe(getattr(times, stage))

    def rejected(self, texts: int) -> None:
        """Count the refused texts."""
        self._rejected.inc(texts)


def exposition(fleet: Fleet, listeners: Mapping[str, list[socket.socket]]) -> bytes:
    """Return all metrics as text; reads some files, so call it off the event loop."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    board: Collector = BoardCollector(fleet, listeners)
    registry.register(board)
    return generate_latest(registry)


class BoardCollector:
    """What the scoreboard knows, as metric families; nothing of it can be stale."""

    def __init__(self, fleet: Fleet, listeners: Mapping[str, list[socket.socket]]) -> None:
        """Read from this fleet, and measure the accept queues of these listeners."""
        self._fleet = fleet
        self._listeners = listeners

    def collect(self) -> Families:
        """Yield every family."""
        records = self._fleet.board.records()
        yield from self._service(records)
        yield from _lives(records)
        yield from _boots(records)
        yield from _sizes(records)

    def _service(self, records: list[SlotRecord]) -> Families:
        header = self._fleet.board.header
        readiness = self._fleet.readiness(records)
        yield _gauge("ready", "1 if /ready answers 200.", {(): int(readiness.ready)})
        yield _gauge("ready_workers", "Workers that are ready.", {(): readiness.ready_workers})
        yield _gauge("target_workers", "Workers that are wanted.", {(): header.target})
        yield _gauge("import_seconds", "Seconds of the arbiter's imports.", {(): header.import_seconds})
        lengths = {
            (name,): sum(max(0, listen_queue_length(sock)) for sock in socks)
            for name, socks in self._listeners.items()
        }
        yield _gauge("listen_queue_length", "Connections the kernel holds, not yet accepted.", lengths, ["listener"])
        versions = (__version__, metadata.version("gunicorn"), platform.python_version())
        yield _gauge("build_info", "Versions; always 1.", {versions: 1}, ["version", "gunicorn", "python"])


def _lives(records: list[SlotRecord]) -> Families:
    states = {(_name(r), state.label): int(r.state is state) for r in records for state in State}
    yield _gauge("worker_state", "1 for the state a slot is in.", states, ["slot", "state"])
    time = now()
    since = {(_name(r),): time - r.since for r in records}
    yield _gauge("worker_state_age_seconds", "Seconds the slot has been in its state.", since, ["slot"])
    ages = {(_name(r),): time - r.beat for r in records if r.live}
    yield _gauge("worker_heartbeat_age_seconds", "Seconds since the worker's last beat.", ages, ["slot"])
    load = {(_name(r),): r.load for r in records}
    yield _gauge("worker_load", "Requests, texts and unread connections in work.", load, ["slot"])
    info = {(_name(r), r.device): 1 for r in records if r.live}
    yield _gauge("worker_device_info", "The device a slot is pinned to; always 1.", info, ["slot", "device"])


def _boots(records: list[SlotRecord]) -> Families:
    boots = {(_name(r),): r.generation for r in records}
    yield _counter("worker_boots", "Workers started in a slot.", boots, ["slot"])
    restarts = {(_name(r),): r.generation - 1 for r in records}
    yield _counter("worker_restarts", "Workers started in a slot after its first.", restarts, ["slot"])
    failures = {(_name(r), reason): count for r in records for reason, count in r.failures_by_reason.items()}
    yield _counter("worker_failures", "Workers that ended unasked, by reason.", failures, ["slot", "reason"])
    streak = {(_name(r),): r.failures for r in records}
    yield _gauge("worker_failures_in_a_row", "Failures since the slot last did well.", streak, ["slot"])
    stages = {(_name(r), stage): s for r in records for stage, s in r.stage_seconds.items()}
    yield _gauge("worker_boot_stage_seconds", "Seconds of the last boot by stage.", stages, ["slot", "stage"])
    warm = {(_name(r),): r.stage_seconds["warmup"] for r in records if "warmup" in r.stage_seconds}
    yield _gauge("worker_warmup_seconds", "Seconds of the last warm-up.", warm, ["slot"])
    passes = {}
    for r in records:
        for shape in r.shapes:
            name = f"{shape.texts}x{shape.tokens}"
            passes[_name(r), name, "first"] = shape.first_s
            passes[_name(r), name, "steady"] = shape.steady_s
    yield _gauge(
        "worker_warmup_pass_seconds",
        "Seconds of the first and of the steady warm-up pass by shape, texts x tokens.",
        passes,
        ["slot", "shape", "pass"],
    )
    budget = {(_name(r),): r.max_batch_tokens for r in records if r.live and r.max_batch_tokens}
    yield _gauge("worker_max_batch_tokens", "Tokens of one forward pass that had room.", budget, ["slot"])


def _sizes(records: list[SlotRecord]) -> Families:
    host, device = {}, {}
    for r in records:
        for kind, size in r.memory_bytes.items():
            where, short = (device, kind.removeprefix("device_")) if kind.startswith("device_") else (host, kind)
            where[_name(r), short] = size
    text = "Host memory of the worker: rss, pss (shared pages divided by their users), uss (private pages)."
    yield _gauge("worker_memory_bytes", text, host, ["slot", "kind"])
    text = "Device memory of the worker as its allocator knows it: allocated, reserved, peak."
    yield _gauge("worker_device_memory_bytes", text, device, ["slot", "kind"])


def _name(record: SlotRecord) -> str:
    return f"s{record.slot}"


def _gauge(
    name: str, text: str, samples: Mapping[tuple[str, ...], float], labels: list[str] | None = None
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"warmfleet_{name}", text, labels=labels or [])
    for values_, value in samples.items():
        family.add_metric(list(values_), value)
    return family


def _counter(
    name: str, text: str, samples: Mapping[tuple[str, ...], float], labels: list[str]
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"warmfleet_{name}", text, labels=labels)
    for values_, value in samples.items():
        family.add_metric(list(values_), value)
    return family
