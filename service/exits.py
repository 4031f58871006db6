# SPDX-License-Identifier: Apache-2.0
"""How a worker ended, in our words: from what it noted, its deadline, and Gunicorn's log. Arbiter."""

from __future__ import annotations

import logging

from service.lifecycle import Failure, State
from service.scoreboard import FAILURES

ASKED = ("SIGTERM", "SIGQUIT", "SIGINT")
"""Signals that mean: please go. A worker that is not READY yet dies of them."""


def failure(noted: int, deadline: float, state: State, how: str, time: float) -> Failure | None:
    """Name why the worker ended; None if it was asked to.

    Args:
        noted: what the worker noted itself: one more than the index into FAILURES, or 0.
        deadline: when its stage or pass had to be done, or 0.
        state: where it was.
        how: name of the signal or exit code that ended it, empty for code 0 or if Gunicorn did not say.
        time: now.
    """
    if noted:
        return FAILURES[noted - 1]
    if deadline and time >= deadline:
        return Failure.FORWARD_TIMEOUT if state in (State.READY, State.DRAINING) else Failure.DEADLINE
    if how == "SIGKILL":
        return Failure.KILLED
    if how in ASKED or (not how and state is State.DRAINING):
        return None
    return Failure.CRASHED if how.startswith("SIG") else Failure.EXITED


def describe(reason: Failure, how: str) -> str:
    """Say it in a sentence for people."""
    match reason:
        case Failure.DEADLINE:
            return "the stage took longer than its limit; the log has every stack"
        case Failure.FORWARD_TIMEOUT:
            return "a forward pass took longer than forward_timeout; the log has every stack"
        case Failure.KILLED:
            return "killed by SIGKILL, perhaps out of memory"
        case Failure.CRASHED:
            return f"ended by {how}"
        case _:
            return f"exited with code {how or 0}"


class ExitWatcher(logging.Filter):
    """Reads how a worker ended off Gunicorn's log record: its hooks do not say."""

    def __init__(self) -> None:
        """Watch from now on."""
        super().__init__()
        self._how: dict[int, str] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record; remember `Worker (pid:%s) was sent %s!` and `… exited with code %s.`."""
        message, args = str(record.msg), record.args
        if message.startswith("Worker (pid:%s)") and isinstance(args, tuple) and len(args) == 2:  # noqa: PLR2004
            self._how[int(str(args[0]))] = str(args[1])
        return True

    def pop(self, pid: int) -> str:
        """Return the signal's name or the exit code of a dead worker, empty for code 0."""
        return self._how.pop(pid, "")
