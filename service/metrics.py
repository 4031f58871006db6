# SPDX-License-Identifier: Apache-2.0
"""Counters and histograms of requests, in files shared by slot. Arbiter (the folder) and worker.

Files carry the slot, not the pid: their number is bounded for ever, and a counter goes on where
the slot's last worker left it. All metrics have labels, so importing this module opens no file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import struct
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram, values
from prometheus_client.multiprocess import MultiProcessCollector

from service.engine import Observer
from service.errors import SettingsError
from service.learned import ShapeHistogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from service.engine import Engine, Times
    from service.scoreboard import Scoreboard
    from service.tickets import Entry

    Passed = Callable[[Sequence[Entry], float, float, Exception | None], None]

REHEARSAL = "warmfleet.rehearsal"
"""Key in the state of the request that nobody sent and nobody counts; its value is the engine to ask."""
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
PREFIX = "warmfleet-metrics-"
UNREADABLE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError, struct.error)
"""What reading a damaged counter file, or one that is just being replaced, can raise."""
_identity = {"name": "arbiter"}

# Bound before the first metric exists; prometheus_client would take the pid.
values.ValueClass = values.MultiProcessValue(process_identifier=lambda: _identity["name"])

# From 0.5 ms (one short text on a GPU) to a minute (a full queue on a CPU), about 2 to 2.5 apart.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH_TEXTS_BUCKETS = tuple(2**n for n in range(10))
BATCH_TOKENS_BUCKETS = tuple(2**n for n in range(3, 17))

REQUESTS = Counter(
    "warmfleet_requests",
    "Requests answered on the API listener.",
    ["slot", "endpoint", "status"],
    registry=None,
)
STAGE_SECONDS = Histogram(
    "warmfleet_request_stage_seconds",
    "Seconds of a request by stage: tokenize, queue, forward, encode, and total.",
    ["slot", "stage"],
    buckets=SECONDS,
    registry=None,
)
TEXTS = Counter("warmfleet_texts", "Texts embedded.", ["slot"], registry=None)
TOKENS = Counter("warmfleet_tokens", "Tokens embedded, padding not counted.", ["slot"], registry=None)
REJECTED = Counter("warmfleet_rejected_texts", "Texts refused with 429.", ["slot"], registry=None)
DROPPED = Counter(
    "warmfleet_dropped_texts", "Texts admitted and given up, by reason.", ["slot", "reason"], registry=None
)
BATCH_TEXTS = Histogram(
    "warmfleet_batch_texts", "Texts of a pass.", ["slot"], buckets=BATCH_TEXTS_BUCKETS, registry=None
)
BATCH_TOKENS = Histogram(
    "warmfleet_batch_tokens",
    "Tokens computed in a pass, padding included.",
    ["slot"],
    buckets=BATCH_TOKENS_BUCKETS,
    registry=None,
)
BATCH_SECONDS = Histogram(
    "warmfleet_batch_seconds",
    "Seconds of a pass, from its launch until its rows are there.",
    ["slot"],
    buckets=SECONDS,
    registry=None,
)
PADDING = Counter("warmfleet_padding_tokens", "Tokens computed that no text has.", ["slot"], registry=None)
OUT_OF_MEMORY = Counter(
    "warmfleet_out_of_memory", "Passes that the device had no room for.", ["slot"], registry=None
)
SPANS_EXPORTED = Counter(
    "warmfleet_spans_exported", "Spans that the collector took.", ["slot"], registry=None
)
SPANS_DROPPED = Counter(
    "warmfleet_spans_dropped",
    "Spans that the collector will never get, by reason.",
    ["slot", "reason"],
    registry=None,
)
DROP_REASONS = ("abandoned", "deadline")
SPAN_DROP_REASONS = ("full", "failed", "stopped")
"""The queue was full, the collector did not take them, the worker ended first."""


def open_directory(configured: str | None) -> Path:
    """Arbiter, before the fork: make or wipe the counters' folder, and remove what dead services left.

    A service holds a lock on its folder; one that can be locked belongs to nobody any more.

    Raises:
        SettingsError: nothing can be written there, or another service does.
    """
    try:
        folder = _take(Path(configured)) if configured else _make()
    except OSError as error:
        msg = (
            f"cannot keep metrics in {configured or 'the temporary folder'}: {error.strerror}; "
            "set WARMFLEET_METRICS_DIR to a folder that can be written to"
        )
        raise SettingsError(msg) from None
    os.environ[DIRECTORY] = str(folder)
    return folder


def _take(folder: Path) -> Path:
    """Lock the configured folder, and remove the counters of its last user; nothing else in it is ours."""
    folder.mkdir(parents=True, exist_ok=True)
    if _lock(folder) is None:
        msg = f"metrics_dir {folder} is used by another service; give each one a folder of its own"
        raise SettingsError(msg)
    with tempfile.TemporaryFile(dir=folder):  # it can be written to
        pass
    for file in counter_files(folder):
        file.unlink(missing_ok=True)
    return folder


def _make() -> Path:
    """Remove what dead services left, then make and lock a folder; others may do the same."""
    shared = Path("/dev/shm")  # noqa: S108 - memory, not a predictable file: mkdtemp names it
    parent = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    for stale in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):  # another start was faster
            _remove_if_unused(stale)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):  # taken for stale before the lock
            if _lock(folder) is not None:
                return folder


def _lock(folder: Path) -> int | None:
    """Lock a folder for as long as this process, or a fork of it, lives; None if it is held or gone."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():  # whoever held the lock before may have removed what it is on
            return fd
    os.close(fd)
    return None


