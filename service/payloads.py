# SPDX-License-Identifier: Apache-2.0
"""What `/health`, `/ready` and `/workers` tell, off the scoreboard. Worker."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from service import __version__
from service.budget import render
from service.lifecycle import Stage, State
from service.manifest import eta
from service.scoreboard import now

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.fleet import Fleet
    from service.slots import SlotRecord

STAGES = {State.LOADING: Stage.LOAD, State.WARMING: Stage.WARMUP}
SKIPPED = "warm-up is skipped (WARMFLEET_SKIP_WARMUP): the first requests will be slow; development only"


def health_payload() -> dict[str, Any]:
    """Alive: this event loop answers."""
    return {"status": "ok"}


def budget_payload(fleet: Fleet) -> dict[str, Any]:
    """Return the sum behind the number of workers: as data, and in words."""
    numbers, entry = fleet.ledger.numbers, fleet.ledger.read()
    payload = {
        "policy": fleet.settings.budget_policy,
        "wanted": fleet.settings.workers,
        "planned": numbers.planned,
        "oom_kills": numbers.oom_kills,
    }
    if entry is None:
        return payload | {"text": ["no worker has been measured yet"]}
    found = entry.plan()
    return payload | found.as_json() | {"sum": asdict(entry), "text": render(found).splitlines()}


def ready_payload(fleet: Fleet) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the body of `/ready`, true within one heartbeat."""
    was_ready = bool(fleet.board.header.was_ready)
    records = fleet.board.records()
    readiness = fleet.readiness(records, was_ready=was_ready)
    warm = [r.stage_seconds.get("warmup", 0.0) for r in records if r.state is State.READY]
    payload = {
        "status": readiness.status,
        "model": fleet.settings.model_id,
        "warmup_seconds": round(max(warm), 4) if warm else None,
        "detail": readiness.detail,
        "ready_workers": readiness.ready_workers,
        "wanted_workers": readiness.wanted,
        "target_workers": fleet.board.header.target,
        "planned_workers": fleet.ledger.numbers.planned,
        "workers": [
            slot_payload(record) | {"eta_seconds": eta_of(fleet, record, records)}
            for record in records
            if shown(fleet, record)
        ],
    }
    if fleet.settings.skip_warmup:
        payload["warning"] = SKIPPED
    return 200 if readiness.ready else 503, payload


def eta_of(fleet: Fleet, record: SlotRecord, others: Sequence[SlotRecord] = ()) -> float | None:
    """Return the seconds until a worker is ready; None if nobody knows.

    By what the last boot of the service took, or else the slowest of the others that are ready.
    """
    last, stage = fleet.recall.last, STAGES.get(record.state)
    if stage is None:
        return None
    ready = [other.stage_seconds for other in others if other.state is State.READY]
    slowest = max(ready, key=lambda seconds: seconds.get(Stage.WARMUP, 0.0), default={})
    left = eta(last.stage_seconds if last else slowest, stage, now() - record.since)
    return None if left is None else round(left, 1)


def workers_payload(fleet: Fleet) -> dict[str, Any]:
    """Return everything the scoreboard knows."""
    header = fleet.board.header
    records = [record for record in fleet.board.records() if shown(fleet, record)]
    return {
        "version": __version__,
        "model": fleet.settings.model_id,
        "arbiter_pid": os.getppid(),
        "devices": fleet.devices,
        "target": header.target,
        "roll_epoch": header.roll_epoch,
        "stopping": bool(header.stopping),
        "uptime_seconds": round(now() - header.started, 3),
        "import_seconds": round(header.import_seconds, 3),
        "budget": budget_payload(fleet),
        "workers": [slot_payload(record) | detail_payload(record) for record in records],
    }


def shown(fleet: Fleet, record: SlotRecord) -> bool:
    """Whether a slot is held, or ought to be."""
    return record.live or record.slot < fleet.board.header.target


def slot_payload(record: SlotRecord) -> dict[str, Any]:
    """Return what a probe's reader wants of a slot."""
    time = now()
    return {
        "slot": record.slot,
        "pid": record.pid or None,
        "state": record.state.label,
        "seconds_in_state": round(time - record.since, 3),
        "heartbeat_age_seconds": round(time - record.beat, 3),
        "device": record.device,
        "generation": record.generation,
        "progress": round(record.progress, 3),
        "doing": record.doing or None,
        "warmup_seconds": record.stage_seconds.get("warmup"),
        "memory_bytes": record.memory_bytes,
        "failures": record.failures,
        "retry_in_seconds": round(record.backoff_until - time, 3) if record.state is State.BACKOFF else None,
        "last_error": f"{record.error_state}: {record.error}" if record.error else None,
    }


def detail_payload(record: SlotRecord) -> dict[str, Any]:
    """Return the rest of what is known of a slot."""
    return {
        "epoch": record.epoch,
        "load": record.load,
        "requests_in_flight": record.in_flight,
        "max_batch_tokens": record.max_batch_tokens or None,
        "stage_seconds": record.stage_seconds,
        "warmup_shapes": [asdict(shape) for shape in record.shapes],
        "failures_by_reason": {reason: count for reason, count in record.failures_by_reason.items() if count},
    }
