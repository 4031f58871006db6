# SPDX-License-Identifier: Apache-2.0
"""Boot the service once with one worker, and ask it what that took. Command line.

Theory of operation. What a worker takes depends on model, limits and machine, and nothing but a worker at its
worst batch tells. So the scout is the service itself with the user's settings, on ports and in folders of its
own, where the budget only warns. Whatever happens, its processes end with the look at it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from service.bars import stage_of
from service.ledger import Sum, parse
from service.ops_client import Address, ask
from service.settings import PREFIX, variables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

POLL_S = 0.1
STOP_S = 10.0
"""For an idle worker to end; then the group is killed."""
UNSET: Final = ("ready_quorum", "ready_floor", "max_workers", "api_key", "api_key_file")
"""Settings that one worker cannot meet, or that would keep us from asking."""
FIXED: Final = {
    "workers": "1",
    "budget_policy": "warn",
    "boot_attempts": "1",
    "skip_warmup": "false",
    "log_format": "json",
    "log_level": "warning",
}
NO_ROOM: Final = re.compile(r"out of memory|no room", re.IGNORECASE)
PREAMBLE: Final = re.compile(r"^no worker can become ready; stopping: |^slot \d+ failed while \w+: ")
KILLED: Final = "killed by SIGKILL, perhaps out of memory"


@dataclass(frozen=True)
class Combination:
    """What is tried; None: the service's own default."""

    dtype: str
    max_batch_tokens: int | None


@dataclass(frozen=True)
class Scouted:
    """A boot that worked.

    Attributes:
        asked: what was tried.
        entry: the sum with the worker's cost, of the machine as it is.
        dtype: that the model computes in.
        max_batch_tokens: that warm-up found room for.
        longest: tokens of the longest text; 0: unknown.
        ready_s: from the start to ready.
        stage_seconds: of the worker, by stage.
    """

    asked: Combination
    entry: Sum
    dtype: str
    max_batch_tokens: int
    longest: int
    ready_s: float
    stage_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A boot that did not work, and why in one sentence."""

    asked: Combination
    problem: str

    @property
    def no_room(self) -> bool:
        """Whether memory was what it lacked."""
        return bool(NO_ROOM.search(self.problem))


def environment(
    environ: Mapping[str, str], asked: Combination, binds: tuple[str, str], folder: Path
) -> dict[str, str]:
    """Return the environment of a scout: the user's, but for what must not meet the user's own service."""
    tokens = {} if asked.max_batch_tokens is None else {"max_batch_tokens": str(asked.max_batch_tokens)}
    places = {"bind": binds[0], "ops_bind": binds[1], "cache_dir": str(folder / "manifests")}
    chosen = FIXED | places | {"metrics_dir": str(folder / "metrics"), "dtype": asked.dtype} | tokens
    away = {variable for name in UNSET for variable in variables(name)}
    kept = {name: value for name, value in environ.items() if name not in away}
    ours = {PREFIX + name.upper(): value for name, value in chosen.items()}
    return kept | ours | {"TMPDIR": str(folder)}  # importing torch leaves a folder there


def scout(
    command: Sequence[str],
    asked: Combination,
    show: Callable[[float, str], None],
    environ: Mapping[str, str] | None = None,
) -> Scouted | Failed:
    """Boot the service, measure, and end it, whatever happens meanwhile.

    Args:
        command: starts Gunicorn.
        asked: what is tried.
        show: told again and again how far the boot is, 0 to 1, and what it does.
        environ: with the user's settings; default: this process's.
    """
    with tempfile.TemporaryDirectory(prefix="warmfleet-plan-", ignore_cleanup_errors=True) as name:
        folder, binds = Path(name), free_binds()
        log = folder / "log"
        environ = environment(os.environ if environ is None else environ, asked, binds, folder)
        began = time.monotonic()
        with log.open("wb") as stream:
            child = subprocess.Popen(  # noqa: S603 - our own arguments
                command, env=environ, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, process_group=0
            )
        try:
            answer = _wait(child, Address.parse(binds[1]), show)
            if answer is None:
                return Failed(asked, problem_of(log.read_text(errors="replace"), child.returncode))
            return measured(
                asked, answer, ask(Address.parse(binds[0]), "/info") or {}, time.monotonic() - began
            )
        finally:
            end(child)


def _wait(
    child: subprocess.Popen[bytes], ops: Address, show: Callable[[float, str], None]
) -> dict[str, Any] | None:
    """Return what `/workers` says once the worker is ready; None if the service ended before.

    There is no deadline here: load, warm-up and download have theirs, by setting.
    """
    show(0.0, "starting")
    while child.poll() is None:
        answer = ask(ops, "/ready")
        if answer is not None:
            if answer.get("status") == "ready" and (found := ask(ops, "/workers")) is not None:
                return found
            for worker in answer.get("workers", []):
                show(*stage_of(worker))
        time.sleep(POLL_S)
    return None


def measured(
    asked: Combination, answer: Mapping[str, Any], info: Mapping[str, Any], ready_s: float
) -> Scouted | Failed:
    """Return what `/workers` and `/info` say of a fleet of one."""
    entry = answer["budget"].get("sum")
    if entry is None:
        return Failed(asked, "the worker became ready, but did not measure itself")
    worker = answer["workers"][0]
    return Scouted(
        asked,
        parse(entry),
        info.get("model_dtype", asked.dtype),
        worker["max_batch_tokens"] or info.get("max_batch_tokens", 0),
        info.get("max_input_length", 0),
        ready_s,
        worker["stage_seconds"],
    )


def problem_of(log: str, code: int | None) -> str:
    """Return the one sentence in a log that says why the service ended.

    The last of our own errors; else of Gunicorn's; else the last line, which may be an exception's.
    """
    ours, others, last = "", "", ""
    for line in log.splitlines():
        last = line.strip() or last
        if line.startswith("warmfleet: "):
            ours = line.removeprefix("warmfleet: ")
        with contextlib.suppress(ValueError, TypeError, KeyError):  # not one of our records
            record = json.loads(line)
            if record["level"] in {"error", "critical"}:
                is_ours = record["logger"] == "warmfleet"
                ours, others = (record["message"], others) if is_ours else (ours, record["message"])
    if code == -signal.SIGKILL:  # nobody could write a line
        return ours or KILLED
    text = ours or others or last or f"the service ended with exit code {code} and no word"
    return PREAMBLE.sub("", text)


def free_binds() -> tuple[str, str]:
    """Return two addresses of this machine alone that are free now."""
    with socket.create_server(("127.0.0.1", 0)) as api, socket.create_server(("127.0.0.1", 0)) as ops:
        ports = [listener.getsockname()[1] for listener in (api, ops)]
    return f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"


def end(child: subprocess.Popen[bytes], patience_s: float = STOP_S) -> None:
    """Stop a Gunicorn that leads a process group; kill what is left of the group, at once if interrupted."""
    try:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