def _remove_if_unused(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return
    fd = _lock(folder)
    if fd is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def counter_files(folder: Path, name: str = "*") -> list[Path]:
    """Return the counter files of one worker, or of all, and no other file that may lie there."""
    return [file for kind in ("counter", "histogram") for file in folder.glob(f"{kind}_{name}.db")]


def adopt(slot: int) -> None:
    """Worker, right after the fork: write to the slot's files from now on, and drop those that are damaged.

    A worker killed while its file grew leaves one that nobody can read; every scrape would fail.
    """
    _identity["name"] = f"s{slot}"
    for file in counter_files(Path(os.environ[DIRECTORY]), f"s{slot}"):
        if not _is_sound(file):
            file.unlink(missing_ok=True)


def _is_sound(file: Path) -> bool:
    """Say whether prometheus_client can read a counter file and go on in it."""
    try:
        with file.open("rb") as stream:
            used = int.from_bytes(stream.read(4), sys.byteorder, signed=True)
        MultiProcessCollector.merge([str(file)])
    except UNREADABLE:
        return False
    return used == 0 or 8 <= used <= file.stat().st_size  # noqa: PLR2004 - entries follow eight bytes of header


class MetricsObserver(Observer):
    """The engine's events as counters and histograms of one slot, and the budget on its scoreboard row.

    Each event is written through to the slot's files: a scrape by any worker sees it at once, and a
    worker that is killed takes none along. Children are bound once, so an event costs microseconds.
    """

    def __init__(
        self,
        slot: int,
        board: Scoreboard,
        shapes: ShapeHistogram | None = None,
        passed: Passed | None = None,
    ) -> None:
        """Show the slot's series from the start; what warm-up found room for is the declared budget."""
        name, self._passed = f"s{slot}", passed
        self._name, self._row = name, board.rows[slot]
        self._row.declared_batch_tokens = self._row.max_batch_tokens
        self._texts, self._tokens = TEXTS.labels(name), TOKENS.labels(name)
        self._rejected = REJECTED.labels(name)
        self._stages = {
            stage: STAGE_SECONDS.labels(name, stage) for stage in ("tokenize", "queue", "forward", "encode")
        }
        self._batch_texts, self._batch_tokens = BATCH_TEXTS.labels(name), BATCH_TOKENS.labels(name)
        self._batch_seconds, self._padding = BATCH_SECONDS.labels(name), PADDING.labels(name)
        self._out_of_memory = OUT_OF_MEMORY.labels(name)
        self._shapes = ShapeHistogram() if shapes is None else shapes
        for reason in DROP_REASONS:
            DROPPED.labels(name, reason)

    # Event loop

    def embedded(self, texts: int, tokens: int, times: Times) -> None:
        """Count the texts and observe each stage."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        for stage, seconds in vars(times).items():
            self._stages[stage].observe(seconds)

    def encoded(self, seconds: float) -> None:
        """Observe the last stage."""
        self._stages["encode"].observe(seconds)

    def rejected(self, texts: int) -> None:
        """Count the refused texts."""
        self._rejected.inc(texts)

    def dropped(self, reason: str, texts: int) -> None:
        """Count the texts given up."""
        DROPPED.labels(self._name, reason).inc(texts)

    # Model thread

    def batch(self, texts: int, tokens: int, computed: int, seconds: float) -> None:
        """Observe the pass; its padding, if there was any, is what was computed beyond its tokens."""
        self._shapes.add(texts, computed, seconds)
        self._batch_texts.observe(texts)
        self._batch_tokens.observe(computed)
        self._batch_seconds.observe(seconds)
        if computed > tokens:
            self._padding.inc(computed - tokens)

    def passed(
        self, entries: Sequence[Entry], began: float, ended: float, error: Exception | None = None
    ) -> None:
        """Tell whoever traces requests."""
        if self._passed is not None:
            self._passed(entries, began, ended, error)

    def out_of_memory(self, budget: int) -> None:
        """Count it, and publish the budget."""
        self._out_of_memory.inc()
        self._row.max_batch_tokens = budget

    def recovered(self, budget: int) -> None:
        """Publish the budget."""
        self._row.max_batch_tokens = budget


class SpanCounts:
    """What becomes of spans, as counters of one slot."""

    def __init__(self, slot: int) -> None:
        """Show the slot's series from the start."""
        self._name = f"s{slot}"
        self._exported = SPANS_EXPORTED.labels(self._name)
        for reason in SPAN_DROP_REASONS:
            SPANS_DROPPED.labels(self._name, reason)

    def exported(self, spans: int) -> None:
        """Count what the collector took."""
        self._exported.inc(spans)

    def dropped(self, reason: str, spans: int) -> None:
        """Count what it will never get."""
        SPANS_DROPPED.labels(self._name, reason).inc(spans)


@contextlib.contextmanager
def uncounted(engine: Engine) -> Iterator[None]:
    """Count nothing of what an engine does meanwhile: a rehearsal is no traffic."""
    observer = engine.observer
    engine.observer = Observer()
    try:
        yield
    finally:
        engine.observer = observer
