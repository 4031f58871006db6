# SPDX-License-Identifier: Apache-2.0
"""What is known of a slot, and every decision about slots. Pure; both processes.

Times are seconds of the system-wide monotonic clock, so both processes may compare them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

YOUNG_S = 60.0
"""A worker that dies sooner than this after READY counts as failed."""
MAX_BACKOFF_S = 60.0
DEVICE_ATTEMPTS = 5
"""Failures in a row of every slot of a GPU after which the GPU is called dead."""
CPU = "cpu"


@dataclass(frozen=True)
class ShapeTimes:
    """What warm-up measured for one batch shape, in seconds a pass."""

    texts: int
    tokens: int
    rounds: int
    first_s: float
    steady_s: float
    converged: bool


@dataclass(frozen=True)
class WarmedShape:
    """The passes that a warm-up made, or has made so far, of one batch shape.

    Attributes:
        texts: of a batch.
        tokens: of each text.
        passes: seconds of each, the first ones if there were many.
        rounds: how many passes there were.
        steady_s: what a pass took in the end; None while the shape is being warmed.
        converged: whether the passes have settled.
    """

    texts: int
    tokens: int
    passes: tuple[float, ...]
    rounds: int
    steady_s: float | None = None
    converged: bool = False


@dataclass(frozen=True)
class BootStage:
    """A part of a boot: when it began, and the seconds it took; None while it runs."""

    stage: str
    at: float
    seconds: float | None


@dataclass(frozen=True)
class Boot:
    """The life of one worker of a slot: from its fork until it was ready, and its end; None: not yet."""

    generation: int
    began: float
    stages: tuple[BootStage, ...] = ()
    ready_at: float | None = None
    ended_at: float | None = None

    @property
    def outcome(self) -> str:
        """How it went: booting, ready (and still there), gone (was ready, has ended), failed."""
        if self.ended_at is None:
            return "booting" if self.ready_at is None else "ready"
        return "failed" if self.ready_at is None else "gone"


@dataclass(frozen=True)
class SlotRecord:
    """A snapshot of one scoreboard row."""

    slot: int
    pid: int
    state: State
    since: float
    beat: float
    device: str = CPU
    generation: int = 1
    epoch: int = 0
    load: int = 0
    in_flight: int = 0
    ready_at: float = 0.0
    failures: int = 0
    backoff_until: float = 0.0
    progress: float = 0.0
    doing: str = ""
    error: str = ""
    error_state: str = ""
    max_batch_tokens: int = 0
    declared_batch_tokens: int = 0
    queued_texts: int = 0
    queued_tokens: int = 0
    failures_by_reason: dict[str, int] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    shapes: tuple[ShapeTimes, ...] = ()
    memory_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        """Whether a process holds the slot."""
        return self.state is not State.EMPTY

    @property
    def out(self) -> bool:
        """Whether the slot cannot be counted on for now: its worker gave up, or waits out a failure."""
        return self.state in (State.FAILED, State.BACKOFF)


def lowest_free(held: Collection[int], capacity: int) -> int | None:
    """Return the lowest slot that no live worker holds, or None when the table is full."""
    return next((slot for slot in range(capacity) if slot not in held), None)


def choose_device(
    devices: Sequence[str],
    taken: Sequence[str],
    previous: str = "",
    room: Mapping[str, int] | None = None,
) -> str:
    """Return the device with the fewest workers; on a tie the slot's previous one, then the first.

    Args:
        devices: to choose from.
        taken: the device of each worker.
        previous: of this slot.
        room: how many workers fit on each device; full ones are left out, unless all are. None: unknown.
    """
    count = Counter(taken)
    free = [device for device in devices if room is None or count[device] < room.get(device, len(taken) + 1)]
    fewest = min(count[device] for device in free or devices)
    candidates = [device for device in free or devices if count[device] == fewest]
    return previous if previous in candidates else candidates[0]


def spread(devices: Sequence[str], workers: int, room: Mapping[str, int] | None = None) -> list[str]:
    """Return the device of each of so many workers, as they are chosen one after the other."""
    taken: list[str] = []
    for _ in range(workers):
        taken.append(choose_device(devices, taken, room=room))
    return taken


def backoff_s(failures: int) -> float:
    """Return the pause before the next boot after so many failures in a row: 0, 1, 2, 4 … 60 s."""
    return 0.0 if failures <= 0 else min(MAX_BACKOFF_S, 2.0 ** (failures - 1))


def after_death(record: SlotRecord, time: float, *, failed: bool) -> tuple[int, float]:
    """Return (failures in a row, time before which the slot must not load) once its worker has died.

    A worker that was asked to go, or that served for a minute, leaves a clean sheet. One that died
    young but READY is retried at once the first time, as it may have been an accident.
    """
    if not failed:
        return 0, 0.0
    if record.ready_at:
        failures = 1 if time - record.ready_at >= YOUNG_S else record.failures + 1
        return failures, time + backoff_s(failures - 1)
    failures = record.failures + 1
    return failures, time + backoff_s(failures)


def leaving_order(records: Sequence[SlotRecord]) -> list[int]:
    """Return the slots in the order in which a shrinking fleet gives them up.

    Draining and cold workers first, since they serve nobody; then the newest on the fullest device.
    """
    left = [record for record in records if record.live]
    order: list[int] = []
    while left:
        count = Counter(record.device for record in left)

        def cost(record: SlotRecord, count: Counter[str] = count) -> tuple[bool, bool, int, float, int]:
            warm, stays = record.state is State.READY, record.state is not State.DRAINING
            return warm, stays, -count[record.device] if warm else 0, -record.since, -record.slot

        first = min(left, key=cost)
        order.append(first.slot)
        left.remove(first)
    return order


def may_leave(records: Sequence[SlotRecord], me: int, *, target: int, floor: int) -> bool:
    """Say whether a READY worker may drain for a roll: all others that can be READY are, and the floor holds.

    A fleet that is no larger than its floor rolls all the same, one worker at a time, while its
    connections wait in the kernel's queue: refusing for ever would be no roll at all.
    """
    others = [record for record in records if record.live and record.slot != me]
    ready = sum(record.state is State.READY for record in others)
    can_be_ready = target - 1 - sum(record.out for record in others)
    return ready >= max(can_be_ready, min(floor, target - 1))


def device_is_dead(records: Sequence[SlotRecord], device: str, attempts: int = DEVICE_ATTEMPTS) -> bool:
    """Say whether every slot of a GPU has failed so often in a row that the GPU itself is to blame."""
    mine = [record for record in records if record.live and record.device == device]
    failing = [record for record in mine if record.state is not State.READY and record.failures >= attempts]
    return device != CPU and bool(mine) and failing == mine


def halt_is_due(records: Sequence[SlotRecord], *, target: int, ever_ready: bool) -> bool:
    """Say whether nobody is trying any more, so that a parked worker must halt the arbiter.

    Before any worker was ready: all slots have given up. Later: every device is dead.
    """
    live = [record for record in records if record.live]
    if len(live) < target or any(record.state is not State.FAILED for record in live):
        return False
    return not ever_ready or all(device_is_dead(records, record.device) for record in live)
