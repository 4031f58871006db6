# SPDX-License-Identifier: Apache-2.0
"""Readings as the budget wants them: what a worker needs, and what room there is. Both processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from service.budget import Room, WorkerCost
from service.cgroups import read_host
from service.gpu_memory import read_devices
from service.ledger import Sum
from service.memory import peak_private_bytes, read_host_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.backends.base import Backend, DeviceMemory
    from service.fleet import Fleet
    from service.settings import Settings

READING_S = 5.0
"""For the driver to answer a worker that holds a load permit."""


@dataclass(frozen=True)
class Before:
    """A worker's device before it loaded; all 0 on a CPU.

    Attributes:
        used: bytes in use there, whoever uses them.
        others: those that are not the fleet's.
    """

    used: int = 0
    others: int = 0

    @classmethod
    def load(cls, fleet: Fleet, slot: int) -> Before:
        """Worker: look; the load permit is held, so its siblings on the device have measured themselves.

        Where the driver does not say, what was in use at the start of the fleet is still.
        """
        if not fleet.cuda:
            return cls()
        token, ours = fleet.board.record(slot).device, _neighbours(fleet, slot)
        reading = read_devices([token], READING_S).get(token)
        if reading is None:
            known = fleet.readings.get(token)
            others = known.used_bytes if known else 0
            return cls(others + ours, others)
        return cls(reading.used_bytes, max(0, reading.used_bytes - ours))


def cost_of(fleet: Fleet, slot: int, backend: Backend, before: Before, weights: int) -> WorkerCost:
    """Worker: return what it has come to need; the worst batch has run.

    Args:
        fleet: the fleet.
        slot: of this worker.
        backend: its model, warm.
        before: what `Before.load` found.
        weights: bytes allocated on the device before the first batch.
    """
    host = peak_private_bytes()
    device = backend.memory()
    if device is None:
        return WorkerCost(context=0, weights=0, batch=0, host=host)
    context = context_of(device, before)
    fleet.board.note_memory(slot, device_context=context)
    return WorkerCost(context, weights, max(0, device.peak_reserved_bytes - weights), host)


def context_of(device: DeviceMemory, before: Before) -> int:
    """Worker: return the bytes that the driver has taken for this process."""
    return max(0, device.total_bytes - device.free_bytes - before.used - device.reserved_bytes)


def sum_of(
    settings: Settings, cost: WorkerCost, host: Room, devices: Sequence[Room], *, cores: int, threads: int
) -> Sum:
    """Return the sum; cores and `max_workers` bind where the number of workers is the service's to choose."""
    auto = settings.workers == "auto"
    return Sum(
        cost=cost,
        host=host,
        devices=tuple(devices),
        cores=cores if auto and not devices else None,
        threads=threads,
        max_workers=settings.max_workers if auto else None,
    )


def host_room(fleet: Fleet, arbiter: int) -> Room:
    """Read the host: the arbiter's pages are shared by all; what is neither its nor a worker's is others'."""
    reading = read_host()
    parent = read_host_memory(arbiter)
    shared = parent.rss_bytes if parent else 0
    pids = [record.pid for record in fleet.board.records() if record.live and record.pid]
    mine = sum(found.uss_bytes for pid in pids if (found := read_host_memory(pid)))
    return Room(
        "host",
        reading.total_bytes,
        fleet.settings.host_memory_utilization,
        others=max(0, reading.used_bytes - shared - mine),
        shared=shared,
        source=reading.source,
    )


def gpu_rooms(fleet: Fleet) -> list[Room]:
    """Arbiter, before the first fork: return every GPU of which the driver says something."""
    return [
        gpu_room(fleet.settings, token, one.total_bytes, one.used_bytes)
        for token, one in fleet.readings.items()
    ]


def gpu_rooms_seen_by(
    fleet: Fleet, slot: int, device: DeviceMemory, others: int, known: Sum | None
) -> list[Room]:
    """Worker: return every GPU: its own as it is now, the rest as they were seen last.

    Where nobody has ever seen one, it is taken to be like this worker's, and free.
    """
    mine = fleet.board.record(slot).device
    seen = {room.name: room for room in (known.devices if known else gpu_rooms(fleet))}
    seen[mine] = gpu_room(fleet.settings, mine, device.total_bytes, others)
    like = gpu_room(fleet.settings, "", device.total_bytes, 0)
    return [seen.get(token) or replace(like, name=token) for token in fleet.devices]


def gpu_room(settings: Settings, token: str, total: int, others: int) -> Room:
    """Return a GPU as the settings allow it to be used."""
    limit = None if settings.gpu_memory_limit is None else int(settings.gpu_memory_limit)
    return Room(token, total, settings.gpu_memory_utilization, others=others, limit=limit)


def _neighbours(fleet: Fleet, slot: int) -> int:
    """Return the bytes that the other workers of a slot's device hold there, by their own measurement."""
    token = fleet.board.record(slot).device
    rows = [one for one in fleet.board.records() if one.live and one.slot != slot and one.device == token]
    kinds = ("device_reserved", "device_context")
    return sum(one.memory_bytes.get(kind, 0) for one in rows for kind in kinds)
