# SPDX-License-Identifier: Apache-2.0
"""`warmfleet serve` on a terminal: the log above, a bar for each worker below until the service is ready.

A parent process that runs Gunicorn, passes signals on and ends with its exit code.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from service.bars import SlotBars
from service.browser import show_page
from service.ops_client import Address, ask, is_status, url

if TYPE_CHECKING:
    from types import FrameType

    from service.settings import Settings

POLL_S = 0.2


def run_with_progress(command: list[str], settings: Settings, *, show: bool = False) -> int:
    """Run Gunicorn below a progress display; return its exit code.

    A closed terminal sends HUP, which to Gunicorn would mean a reload; it is passed on as TERM.

    Args:
        command: starts Gunicorn.
        settings: that it will read.
        show: whether to open the status page in a browser as soon as it answers.
    """
    console = Console(stderr=True)
    gunicorn = subprocess.Popen(  # noqa: S603 - our own arguments
        command, stderr=subprocess.PIPE, text=True, errors="replace", process_group=0
    )

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            gunicorn.send_signal(signal.SIGTERM if signum == signal.SIGHUP else signum)

    for signum in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGQUIT,
        signal.SIGHUP,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGTTIN,
        signal.SIGTTOU,
    ):
        signal.signal(signum, pass_on)
    log = threading.Thread(target=_copy_log, args=(gunicorn, console), daemon=True)
    log.start()
    try:
        with contextlib.suppress(OSError):  # the terminal is gone
            _show_boot(gunicorn, console, settings, show=show)
        gunicorn.wait()
    finally:
        gunicorn.terminate()
        code = gunicorn.wait()
    log.join(timeout=2)
    return code if code >= 0 else 128 - code


def _copy_log(gunicorn: subprocess.Popen[str], console: Console) -> None:
    lines = iter(gunicorn.stderr or ())
    with contextlib.suppress(OSError):  # the terminal is gone
        for line in lines:
            console.out(line.rstrip("\n"), highlight=False)
    for _ in lines:  # a full pipe would block Gunicorn
        pass


def _show_boot(gunicorn: subprocess.Popen[str], console: Console, settings: Settings, *, show: bool) -> None:
    """Draw a bar for each worker until the service is ready, and say how to try it."""
    ops = Address.parse(settings.ops_bind)
    found: dict[str, Any] | None = None
    with SlotBars(console, "arbiter", "importing") as bars:
        while gunicorn.poll() is None and not (found and found["fleet"]["ready"]):
            answer = ask(ops, "/status")
            if answer is not None and is_status(answer):
                found = answer
                if show:
                    show_page(ops, console)
                    show = False
                bars.say(found["fleet"]["verdict"], done=True)
                bars.draw(found["slots"])
            time.sleep(POLL_S)
    if gunicorn.poll() is None and found is not None:
        console.print(f"[green]ready[/]: {escape(found['fleet']['detail'])}", highlight=False)
        console.print(
            f"  curl -s {url(settings.bind)}/embed -d '[\"hello\"]' -H 'content-type: application/json'"
        )
        console.print(f"  status, probes and metrics: {ops}")
