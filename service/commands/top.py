# SPDX-License-Identifier: Apache-2.0
"""`warmfleet top`: a running service on a terminal, live, until a key is pressed. Command line.

A thread follows the service; this one waits for keys, and draws what there is a few times a second, so that a
service that hangs holds no key up.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import sys
import termios
import threading
import time
import tty
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.live import Live

from service.commands.following import Seen, follow
from service.commands.top_view import Watch, screen
from service.errors import WarmfleetError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.ops_client import Address

DRAW_S = 0.25
LEAVE: Final = (b"q", b"Q", b"\x03", b"\x04")


class NoTerminalError(WarmfleetError):
    """There is nothing to draw on. Exit code 2."""


def top(address: Address) -> None:
    """Draw until somebody leaves.

    Raises:
        NoTerminalError: input or output is no terminal.
    """
    console = Console()
    if not (sys.stdin.isatty() and console.is_terminal) or console.is_dumb_terminal:
        raise NoTerminalError("top needs a terminal; `warmfleet status` prints the same once")
    news: queue.SimpleQueue[Seen] = queue.SimpleQueue()
    threading.Thread(target=_follow, args=(address, news), daemon=True).start()
    watch = Watch(address)
    with contextlib.suppress(KeyboardInterrupt), _keys() as keyboard, _drawn(console) as live:
        while True:
            while not news.empty():
                watch.take(news.get())
            size = console.size
            live.update(screen(watch, time.monotonic(), size.width, size.height), refresh=True)
            if select.select([keyboard], [], [], DRAW_S)[0]:
                typed = os.read(keyboard, 64)
                if not typed or any(key in typed for key in LEAVE):
                    return


def _follow(address: Address, news: queue.SimpleQueue[Seen]) -> None:
    for seen in follow(address):
        news.put(seen)


@contextlib.contextmanager
def _keys() -> Iterator[int]:
    """Have keys one by one and unseen; Ctrl-C stays a signal."""
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard)
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _drawn(console: Console) -> Iterator[Live]:
    """Draw on the alternate screen; what was on the terminal comes back."""
    with Live(console=console, screen=True, auto_refresh=False, transient=True) as live:
        yield live
