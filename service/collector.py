# SPDX-License-Identifier: Apache-2.0
"""What Prometheus scrapes: the counter files, and the scoreboard as it is at that moment. Worker.

States, times and sizes are read off the scoreboard at each scrape, so nothing of them can be stale.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from service import __version__
from service.lifecycle import State
from service.memory import listen_queue_length
from service.metrics import DIRECTORY, UNREADABLE, counter_files
from service.scoreboard import now
from service.te_metrics import te_families

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from service.fleet import Fleet
    from service.ledger import Ledger
    from service.slots import SlotRecord

    Found = Iterator[GaugeMetricFamily | CounterMetricFamily]
    Labels = tuple[str, ...]
    Samples = dict[Labels, float]


def exposition(fleet: Fleet, listeners: Mapping[str, list[socket.socket]]) -> bytes:
    """Return all metrics as text; reads some files, so call it off the event loop."""
    families = [*counted(), *BoardCollector(fleet, listeners).collect()]
    if fleet.settings.te_metrics:
        families += te_families(families)
    registry = CollectorRegistry()
    registry.register(Families(families))
    return generate_latest(registry)


class Families(Collector):
    """Metric families that were collected already."""

    def __init__(self, families: list[Metric]) -> None:
        """Keep them."""
        self._families = families

    def collect(self) -> list[Metric]:
        """Return them."""
        return self._families


def counted() -> list[Metric]:
    """Return what every slot's workers counted, less any file that a killed worker left damaged."""
    files = [str(file) for file in counter_files(Path(os.environ[DIRECTORY]))]
    try:
        return list(MultiProcessCollector.merge(files))
    except UNREADABLE:
        return list(MultiProcessCollector.merge([file for file in files if _is_readable(file)]))


def _is_readable(file: str) -> bool:
    try:
        MultiProcessCollector.merge([file])
    except UNREADABLE:
        return False
    return True


class BoardCollector:
    """What the scoreboard knows, as metric families; nothing of it can be stale."""

    def __init__(self, fleet: Fleet, listeners: Mapping[str, list[socket.socket]]) -> None:
        """Read from this fleet, and measure the accept queues of these listeners."""
        self._fleet = fleet
        self._listeners = listeners

    def collect(self) -> Found:
        """Yield every family."""
        records = self._fleet.board.records()
        yield from self._service(records)
        yield from _lives(records)
        yield from _boots(records)
        yield from _batches(records)
        yield from _sizes(records)
        yield from _budget(self._fleet.ledger)

    def _service(self, records: list[SlotRecord]) -> Found:
        header = self._fleet.board.header
        readiness = self._fleet.readiness(records)
        yield _gauge("ready", "1 if /ready answers 200.", {(): int(readiness.ready)})
        yield _gauge("ready_workers", "Workers that are ready.", {(): readiness.ready_workers})
        yield _gauge("target_workers", "Workers that are wanted.", {(): header.target})
        yield _gauge("import_seconds", "Seconds of the arbiter's imports.", {(): header.import_seconds})
        lengths: Samples = {}
        for name, socks in self._listeners.items():
            known = [length for length in map(listen_queue_length, socks) if length >= 0]
            if known:  # the kernel does not say it of unix sockets
                lengths[name,] = sum(known)
        yield _gauge(
            "listen_queue_length", "Connections the kernel holds, not yet accepted.", lengths, ["listener"]
        )
        versions = (__version__, metadata.version("gunicorn"), platform.python_version())
        yield _gauge("build_info", "Versions; always 1.", {versions: 1}, ["version", "gunicorn", "python"])


def _lives(records: list[SlotRecord]) -> Found:
    states: Samples = {(_name(r), state.label): int(r.state is state) for r in records for state in State}
    yield _gauge("worker_state", "1 for the state a slot is in.", states, ["slot", "state"])
    time = now()
    since: Samples = {(_name(r),): time - r.since for r in records}
    yield _gauge("worker_state_age_seconds", "Seconds the slot has been in its state.", since, ["slot"])
    ages: Samples = {(_name(r),): time - r.beat for r in records if r.live}
    yield _gauge("worker_heartbeat_age_seconds", "Seconds since the worker's last beat.", ages, ["slot"])
    load: Samples = {(_name(r),): r.load for r in records}
    yield _gauge(
        "worker_load", "Texts in work, one a request at least, and connections not yet read.", load, ["slot"]
    )
    in_flight: Samples = {(_name(r),): r.in_flight for r in records}
    yield _gauge("requests_in_flight", "API requests in work, a tenth of a second old.", in_flight, ["slot"])
    info: Samples = {(_name(r), r.device): 1 for r in records if r.live}
    yield _gauge("worker_device_info", "The device a slot is pinned to; always 1.", info, ["slot", "device"])


