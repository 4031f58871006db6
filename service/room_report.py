# SPDX-License-Identifier: Apache-2.0
"""The memories that workers share: who holds what, and what one more would take. Pure; worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from service.budget import Constraint, Room
    from service.ledger import Sum
    from service.slots import SlotRecord

SHARED = "the arbiter and what workers share"
PRICED = {"host": ("private", "busy", "slack"), "device": ("context", "weights", "batch", "slack")}
"""Terms of a constraint that make a worker's price."""


def rooms(entry: Sum, records: Sequence[SlotRecord], planned: int) -> list[dict[str, Any]]:
    """Return the host, then each device.

    Args:
        entry: the budget's sum.
        records: the workers; those that have not measured themselves yet are left out.
        planned: workers that shall run, for which the budget keeps room whether or not they use it.
    """
    found = entry.plan()
    held = found.held(planned)
    lines = {line.name: line for line in found.constraints if line.kind in PRICED}
    live = [record for record in records if record.live]
    return [
        _room(
            room,
            lines[room.name],
            [part for part in _parts(entry, room, live) if part["bytes"]],
            more=lines[room.name].fits > held[room.name],
            binding=found.binding == room.name,
        )
        for room in (entry.host, *entry.devices)
    ]


def _room(
    room: Room, line: Constraint, workers: list[dict[str, Any]], *, more: bool, binding: bool
) -> dict[str, Any]:
    limit = int(room.total * room.utilization)
    if room.limit is not None:
        limit = min(limit, room.others + room.limit)
    used = room.others + room.shared + sum(worker["bytes"] for worker in workers)
    return {
        "name": room.name,
        "kind": line.kind,
        "source": room.source or "the driver",
        "total_bytes": room.total,
        "utilization": room.utilization,
        "limit_bytes": limit,
        "others_bytes": room.others,
        "shared_bytes": room.shared,
        "shared_name": SHARED,
        "workers": workers,
        "next_worker": {"bytes": line.price, "parts": price_parts(line), "fits": more},
        "headroom_bytes": max(0, limit - used),
        "fits": line.fits,
        "binding": binding,
    }


def price_parts(line: Constraint) -> dict[str, int]:
    """Return what a worker is given, by part; what kills by the kernel have added is one of them."""
    parts = {name: int(line.terms[name]) for name in PRICED[line.kind] if line.terms[name]}
    raised = line.price - sum(parts.values())
    return parts | ({"raised": raised} if line.terms.get("raised", 1.0) > 1 else {})


def _parts(entry: Sum, room: Room, live: Sequence[SlotRecord]) -> Iterable[dict[str, Any]]:
    """Yield what each worker has of a memory, as it has measured it."""
    for record in live:
        memory = record.memory_bytes
        if room is entry.host:
            parts = {"private": memory.get("uss", 0)}
        elif record.device == room.name:
            reserved = memory.get("device_reserved", 0)
            weights = min(entry.cost.weights, reserved)
            parts = {
                "context": memory.get("device_context", 0),
                "weights": weights,
                "batch": reserved - weights,
            }
        else:
            continue
        yield {"slot": record.slot, "bytes": sum(parts.values()), "parts": parts}
