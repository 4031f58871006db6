# SPDX-License-Identifier: Apache-2.0
"""From one worker's measured memory to the number that shall run. Worker; after an OOM kill: arbiter.

Every worker that has warmed up measures itself while it still holds its load permit, so nobody else loads on
its device. The dearest of them is what a worker costs; who raises that, or is the first, does the sum again.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from service.budget import MIB, Plan, Verdict, judge, render, size
from service.errors import BudgetError
from service.logging import get
from service.rooms import context_of, gpu_room, gpu_rooms, gpu_rooms_seen_by, host_room, sum_of
from service.settings import MOST_WORKERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from service.backends.base import Backend, DeviceMemory
    from service.budget import Room, WorkerCost
    from service.fleet import Fleet
    from service.ledger import Sum
    from service.manifest import Manifest
    from service.rooms import Before

LOG = get()
NOTICE = 1.02
"""A worker that costs more than this times what is known makes a new sum; less is noise."""
NOTICE_BYTES = 64 * MIB
"""Of a device, that others have taken or given back since; less is noise."""
POLL_S = 0.02


def foresee(fleet: Fleet, last: Manifest) -> int:
    """Arbiter, before the first fork: return the workers to start, by what the last boot measured.

    What that refuses, or knows nothing of, is measured anew, as if there were no manifest.
    """
    first = fleet.settings.first_workers
    rooms = gpu_rooms(fleet)
    if fleet.cuda and len(rooms) < len(fleet.devices):
        return first
    entry = _sum(fleet, replace(last.cost, raised=1.0), host_room(fleet, os.getpid()), rooms)
    found = entry.plan()
    if judge(found, _wanted(fleet, found), fleet.settings.budget_policy).refused:
        return first
    fleet.ledger.write(entry)
    fleet.ledger.numbers.foreseen = 1
    LOG.info(
        "budget, by the boot of %s: %d workers fit, %s binds", last.written_at, found.fits, found.binding
    )
    return _follow(fleet, found).workers


def settle(fleet: Fleet, slot: int, cost: WorkerCost, device: DeviceMemory | None, others: int) -> Plan:
    """Enter what a worker costs, and what others use of its device; return the sum that follows.

    The first worker of a boot says what one costs, a dearer one corrects it.

    Raises:
        BudgetError: the wanted workers do not fit, and `budget_policy` refuses that.
    """
    with _alone(fleet):
        known, numbers = fleet.ledger.read(), fleet.ledger.numbers
        fresh = known is None or bool(numbers.foreseen)
        dearest = cost if known is None or fresh else _dearest(cost, known.cost)
        rooms = gpu_rooms_seen_by(fleet, slot, device, others, known) if device else []
        if known is None or fresh or _dearer(cost, known.cost) or _moved(known.devices, rooms):
            known = _sum(fleet, dearest, host_room(fleet, os.getppid()), rooms)
            fleet.ledger.write(known)
            known = fleet.ledger.read() or known  # dearer by what OOM kills have taught
            if numbers.foreseen:  # the last boot's word holds until this one has its own
                numbers.planned = 0 if fleet.settings.workers == "auto" else fleet.settings.workers
                numbers.foreseen = 0
            for line in render(known.plan()).splitlines():
                LOG.info("budget: %s", line)
        found = known.plan()
        verdict = _follow(fleet, found)
    if verdict.refused:
        raise BudgetError(verdict.text)
    return found


def _wanted(fleet: Fleet, found: Plan) -> int:
    """Return the workers that are wanted before anything is planned."""
    if fleet.settings.workers == "auto":
        return min(max(1, found.fits), MOST_WORKERS)
    return int(fleet.board.header.target)


def _follow(fleet: Fleet, found: Plan) -> Verdict:
    """Let the number of workers follow from a sum; the permit is held, or the arbiter calls.

    What serves already is never refused: it shrinks.
    """
    header, numbers, settings = fleet.board.header, fleet.ledger.numbers, fleet.settings
    policy = "clamp" if settings.budget_policy == "refuse" and header.ever_ready else settings.budget_policy
    verdict = judge(found, numbers.planned or _wanted(fleet, found), policy)
    numbers.fits = max(1, found.fits)
    if verdict.text and not verdict.refused and verdict.workers != numbers.planned:
        LOG.warning(verdict.text)
    numbers.planned = verdict.workers
    return verdict


def learn_from_oom(fleet: Fleet, kills: int) -> None:
    """Arbiter: workers were killed for want of memory; from now on each counts for more on the host."""
    fleet.ledger.numbers.oom_kills += kills
    known = fleet.ledger.read()
    if known is not None:
        _follow(fleet, known.plan())


def fence_first(fleet: Fleet, slot: int, backend: Backend, before: Before) -> None:
    """Before the first batch: allow what the budget leaves, so that too much shows at boot."""
    device = backend.memory()
    if device is None:
        return
    known = fleet.ledger.read()
    share = share_of(fleet, slot, known.plan()) if known else None
    if share is None:
        room = gpu_room(fleet.settings, "", device.total_bytes, before.others)
        share = room.budget - context_of(device, before)
    backend.fence(max(0, share))


def share_of(fleet: Fleet, slot: int, found: Plan) -> int | None:
    """Return the bytes that a worker may allocate on its device: none eats its neighbour's; None: all."""
    line = next((one for one in found.constraints if one.name == fleet.board.record(slot).device), None)
    if line is None or line.kind != "device" or not line.fits:
        return None
    return int(line.budget / line.fits - line.terms["context"])


def outgrown(fleet: Fleet, slot: int) -> str:
    """Say that a worker has grown beyond its part of the host's budget, while the fleet is beyond all of it.

    A worker that takes more than was measured, where there is room, hurts nobody. Empty: all is well.
    """
    entry, planned = fleet.ledger.read(), int(fleet.ledger.numbers.planned)
    if entry is None or not planned or fleet.settings.budget_policy == "warn":
        return ""
    rows = {row.slot: row.memory_bytes.get("uss", 0) for row in fleet.board.records() if row.live}
    mine, share, budget = rows.get(slot, 0), entry.host.budget // planned, entry.host.budget
    if mine <= share or sum(rows.values()) <= budget:
        return ""
    return (
        f"it has grown to {size(mine)} of private memory, its part is {size(share)}, "
        f"and all workers together have more than the {size(budget)} there are for them"
    )


def _sum(fleet: Fleet, cost: WorkerCost, host: Room, devices: Sequence[Room]) -> Sum:
    return sum_of(fleet.settings, cost, host, devices, cores=fleet.cpus.cores, threads=fleet.threads)


def _moved(before: Sequence[Room], now: Sequence[Room]) -> bool:
    """Whether others use noticeably more or less of a device than was known."""
    return any(abs(one.others - two.others) > NOTICE_BYTES for one, two in zip(before, now, strict=True))


def _dearer(cost: WorkerCost, known: WorkerCost) -> bool:
    return cost.on_host > NOTICE * known.on_host or cost.on_device > NOTICE * known.on_device


def _dearest(cost: WorkerCost, known: WorkerCost) -> WorkerCost:
    """Return the larger of each part."""
    parts = ("context", "weights", "batch", "host")
    return replace(known, **{part: max(getattr(cost, part), getattr(known, part)) for part in parts})


@contextmanager
def _alone(fleet: Fleet) -> Iterator[None]:
    """Hold the plan permit: two workers that are warm at once must not both write."""
    while (permit := fleet.plan_permit.try_acquire()) is None:
        time.sleep(POLL_S)
    try:
        yield
    finally:
        fleet.plan_permit.release(permit)
