# SPDX-License-Identifier: Apache-2.0
"""The life of a worker as a table, and the words for how it can end. Pure; both processes.

Theory of operation. A slot is a place for a worker; a worker walks its slot from EMPTY to
READY and ends in one of three ways: it is asked to go (DRAINING), it says that it cannot
become ready (FAILED), or it dies. Death is not a transition of the worker's: the arbiter
sees it and empties the slot, from whatever state it was in. Every state has one writer: the
arbiter writes EMPTY and SPAWNED, the worker writes the rest.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class State(IntEnum):
    """Where the worker of a slot is. The numbers are what the scoreboard stores."""

    EMPTY = 0
    SPAWNED = 1
    PINNED = 2
    BACKOFF = 3
    WAITING = 4
    LOADING = 5
    WARMING = 6
    READY = 7
    DRAINING = 8
    FAILED = 9

    @property
    def label(self) -> str:
        """The state in lower case, as the JSON pages and the metrics show it."""
        return self.name.lower()


TRANSITIONS: dict[State, frozenset[State]] = {
    State.EMPTY: frozenset({State.SPAWNED}),
    State.SPAWNED: frozenset({State.PINNED, State.EMPTY}),
    State.PINNED: frozenset({State.BACKOFF, State.WAITING, State.FAILED, State.EMPTY}),
    State.BACKOFF: frozenset({State.WAITING, State.EMPTY}),
    State.WAITING: frozenset({State.LOADING, State.EMPTY}),
    State.LOADING: frozenset({State.WARMING, State.FAILED, State.EMPTY}),
    State.WARMING: frozenset({State.READY, State.FAILED, State.EMPTY}),
    State.READY: frozenset({State.DRAINING, State.EMPTY}),
    State.DRAINING: frozenset({State.EMPTY}),
    State.FAILED: frozenset({State.DRAINING, State.EMPTY}),
}


class Stage(StrEnum):
    """A timed part of a boot; `Stage` names are the label values of the stage metrics."""

    IMPORT = "import"
    WAIT = "wait"
    LOAD = "load"
    TO_DEVICE = "to_device"
    WARMUP = "warmup"


class Failure(StrEnum):
    """Why a worker ended without being asked to; label values of the failure metrics."""

    LOAD = "load"
    WARMUP = "warmup"
    BUDGET = "budget"
    DEADLINE = "deadline"
    FORWARD_TIMEOUT = "forward_timeout"
    DEVICE_LOST = "device_lost"
    OUT_OF_MEMORY = "out_of_memory"
    GREW = "grew"
    KILLED = "killed"
    CRASHED = "crashed"
    EXITED = "exited"


class TransitionError(RuntimeError):
    """A worker tried a step that the table does not have: a bug, never a condition."""


def check(before: State, after: State) -> State:
    """Return `after` if the table allows the step.

    Raises:
        TransitionError: the step is not in `TRANSITIONS`.
    """
    if after not in TRANSITIONS[before]:
        msg = f"no transition from {before.label} to {after.label}"
        raise TransitionError(msg)
    return after


def diagram() -> str:
    """Return the table as a Mermaid state diagram (docs/architecture.md shows it)."""
    lines = ["stateDiagram-v2", "    [*] --> empty"]
    for before, afters in TRANSITIONS.items():
        lines += [f"    {before.label} --> {after.label}" for after in sorted(afters)]
    return "\n".join(lines)
