# SPDX-License-Identifier: Apache-2.0
"""Permits that any death returns: record locks on the bytes of a memfd. Made by the arbiter, for workers.

Record locks belong to the process, not to the file description (flock's would be shared by all
forks), and the kernel drops them when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os


class Permits:
    """A fixed number of permits; a process holds one at most: its own lock is no obstacle to itself."""

    def __init__(self, name: str, count: int) -> None:
        """Make `count` permits; `name` shows in /proc/PID/fd."""
        self.count = count
        self._fd = os.memfd_create(f"warmfleet-{name}")

    def try_acquire(self) -> int | None:
        """Take any free permit and return its number, or None at once."""
        for number in range(self.count):
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError:  # another process holds it
                continue
            return number
        return None

    def release(self, number: int) -> None:
        """Give a permit back."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, number)
