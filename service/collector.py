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
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from service import __version__
from service.families import counter, gauge, slot_name
from service.lifecycle import State
from service.memory import queue_length
from service.memory_metrics import memory_families
from service.metrics import DIRECTORY, UNREADABLE, counter_files
from service.scoreboard import now
from service.te_metrics import te_families

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from prometheus_client.metrics_core import Metric

    from service.families import Found, Samples
    from service.fleet import Fleet
    from service.slots import SlotRecord


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
        yield from self._targets(records)
        yield from _lives(records)
        yield from _boots(records)
        yield from self._last_boot()
        yield from _batches(records)
        yield from memory_families(self._fleet, records)

    def _service(self, records: list[SlotRecord]) -> Found:
        header = self._fleet.board.header
        readiness = self._fleet.readiness(records)
        yield gauge("ready", "1 if /ready answers 200.", {(): int(readiness.ready)})
        yield gauge("ready_workers", "Workers that are ready.", {(): readiness.ready_workers})
        yield gauge("target_workers", "Workers that are wanted.", {(): header.target})
        yield gauge("import_seconds", "Seconds of the arbiter's imports.", {(): header.import_seconds})
        time = now() - header.started
        yield gauge("uptime_seconds", "Seconds since the arbiter began to start workers.", {(): time})
        queues = {name: queue_length(socks) for name, socks in self._listeners.items()}
        lengths: Samples = {(name,): length for name, length in queues.items() if length is not None}
        yield gauge(
            "listen_queue_length", "Connections the kernel holds, not yet accepted.", lengths, ["listener"]
        )
        versions = (__version__, metadata.version("gunicorn"), platform.python_version())
        yield gauge("build_info", "Versions; always 1.", {versions: 1}, ["version", "gunicorn", "python"])

    def _targets(self, records: list[SlotRecord]) -> Found:
        fleet, text = self._fleet, "Ready workers at which /ready first says yes."
        yield gauge("quorum_workers", text, {(): fleet.wanted(records, was_ready=False)})
        text = "Ready workers below which /ready says no again."
        yield gauge("floor_workers", text, {(): fleet.wanted(records, was_ready=True)})
        text = "Seconds that one worker's boot may take, by the deadlines of its stages."
        yield gauge("boot_deadline_seconds", text, {(): fleet.boot_deadline_s})

    def _last_boot(self) -> Found:
        last = self._fleet.recall.last
        stages: Samples = {(stage,): s for stage, s in last.stage_seconds.items()} if last else {}
        text = "Seconds of the boot before this one by stage, of its slowest worker."
        yield gauge("last_boot_stage_seconds", text, stages, ["stage"])


def _lives(records: list[SlotRecord]) -> Found:
    states: Samples = {(slot_name(r), state.label): int(r.state is state) for r in records for state in State}
    yield gauge("worker_state", "1 for the state a slot is in.", states, ["slot", "state"])
    time = now()
    since: Samples = {(slot_name(r),): time - r.since for r in records}
    yield gauge("worker_state_age_seconds", "Seconds the slot has been in its state.", since, ["slot"])
    ages: Samples = {(slot_name(r),): time - r.beat for r in records if r.live}
    yield gauge("worker_heartbeat_age_seconds", "Seconds since the worker's last beat.", ages, ["slot"])
    load: Samples = {(slot_name(r),): r.load for r in records}
    yield gauge(
        "worker_load", "Texts in work, one a request at least, and connections not yet read.", load, ["slot"]
    )
    in_flight: Samples = {(slot_name(r),): r.in_flight for r in records}
    yield gauge("requests_in_flight", "API requests in work, a tenth of a second old.", in_flight, ["slot"])
    info: Samples = {(slot_name(r), r.device): 1 for r in records if r.live}
    yield gauge("worker_device_info", "The device a slot is pinned to; always 1.", info, ["slot", "device"])


def _boots(records: list[SlotRecord]) -> Found:
    boots: Samples = {(slot_name(r),): r.generation for r in records}
    yield counter("worker_boots", "Workers started in a slot.", boots, ["slot"])
    restarts: Samples = {(slot_name(r),): max(0, r.generation - 1) for r in records}
    yield counter("worker_restarts", "Workers started in a slot after its first.", restarts, ["slot"])
    failures: Samples = {
        (slot_name(r), reason): count for r in records for reason, count in r.failures_by_reason.items()
    }
    yield counter("worker_failures", "Workers that ended unasked, by reason.", failures, ["slot", "reason"])
    streak: Samples = {(slot_name(r),): r.failures for r in records}
    yield gauge("worker_failures_in_a_row", "Failures since the slot last did well.", streak, ["slot"])
    stages: Samples = {(slot_name(r), stage): s for r in records for stage, s in r.stage_seconds.items()}
    yield gauge("worker_boot_stage_seconds", "Seconds of the last boot by stage.", stages, ["slot", "stage"])
    warm: Samples = {
        (slot_name(r),): r.stage_seconds["warmup"] for r in records if "warmup" in r.stage_seconds
    }
    yield gauge("worker_warmup_seconds", "Seconds of the last warm-up.", warm, ["slot"])
    passes: Samples = {}
    for r in (record for record in records if record.live):
        for shape in r.shapes:
            name = f"{shape.texts}x{shape.tokens}"
            passes[slot_name(r), name, "first"] = shape.first_s
            passes[slot_name(r), name, "steady"] = shape.steady_s
    yield gauge(
        "worker_warmup_pass_seconds",
        "Seconds of the first and of the steady warm-up pass by shape, texts x tokens.",
        passes,
        ["slot", "shape", "pass"],
    )


def _batches(records: list[SlotRecord]) -> Found:
    warm = [record for record in records if record.live and record.max_batch_tokens]
    budget: Samples = {(slot_name(r),): r.max_batch_tokens for r in warm}
    yield gauge("worker_max_batch_tokens", "Tokens that a pass may have now.", budget, ["slot"])
    declared: Samples = {(slot_name(r),): r.declared_batch_tokens for r in warm}
    text = "Tokens that a pass may have when no pass ran out of memory."
    yield gauge("worker_declared_batch_tokens", text, declared, ["slot"])
    texts: Samples = {(slot_name(r),): r.queued_texts for r in records}
    yield gauge("queue_texts", "Texts that wait for a pass, a tenth of a second old.", texts, ["slot"])
    tokens: Samples = {(slot_name(r),): r.queued_tokens for r in records}
    yield gauge("queue_tokens", "Tokens that wait for a pass, a tenth of a second old.", tokens, ["slot"])
