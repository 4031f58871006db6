# SPDX-License-Identifier: Apache-2.0
"""The status document: all that is known of the fleet, for the page, the terminal and programs. Worker.

docs/status-document.md explains every field. It reads files and shared memory, so it is made off the event
loop; nothing of the environment, of keys or of texts goes in.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import orjson

from service import __version__
from service.budget import render
from service.lifecycle import State
from service.memory import queue_length
from service.payloads import SKIPPED, eta_of, shown
from service.room_report import rooms
from service.scoreboard import MEMORY_KINDS, now
from service.verdict import shape_of, verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.fleet import Fleet
    from service.readiness import Readiness
    from service.slots import Boot, SlotRecord, WarmedShape
    from service.totals import Totals

SCHEMA = 1
PACKAGES = ("gunicorn", "uvicorn", "torch", "sentence-transformers")


@dataclass(frozen=True)
class Status:
    """Makes the document.

    Attributes:
        fleet: of which it tells.
        slot: of the worker that tells it.
        listeners: whose accept queues it measures, by name.
        totals: of the requests.
    """

    fleet: Fleet
    slot: int
    listeners: Mapping[str, list[socket.socket]]
    totals: Totals
    _histories: dict[int, tuple[bytes, dict[str, Any]]] = field(default_factory=dict)

    def dump(self) -> bytes:
        """Return the document as JSON on one line."""
        return orjson.dumps(self.document())

    def document(self) -> dict[str, Any]:
        """Return the document."""
        fleet = self.fleet
        was_ready = bool(fleet.board.header.was_ready)  # before: else it may tell of a later moment
        every = fleet.board.records()
        moment = now()  # after them: nothing that they tell of is still to come
        records = [record for record in every if shown(fleet, record)]
        etas = {record.slot: eta_of(fleet, record, every) for record in records}
        header = fleet.board.header
        began = header.started - header.import_seconds - header.preload_seconds
        return {
            "schema": SCHEMA,
            "time": round(time.time(), 3),
            "service": self._service(moment, began),
            "fleet": self._fleet(fleet.readiness(every, was_ready=was_ready), records, etas, moment),
            "slots": [
                slot_document(record, moment, eta=etas[record.slot]) | self._history(record.slot, began)
                for record in records
            ],
            "budget": budget_document(fleet, records),
            "totals": self.totals.read(),
            "listen_queue": {name: queue_length(socks) for name, socks in self.listeners.items()},
        }

    def _service(self, moment: float, began: float) -> dict[str, Any]:
        settings, header = self.fleet.settings, self.fleet.board.header
        return {
            "model": settings.model_id,
            "revision": settings.revision,
            "backend": settings.backend,
            "device": "cuda" if self.fleet.cuda else "cpu",
            "versions": versions(),
            "host": socket.gethostname(),
            "arbiter_pid": os.getppid(),
            "answered_by": self.slot,
            "uptime_seconds": round(moment - began, 3),
            "import_seconds": round(header.import_seconds, 3),
            "preload_seconds": round(header.preload_seconds, 3),
            "roll_epoch": header.roll_epoch,
            "stopping": bool(header.stopping),
            "api": settings.bind,
            "warning": SKIPPED if settings.skip_warmup else None,
        }

    def _fleet(
        self,
        readiness: Readiness,
        records: list[SlotRecord],
        etas: Mapping[int, float | None],
        moment: float,
    ) -> dict[str, Any]:
        fleet, header = self.fleet, self.fleet.board.header
        planned = fleet.ledger.numbers.planned
        return {
            "status": readiness.status,
            "ready": readiness.ready,
            "verdict": verdict(readiness, records, moment, target=header.target, planned=planned, etas=etas),
            "detail": readiness.detail,
            "ready_workers": readiness.ready_workers,
            "wanted_workers": readiness.wanted,
            "target_workers": header.target,
            "planned_workers": planned,
            "floor": fleet.settings.ready_floor,
            "was_ready": bool(header.was_ready),
        }

    def _history(self, slot: int, began: float) -> dict[str, Any]:
        """Return what a slot keeps of its workers; as it was last time, if none of its bytes has changed."""
        history = self.fleet.board.rows[slot].history
        seen = bytes(history)
        before, document = self._histories.get(slot, (b"", {}))
        if seen != before:
            document = {
                "boots": [boot_document(boot, began) for boot in history.boots()],
                "warmup": [shape_document(shape) for shape in history.warmup()],
            }
            self._histories[slot] = seen, document
        return document


@cache
def versions() -> dict[str, str]:
    """Return the versions of what runs here."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"warmfleet": __version__, "python": platform.python_version()} | found


