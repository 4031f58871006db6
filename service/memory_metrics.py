# SPDX-License-Identifier: Apache-2.0
"""Memory as metrics: of the host, the devices and the workers, and the budget made of it. Worker.

Nothing here asks a GPU's driver: a scrape shows what the boots of workers have read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.cgroups import read_host
from service.families import counter, gauge, slot_name
from service.rooms import gpu_rooms

if TYPE_CHECKING:
    from service.families import Found, Samples
    from service.fleet import Fleet
    from service.ledger import Ledger
    from service.slots import SlotRecord


def memory_families(fleet: Fleet, records: list[SlotRecord]) -> Found:
    """Yield every family whose samples are bytes, and the numbers that follow from them."""
    yield from _sizes(records)
    yield from _rooms(fleet)
    yield from _budget(fleet.ledger)


def _sizes(records: list[SlotRecord]) -> Found:
    host: Samples = {}
    device: Samples = {}
    for r in records:
        for kind, size in r.memory_bytes.items():
            where, short = (
                (device, kind.removeprefix("device_")) if kind.startswith("device_") else (host, kind)
            )
            where[slot_name(r), short] = size
    text = "Host memory of the worker: rss, pss (shared pages divided by their users), uss (private pages)."
    yield gauge("worker_memory_bytes", text, host, ["slot", "kind"])
    text = "Device memory of the worker as its allocator knows it: allocated, reserved, peak."
    yield gauge("worker_device_memory_bytes", text, device, ["slot", "kind"])


def _rooms(fleet: Fleet) -> Found:
    host = read_host()
    kinds = {"limit": host.total_bytes, "used": host.used_bytes, "shm": host.shm_bytes}
    sizes: Samples = {(kind,): size for kind, size in kinds.items() if size}
    text = "Host memory: the smallest limit, what is used of it, and tmpfs and shared memory in that."
    yield gauge("host_memory_bytes", text, sizes, ["kind"])
    entry = fleet.ledger.read()
    rooms = entry.devices if entry else gpu_rooms(fleet)
    known: Samples = {}
    for room in rooms:
        known |= {(room.name, "total"): room.total, (room.name, "others"): room.others}
    text = "Device memory as the last boot of a worker there read it: total, others (not of this service)."
    yield gauge("device_memory_bytes", text, known, ["device", "kind"])


def _budget(ledger: Ledger) -> Found:
    numbers, entry = ledger.numbers, ledger.read()
    yield gauge("planned_workers", "Workers that shall run; 0 until one was measured.", {(): numbers.planned})
    steps: Samples = {("more",): numbers.grown, ("fewer",): numbers.shrunk}
    text = "Workers that were added and taken away, by a person or to follow the budget."
    yield counter("resizes", text, steps, ["direction"])
    yield counter(
        "oom_kills", "Workers killed by the kernel for want of memory.", {(): numbers.oom_kills}, []
    )
    plan = entry.plan() if entry else None
    found = plan.constraints if plan else ()
    held = plan.held(numbers.planned) if plan else {}
    fits: Samples = {(line.name,): line.fits for line in found}
    yield gauge("workers_fit", "Workers that a constraint allows.", fits, ["constraint"])
    memories = [line for line in found if line.kind in ("device", "host")]
    budgets: Samples = {(line.name,): line.budget for line in memories}
    yield gauge("budget_bytes", "Memory that workers may take, by device, and host.", budgets, ["constraint"])
    room: Samples = {(line.name,): line.budget - line.price * held[line.name] for line in memories}
    yield gauge("budget_headroom_bytes", "What the planned workers leave of it.", room, ["constraint"])
    parts: Samples = {(part,): size for part, size in entry.cost.parts.items()} if entry else {}
    yield gauge("worker_cost_bytes", "What one worker takes, as measured, by part.", parts, ["part"])
