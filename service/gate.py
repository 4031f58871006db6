# SPDX-License-Identifier: Apache-2.0
"""Which worker takes a connection: only a warm one, and only the least loaded. Worker; `decide` is pure."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from service.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.scoreboard import Peer, Scoreboard

FRESH_S = 0.5
"""Rows with an older beat do not count: a stopped sibling must not hold the others back."""
LOOKS = 50
"""Looks after which a worker that is not the least loaded accepts anyway."""
SHED_FACTOR, SHED_MARGIN = 1.2, 1.0
"""A load above 1.2 times the least one plus 1 makes keep-alive clients move."""


class Verdict(Enum):
    """What to do with a connection that waits in the kernel's queue."""

    ACCEPT = auto()
    LOOK_AGAIN = auto()
    LEAVE = auto()


@dataclass(frozen=True)
class Situation:
    """All that the rules look at.

    Attributes:
        state: this worker's state.
        load: this worker's load.
        mean_load: the same over about half a second.
        siblings: rows of the other live workers.
        looks: how often this worker has looked at the waiting connection already.
        ever_ready: whether any worker was ever READY.
        cold_s: seconds since any worker was READY.
        cold_hold_s: seconds for which connections are held while no worker is READY.
        stopping: whether the whole service is going away.
    """

    state: State
    load: int
    siblings: Sequence[Peer]
    mean_load: float = 0.0
    looks: int = 0
    ever_ready: bool = True
    cold_s: float = 0.0
    cold_hold_s: float = 10.0
    stopping: bool = False


def decide(situation: Situation, now: float) -> Verdict:
    """Apply the rules of accepting, in the order in which they are asked (docs/decisions/0001)."""
    loads = [p.load for p in situation.siblings if p.state is State.READY and now - p.beat <= FRESH_S]
    if situation.stopping:
        return Verdict.ACCEPT if situation.state in (State.READY, State.DRAINING) else Verdict.LEAVE
    if situation.state is State.DRAINING:
        return Verdict.LEAVE
    if situation.state is State.READY:
        least = situation.load <= min(loads, default=situation.load)
        return Verdict.ACCEPT if least or situation.looks >= LOOKS else Verdict.LOOK_AGAIN
    if loads or (situation.ever_ready and situation.cold_s < situation.cold_hold_s):
        return Verdict.LEAVE
    return Verdict.ACCEPT  # to say 503, so that nobody hangs


def should_shed(situation: Situation, now: float) -> bool:
    """Say whether replies shall close their connection, so that keep-alive clients move elsewhere.

    Judged by means: for a moment every worker is idle. And by the load now, so as not to overdo it.
    """
    if situation.state is not State.READY or situation.stopping:
        return True
    means = [p.mean_load for p in situation.siblings if p.state is State.READY and now - p.beat <= FRESH_S]
    return bool(means) and min(situation.load, situation.mean_load) > SHED_FACTOR * min(means) + SHED_MARGIN


class Gate:
    """The rules bound to one slot of a scoreboard."""

    def __init__(self, board: Scoreboard, slot: int, cold_hold_s: float) -> None:
        """Decide for this slot."""
        self._board, self._slot, self._cold_hold_s = board, slot, cold_hold_s

    def situation(self, load: int, looks: int = 0) -> Situation:
        """Read the board; also publishes this worker's load."""
        board, header = self._board, self._board.header
        row = board.rows[self._slot]
        row.load = load
        return Situation(
            state=State(row.state),
            load=load,
            siblings=board.peers(without=self._slot),
            mean_load=row.mean_load,
            looks=looks,
            ever_ready=bool(header.ever_ready),
            cold_s=time.monotonic() - header.last_ready,
            cold_hold_s=self._cold_hold_s,
            stopping=bool(header.stopping),
        )

    def verdict(self, load: int, looks: int) -> Verdict:
        """Decide about the next waiting connection."""
        return decide(self.situation(load, looks), time.monotonic())

    def sheds(self, load: int) -> bool:
        """Decide whether a reply shall close its connection."""
        return should_shed(self.situation(load), time.monotonic())

    @property
    def siblings_serve(self) -> bool:
        """Whether another worker is READY."""
        peers, now = self._board.peers(without=self._slot), time.monotonic()
        return any(p.state is State.READY and now - p.beat <= FRESH_S for p in peers)
