# SPDX-License-Identifier: Apache-2.0
"""Deadlines that no hang can outlive: every stack is printed and the process ends. Worker.

faulthandler's timer is a C thread: it needs neither the GIL nor the event loop, so it fires while
a load or a kernel holds both. There is one timer a process. A boot stage arms it outright. Arming
costs a thread, too much for every forward pass; those only note their deadline, which the pulse
checks, and while the worker serves the timer guards the pulse itself.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.scoreboard import Row

REARM_S = 1.0
SLACK_S = 2.0
"""Beyond a pass's own deadline, so that a pulse that can still run names the cause first."""


class Watchdog:
    """Keeps the deadline on the scoreboard too, so that the arbiter can name the cause."""

    def __init__(self, row: Row) -> None:
        """Guard the process whose scoreboard row this is."""
        self._row = row
        self._rearm_at = 0.0

    @contextmanager
    def stage(self, seconds: float) -> Iterator[None]:
        """Model thread, boot: end the process, with exit code 1, unless the block ends in time."""
        faulthandler.dump_traceback_later(seconds, exit=True)
        with self.forward(seconds):
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def forward(self, seconds: float) -> Iterator[None]:
        """Model thread, serving: note the deadline of a forward pass; `tick` enforces it."""
        self._row.deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._row.deadline = 0.0

    def tick(self, now: float, forward_timeout_s: float) -> None:
        """Event loop, serving: end the process if a pass is late; postpone the timer guarding this call."""
        if 0 < self._row.deadline <= now:
            faulthandler.dump_traceback(all_threads=True)
            sys.stderr.flush()
            os._exit(1)
        if now >= self._rearm_at:
            self._rearm_at = now + REARM_S
            faulthandler.dump_traceback_later(forward_timeout_s + SLACK_S, exit=True)
