# SPDX-License-Identifier: Apache-2.0
"""`warmfleet serve` on a terminal: the log above, a bar for each worker below until the service is ready.

A parent process that runs Gunicorn, passes signals on and ends with its exit code.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from types import FrameType

    from service.settings import Settings

POLL_S = 0.2
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks our own listener, whatever `http_proxy` says."""
STEPS = {
    "empty": 0.0,
    "spawned": 0.02,
    "pinned": 0.04,
    "backoff": 0.05,
    "waiting": 0.05,
    "loading": 0.1,
    "warming": 0.3,
}
"""How far a state is on the bar; warming fills the rest by its own progress."""


def run_with_progress(command: list[str], settings: Settings) -> int:
    """Run Gunicorn below a progress display; return its exit code.

    A closed terminal sends HUP, which to Gunicorn would mean a reload; it is passed on as TERM.
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
            _show_boot(gunicorn, console, settings)
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


def _show_boot(gunicorn: subprocess.Popen[str], console: Console, settings: Settings) -> None:
    """Draw a bar for each worker until /ready says yes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[doing]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        arbiter = progress.add_task("arbiter", total=None, doing="importing")
        bars: dict[int, TaskID] = {}
        ready: dict[str, Any] | None = None
        while gunicorn.poll() is None and (ready is None or ready["status"] != "ready"):
            ready = _ask(settings)
            if ready is not None:
                progress.update(arbiter, total=1, completed=1, doing=ready["status"])
                for worker in ready["workers"]:
                    _draw(progress, bars, worker)
            time.sleep(POLL_S)
    if gunicorn.poll() is None and ready is not None:
        console.print(f"[green]ready[/]: {ready['detail']}")
        console.print(
            f"  curl -s {url(settings.bind)}/embed -d '[\"hello\"]' -H 'content-type: application/json'"
        )
        console.print(f"  status, probes and metrics: {url(settings.ops_bind)}")


def _draw(progress: Progress, bars: dict[int, TaskID], worker: dict[str, Any]) -> None:
    slot, state = worker["slot"], worker["state"]
    if slot not in bars:
        bars[slot] = progress.add_task(f"slot {slot}", total=1, doing="")
    done = STEPS.get(state, 1.0)
    if state == "warming":
        done += (1 - done) * worker["progress"]
    doing = worker["last_error"] if state in ("failed", "backoff") else worker["doing"]
    progress.update(bars[slot], completed=done, doing=f"{state} {doing or ''}"[:80])


def _ask(settings: Settings) -> dict[str, Any] | None:
    """Return the body of /ready, or None while nobody answers."""
    try:
        with DIRECT.open(url(settings.ops_bind) + "/ready", timeout=2) as reply:
            answer: dict[str, Any] = json.load(reply)
    except urllib.error.HTTPError as error:
        try:
            answer = json.load(error)
        except ValueError:
            return None
        return answer
    except (OSError, ValueError):
        return None
    else:
        return answer


def url(bind: str) -> str:
    """Return the address of a listener as a person on this machine would type it."""
    if bind.startswith("unix:"):
        return f"--unix-socket {bind.removeprefix('unix:')} http://localhost"
    host, _, port = bind.rpartition(":")
    return f"http://{'localhost' if host in ('0.0.0.0', '[::]', '127.0.0.1') else host}:{port}"  # noqa: S104 - compared
