# SPDX-License-Identifier: Apache-2.0
"""Deadlines that no hang can outlive: a C thread prints every stack and ends the process. Worker.

faulthandler's timer needs neither the GIL nor the event loop, so it fires while a load or a
kernel holds both. There is one timer a process; boot stages and forward passes share it, as
they run on the same thread one after another.
"""

from __future__ import annotations

import faulthandler
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.scoreboard import Row


class Watchdog:
    """Arms the timer, and leaves the deadline on the scoreboard so that the arbiter can name the cause."""

    def __init__(self, row: Row) -> None:
        """Guard the process whose scoreboard row this is."""
        self._row = row

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """End the process, with exit code 1 and all stacks on stderr, unless the block ends in time."""
        self._row.deadline = time.monotonic() + seconds
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._row.deadline = 0.0