def slot_document(record: SlotRecord, moment: float, *, eta: float | None) -> dict[str, Any]:
    """Return a slot and its present worker."""
    memory = record.memory_bytes
    waits = record.state is State.BACKOFF
    return {
        "slot": record.slot,
        "pid": record.pid or None,
        "state": record.state.label,
        "seconds_in_state": round(moment - record.since, 3),
        "heartbeat_age_seconds": round(max(0.0, moment - record.beat), 3),
        "device": record.device,
        "generation": record.generation,
        "epoch": record.epoch,
        "progress": round(record.progress, 3),
        "doing": shape_of(record.doing) or None,
        "eta_seconds": eta,
        "retry_in_seconds": round(max(0.0, record.backoff_until - moment), 3) if waits else None,
        "load": record.load,
        "requests_in_flight": record.in_flight,
        "queued_texts": record.queued_texts,
        "queued_tokens": record.queued_tokens,
        "max_batch_tokens": record.max_batch_tokens or None,
        "declared_batch_tokens": record.declared_batch_tokens or None,
        "warmup_seconds": _rounded(record.stage_seconds.get("warmup")),
        "stage_seconds": {stage: round(seconds, 4) for stage, seconds in record.stage_seconds.items()},
        "memory_bytes": {kind: memory.get(kind) for kind in MEMORY_KINDS},
        "failures": record.failures,
        "failures_by_reason": {why: count for why, count in record.failures_by_reason.items() if count},
        "last_error": {"state": record.error_state, "text": record.error} if record.error else None,
    }


def boot_document(boot: Boot, began: float) -> dict[str, Any]:
    """Return one boot."""

    def at(moment: float | None) -> float | None:
        return None if moment is None else round(moment - began, 3)

    return {
        "generation": boot.generation,
        "began": at(boot.began),
        "stages": [
            {"stage": stage.stage, "at": at(stage.at), "seconds": _rounded(stage.seconds)}
            for stage in boot.stages
        ],
        "ready_at": at(boot.ready_at),
        "ended_at": at(boot.ended_at),
        "outcome": boot.outcome,
    }


def shape_document(shape: WarmedShape) -> dict[str, Any]:
    """Return what the warm-up of a shape took."""
    return {
        "texts": shape.texts,
        "tokens": shape.tokens,
        "passes": [round(seconds, 6) for seconds in shape.passes],
        "first_s": _rounded(shape.passes[0] if shape.passes else None, 6),
        "steady_s": _rounded(shape.steady_s, 6),
        "rounds": shape.rounds,
        "converged": shape.converged,
    }


def budget_document(fleet: Fleet, records: list[SlotRecord]) -> dict[str, Any]:
    """Return the sum behind the number of workers, and the memories that it is about."""
    numbers, entry = fleet.ledger.numbers, fleet.ledger.read()
    found = entry.plan() if entry else None
    return {
        "policy": fleet.settings.budget_policy,
        "wanted": fleet.settings.workers,
        "planned": numbers.planned,
        "fits": found.fits if found else None,
        "binding": found.binding if found else None,
        "oom_kills": numbers.oom_kills,
        "text": render(found).splitlines() if found else ["no worker has been measured yet"],
        "rooms": rooms(entry, records, numbers.planned) if entry else [],
    }


def _rounded(seconds: float | None, digits: int = 4) -> float | None:
    return None if seconds is None else round(seconds, digits)
