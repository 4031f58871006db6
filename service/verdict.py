# SPDX-License-Identifier: Apache-2.0
"""How the fleet is, in one short sentence for people. Pure; worker."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from service.lifecycle import State
from service.readiness import STALE_S

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from service.readiness import Readiness
    from service.slots import SlotRecord

NAMED = 2
"""Slots that the sentence speaks of; the others are counted."""
MOST_LETTERS = 80
"""Of an error."""
TIMES = "\N{MULTIPLICATION SIGN}"
SHAPE = re.compile(r"batch (\d+)x(\d+)")
WORRIES = (
    State.FAILED,
    State.BACKOFF,
    State.WARMING,
    State.LOADING,
    State.WAITING,
    State.PINNED,
    State.SPAWNED,
    State.EMPTY,
    State.DRAINING,
)
"""What a person wants to hear of first: what is wrong, then what is nearest to serving."""
WORDS = {
    State.WAITING: "waits for its turn to load",
    State.PINNED: "is starting",
    State.SPAWNED: "is starting",
    State.EMPTY: "has no worker yet",
    State.DRAINING: "is draining",
}


def verdict(
    readiness: Readiness,
    records: Sequence[SlotRecord],
    now: float,
    *,
    target: int,
    planned: int = 0,
    etas: Mapping[int, float | None],
) -> str:
    """Return the sentence.

    Args:
        readiness: what `/ready` says.
        records: the slots that are held, or ought to be.
        now: seconds of the scoreboard's clock.
        target: workers that the arbiter keeps.
        planned: workers that shall run; a fleet that sizes itself gets there one by one.
        etas: seconds until a slot is ready, where they are known.
    """
    if readiness.status == "draining":
        held = sum(record.live for record in records)
        left = {0: "no worker is left", 1: "1 worker is left"}.get(held, f"{held} workers are left")
        return f"draining: the service is stopping, {left}"
    status = "serving" if readiness.ready else readiness.status
    worries = sorted(
        (record for record in records if _silent(record, now) or record.state is not State.READY),
        key=lambda record: (not _silent(record, now), _rank(record.state), record.slot),
    )
    clauses = [f"{readiness.ready_workers} of {target} ready"]
    clauses += [_clause(record, now, etas.get(record.slot)) for record in worries[:NAMED]]
    if len(worries) > NAMED:
        clauses.append(f"and {len(worries) - NAMED} more")
    if planned > target:
        clauses.append(f"growing to {planned}")
    return f"{status}: {', '.join(clauses)}"


def shape_of(doing: str) -> str:
    """Return the shape in what a warm-up says that it does, or the words themselves."""
    found = SHAPE.match(doing)
    return f"{found[1]}{TIMES}{found[2]}" if found else doing


def _silent(record: SlotRecord, now: float) -> bool:
    return record.state is State.READY and now - record.beat > STALE_S


def _rank(state: State) -> int:
    return WORRIES.index(state) if state in WORRIES else -1


def _clause(record: SlotRecord, now: float, eta: float | None) -> str:
    """Return what is to be said of a slot that does not simply serve."""
    slot = f"slot {record.slot}"
    match record.state:
        case State.READY:
            return f"{slot} has been silent for {now - record.beat:.0f} s"
        case State.FAILED:
            return f"{slot} has failed: {_cut(record.error or 'no reason is known')}"
        case State.BACKOFF:
            return f"{slot} tries again in {max(0.0, record.backoff_until - now):.0f} s"
        case State.WARMING | State.LOADING:
            shape = shape_of(record.doing)
            doing = f": {'batch ' if shape != record.doing else ''}{shape}" if record.doing else ""
            left = "" if eta is None else f", {eta:.0f} s left"
            return f"{slot} is {record.state.label}{doing}{left}"
        case state:
            return f"{slot} {WORDS[state]}"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_LETTERS else line[: MOST_LETTERS - 1] + "…"
