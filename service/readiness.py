# SPDX-License-Identifier: Apache-2.0
"""Is the service ready, and if not, why: quorum first, floor afterwards. Pure; worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.slots import SlotRecord

STALE_S = 3.0
"""A row whose beat is older than this says nothing about its worker any more."""


@dataclass(frozen=True)
class Policy:
    """What counts as ready: `quorum` workers at first (None: all that can be), `floor` from then on.

    A slot that has failed `boot_attempts` times in a row is not waited for any more.
    """

    target: int
    quorum: int | None
    floor: int
    boot_attempts: int = 3


@dataclass(frozen=True)
class Readiness:
    """The answer, and the reason in words."""

    ready: bool
    status: str
    detail: str
    ready_workers: int
    wanted: int


def aggregate(
    records: Sequence[SlotRecord], policy: Policy, now: float, *, was_ready: bool, stopping: bool
) -> Readiness:
    """Decide from the rows whether traffic may come.

    Args:
        records: a snapshot of the scoreboard, empty slots included or not.
        policy: quorum and floor.
        now: seconds of the monotonic clock.
        was_ready: whether the quorum was ever reached; from then on only the floor counts.
        stopping: whether the whole service is going away.
    """
    live = [record for record in records if record.live]
    ready = sum(record.state is State.READY and now - record.beat <= STALE_S for record in live)
    lost = sum(_is_lost(record, policy) for record in live)
    quorum = min(policy.quorum, policy.target) if policy.quorum else max(1, policy.target - lost)
    wanted = min(policy.floor, policy.target) if was_ready else quorum
    count = f"{ready} of {policy.target} workers are ready"
    if stopping:
        return Readiness(
            ready=False, status="draining", detail="the service is stopping", ready_workers=ready, wanted=0
        )
    if ready >= wanted:
        return Readiness(
            ready=True, status="ready", detail=_join(count, live, now), ready_workers=ready, wanted=wanted
        )
    if live and all(record.state is State.FAILED for record in live):
        status = "failed"
    else:
        status = "degraded" if was_ready else "starting"
    detail = _join(f"{count}, {wanted} wanted", live, now)
    return Readiness(ready=False, status=status, detail=detail, ready_workers=ready, wanted=wanted)


def _is_lost(record: SlotRecord, policy: Policy) -> bool:
    return record.state is not State.READY and (
        record.state is State.FAILED or record.failures >= policy.boot_attempts
    )


def _join(count: str, live: Sequence[SlotRecord], now: float) -> str:
    """Return the count, then a clause for each worker that is not simply ready."""
    clauses = [_clause(record, now) for record in live]
    return "; ".join([count, *(clause for clause in clauses if clause)])


def _clause(record: SlotRecord, now: float) -> str:
    seconds = f"{now - record.since:.1f} s"
    if record.state is State.READY:
        silent = now - record.beat
        return f"slot {record.slot} has not been heard of for {silent:.1f} s" if silent > STALE_S else ""
    text = f"slot {record.slot} is {record.state.label} since {seconds}"
    if record.doing:
        text += f" ({record.doing})"
    if record.error and record.failures:
        again = f"{record.failures} in a row" if record.failures > 1 else "once"
        text += f", failed {again}, last while {record.error_state}: {record.error}"
    return text
