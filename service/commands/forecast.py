# SPDX-License-Identifier: Apache-2.0
"""From what a scout measured to what fits this machine or another one. Pure; command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from service.budget import Constraint, Plan, Room, describe, judge, line_of, size
from service.commands.scouting import Combination, Failed, Scouted
from service.errors import WarmfleetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.ledger import Sum
    from service.settings import Settings

NO_GPU: Final = (
    "the model runs on the CPU here; what it takes of a GPU has to be measured on a machine that has one"
)


class ForecastError(WarmfleetError):
    """What is asked for cannot be told from what was measured. Exit code 1."""


@dataclass(frozen=True)
class Machine:
    """What to plan for; None: as this machine has it.

    Attributes:
        gpu_memory: bytes of each GPU.
        gpus: how many there are.
        host_memory: bytes that the service may see.
        cores: that it may use.
    """

    gpu_memory: int | None = None
    gpus: int | None = None
    host_memory: int | None = None
    cores: int | None = None


@dataclass(frozen=True)
class Row:
    """A combination, and what would become of it; `entry` and `plan` are None if it did not boot.

    Attributes:
        scouted: what was measured, on this machine.
        entry: the sum for the machine that is planned for.
        plan: its result.
        note: what a reader should know of this combination; empty if all is as asked.
    """

    scouted: Scouted | Failed
    entry: Sum | None = None
    plan: Plan | None = None
    note: str = ""

    @property
    def asked(self) -> Combination:
        """What was tried."""
        return self.scouted.asked


# ---------------------------------------------------------------------------------------------
# What is tried


def further(
    own: Scouted | Failed, tokens: Sequence[int], dtypes: Sequence[str], *, cuda: bool
) -> list[Combination]:
    """Return the combinations beside the user's own one, which comes first and is booted by then.

    Args:
        own: what became of it.
        tokens: as asked for; empty: half and twice of what the own one has, if that is known.
        dtypes: as asked for; empty: on CUDA also float32.
        cuda: whether the model is on a GPU.
    """
    asked = own.asked
    if not tokens:
        now = own.max_batch_tokens if isinstance(own, Scouted) else asked.max_batch_tokens or 0
        more = isinstance(own, Scouted) and now >= (asked.max_batch_tokens or 0)
        budgets = [asked.max_batch_tokens, *([max(8, now // 2)] if now else []), *([2 * now] if more else [])]
    else:
        budgets = list(tokens)
    kinds = list(dtypes) or [asked.dtype, *(["float32"] if cuda and asked.dtype != "float32" else [])]
    listed = [Combination(dtype, budget) for dtype in kinds for budget in budgets]
    return [one for one in dict.fromkeys(listed) if one != asked]


# ---------------------------------------------------------------------------------------------
# What fits


def forecast(
    scouted: Scouted | Failed, machine: Machine, settings: Settings, cores: int, longest: int
) -> Row:
    """Return a combination's row of the table.

    Args:
        scouted: what became of its boot.
        machine: to plan for.
        settings: of which `max_workers` counts.
        cores: that this machine has for the service.
        longest: tokens of the model's longest text; 0: unknown.
    """
    if isinstance(scouted, Failed):
        return Row(scouted, note=("does not fit: " if scouted.no_room else "") + scouted.problem)
    entry = fitted(scouted.entry, machine, cores, settings.max_workers)
    return Row(scouted, entry, entry.plan(), note_of(scouted, longest))


def fitted(entry: Sum, machine: Machine, cores: int, max_workers: int | None) -> Sum:
    """Return the sum for a machine: what it has instead of what is here is whole, with nobody else on it.

    On a GPU cores bind only where they are given: a worker computes elsewhere, and waits.

    Raises:
        ForecastError: GPUs are asked about, but the model was measured on the CPU.
    """
    if not entry.devices and (machine.gpu_memory or machine.gpus):
        raise ForecastError(NO_GPU)
    host, devices = entry.host, entry.devices
    if machine.host_memory:
        host = replace(host, total=machine.host_memory, others=0, source="asked for")
    if machine.gpu_memory:
        devices = tuple(
            replace(room, total=machine.gpu_memory, others=0, source="asked for") for room in devices
        )
    if machine.gpus:
        devices = tuple(replace(devices[0], name=f"gpu{nth}", others=0) for nth in range(machine.gpus))
    bound = machine.cores or (None if devices else cores)
    return replace(entry, host=host, devices=devices, cores=bound, max_workers=max_workers)


def note_of(scouted: Scouted, longest: int) -> str:
    """Say where a combination is not quite what was asked."""
    notes = []
    tokens, asked = scouted.max_batch_tokens, scouted.asked.max_batch_tokens
    if asked and tokens < asked:
        notes.append(f"lowered from {asked}: no room for more")
    if tokens < longest:
        notes.append(f"cuts texts, of which the model takes {longest} tokens")
    return "; ".join(notes)


def chosen(settings: Settings, found: Plan) -> tuple[int, str]:
    """Return how many workers to run, and a sentence if that is not what `workers` says.

    The default of `workers` is nobody's wish: then it is what fits.
    """
    if settings.workers == "auto" or "workers" not in settings.model_fields_set:
        return found.fits, ""
    if not found.fits:
        return 0, f"not one worker fits: {describe(line_of(found))}"
    verdict = judge(found, settings.workers, "clamp")
    return verdict.workers, verdict.text


# ---------------------------------------------------------------------------------------------
# Budget against use


@dataclass(frozen=True)
class Bar:
    """How a memory is used, in bytes; all but `total` and `name` add up to it, unless it is too small.

    Attributes:
        name: of the device, or `host`.
        total: bytes there are.
        others: of processes besides the fleet.
        shared: of the arbiter, for all workers.
        workers: of the planned workers.
        free: for workers, and not taken.
        kept: beyond what may be used.
    """

    name: str
    total: int
    others: int
    shared: int
    workers: int
    free: int
    kept: int


def bars(entry: Sum, found: Plan, workers: int) -> list[Bar]:
    """Return one for each memory: every device, and the host."""
    lines = {line.name: line for line in found.constraints}
    held = found.held(workers)
    return [_bar(room, lines[room.name], held[room.name]) for room in (*entry.devices, entry.host)]


def _bar(room: Room, line: Constraint, workers: int) -> Bar:
    taken = workers * line.price
    free = max(0, line.budget - taken)
    kept = max(0, room.total - room.others - room.shared - taken - free)
    return Bar(room.name, room.total, room.others, room.shared, taken, free, kept)


# ---------------------------------------------------------------------------------------------
# As data


def as_json(row: Row) -> dict[str, Any]:
    """Return a row as JSON has it: bytes and seconds, `problem` instead of the sums if it did not boot."""
    asked, scouted = row.asked, row.scouted
    head = {"dtype": asked.dtype, "max_batch_tokens": asked.max_batch_tokens, "note": row.note}
    if isinstance(scouted, Failed) or row.entry is None or row.plan is None:
        return head | {"fits": None, "problem": row.note}
    cost = row.entry.cost
    return head | {
        "dtype": scouted.dtype,
        "max_batch_tokens": scouted.max_batch_tokens,
        "cost": cost.parts | {"on_device": cost.on_device, "on_host": cost.on_host, "raised": cost.raised},
        "shared": row.entry.host.shared,
        "ready_seconds": round(scouted.ready_s, 3),
        "stage_seconds": dict(scouted.stage_seconds),
        **row.plan.as_json(),
    }


def fits_in(row: Row) -> dict[str, str]:
    """Return the workers that each kind of memory, and the cores, have room for, as text."""
    if row.plan is None:
        return {}
    by_device = list(row.plan.by_device.values())
    others = {line.name: str(line.fits) for line in row.plan.constraints if line.kind != "device"}
    same = len(set(by_device)) == 1
    devices = str(by_device[0]) if same else ", ".join(map(str, by_device))
    return ({"device": devices} if by_device else {}) | others


def parts_of(row: Row) -> dict[str, str]:
    """Return the cost of a worker by part, as text; on a CPU it has one part."""
    if row.entry is None:
        return {}
    return {name: size(count) for name, count in row.entry.cost.parts.items() if count or name == "host"}
