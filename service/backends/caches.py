# SPDX-License-Identifier: Apache-2.0
"""Folders of what one worker makes for all, and for later boots: exported graphs, compiled kernels.

Whoever finds nothing takes the folder's lock; the others wait for it, and then find something. The
kernel gives the lock back when its holder dies.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = "lock"


def choose(chosen: str | None, name: str) -> Path:
    """Return the chosen folder, else `name` in the user's own cache; nothing is made yet."""
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()  # noqa: PTH111 - Path's raises for unknown ~users
    home = os.path.expanduser("~")  # noqa: PTH111 - see above
    home = "/" if home == "~" else home  # a uid without a name or HOME: never a folder called `~`
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache"), "warmfleet", name)


@contextmanager
def leading(folder: Path, variable: str, *, then_together: bool = False) -> Iterator[None]:
    """Make the folder, for this user alone, and hold its lock; wait for whoever holds it.

    Args:
        folder: what `choose` returned.
        variable: names the folder in the environment.
        then_together: whether those who waited may go on at once, side by side.

    Raises:
        ModelError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / LOCK).open("ab")
    except OSError as error:
        msg = f"cannot write to the folder {folder}: {error.strerror}; name one that can be by {variable}"
        raise ModelError(msg) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_SH if then_together else fcntl.LOCK_EX)
        yield