def _boots(records: list[SlotRecord]) -> Found:
    boots: Samples = {(_name(r),): r.generation for r in records}
    yield _counter("worker_boots", "Workers started in a slot.", boots, ["slot"])
    restarts: Samples = {(_name(r),): max(0, r.generation - 1) for r in records}
    yield _counter("worker_restarts", "Workers started in a slot after its first.", restarts, ["slot"])
    failures: Samples = {
        (_name(r), reason): count for r in records for reason, count in r.failures_by_reason.items()
    }
    yield _counter("worker_failures", "Workers that ended unasked, by reason.", failures, ["slot", "reason"])
    streak: Samples = {(_name(r),): r.failures for r in records}
    yield _gauge("worker_failures_in_a_row", "Failures since the slot last did well.", streak, ["slot"])
    stages: Samples = {(_name(r), stage): s for r in records for stage, s in r.stage_seconds.items()}
    yield _gauge("worker_boot_stage_seconds", "Seconds of the last boot by stage.", stages, ["slot", "stage"])
    warm: Samples = {(_name(r),): r.stage_seconds["warmup"] for r in records if "warmup" in r.stage_seconds}
    yield _gauge("worker_warmup_seconds", "Seconds of the last warm-up.", warm, ["slot"])
    passes: Samples = {}
    for r in (record for record in records if record.live):
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


def _batches(records: list[SlotRecord]) -> Found:
    warm = [record for record in records if record.live and record.max_batch_tokens]
    budget: Samples = {(_name(r),): r.max_batch_tokens for r in warm}
    yield _gauge("worker_max_batch_tokens", "Tokens that a pass may have now.", budget, ["slot"])
    declared: Samples = {(_name(r),): r.declared_batch_tokens for r in warm}
    text = "Tokens that a pass may have when no pass ran out of memory."
    yield _gauge("worker_declared_batch_tokens", text, declared, ["slot"])
    texts: Samples = {(_name(r),): r.queued_texts for r in records}
    yield _gauge("queue_texts", "Texts that wait for a pass, a tenth of a second old.", texts, ["slot"])
    tokens: Samples = {(_name(r),): r.queued_tokens for r in records}
    yield _gauge("queue_tokens", "Tokens that wait for a pass, a tenth of a second old.", tokens, ["slot"])


def _sizes(records: list[SlotRecord]) -> Found:
    host: Samples = {}
    device: Samples = {}
    for r in records:
        for kind, size in r.memory_bytes.items():
            where, short = (
                (device, kind.removeprefix("device_")) if kind.startswith("device_") else (host, kind)
            )
            where[_name(r), short] = size
    text = "Host memory of the worker: rss, pss (shared pages divided by their users), uss (private pages)."
    yield _gauge("worker_memory_bytes", text, host, ["slot", "kind"])
    text = "Device memory of the worker as its allocator knows it: allocated, reserved, peak."
    yield _gauge("worker_device_memory_bytes", text, device, ["slot", "kind"])


def _budget(ledger: Ledger) -> Found:
    numbers, entry = ledger.numbers, ledger.read()
    yield _gauge(
        "planned_workers", "Workers that shall run; 0 until one was measured.", {(): numbers.planned}
    )
    steps: Samples = {("more",): numbers.grown, ("fewer",): numbers.shrunk}
    text = "Workers that were added and taken away, by a person or to follow the budget."
    yield _counter("resizes", text, steps, ["direction"])
    yield _counter(
        "oom_kills", "Workers killed by the kernel for want of memory.", {(): numbers.oom_kills}, []
    )
    plan = entry.plan() if entry else None
    found = plan.constraints if plan else ()
    held = plan.held(numbers.planned) if plan else {}
    fits: Samples = {(line.name,): line.fits for line in found}
    yield _gauge("workers_fit", "Workers that a constraint allows.", fits, ["constraint"])
    memories = [line for line in found if line.kind in ("device", "host")]
    budgets: Samples = {(line.name,): line.budget for line in memories}
    yield _gauge(
        "budget_bytes", "Memory that workers may take, by device, and host.", budgets, ["constraint"]
    )
    room: Samples = {(line.name,): line.budget - line.price * held[line.name] for line in memories}
    yield _gauge("budget_headroom_bytes", "What the planned workers leave of it.", room, ["constraint"])
    parts: Samples = {(part,): size for part, size in entry.cost.parts.items()} if entry else {}
    yield _gauge("worker_cost_bytes", "What one worker takes, as measured, by part.", parts, ["part"])


def _name(record: SlotRecord) -> str:
    return f"s{record.slot}"


def _gauge(name: str, text: str, samples: Samples, labels: list[str] | None = None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"warmfleet_{name}", text, labels=labels or [])
    for values_, value in samples.items():
        family.add_metric(list(values_), value)
    return family


def _counter(name: str, text: str, samples: Samples, labels: list[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"warmfleet_{name}", text, labels=labels)
    for values_, value in samples.items():
        family.add_metric(list(values_), value)
    return family
