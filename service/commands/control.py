# SPDX-License-Identifier: Apache-2.0
"""`warmfleet scale` and `roll`: tell the arbiter of a running service, and see what it does. Command line.

Theory of operation. The ops listener says who the arbiter is and where it stands; signals tell it what to do,
one worker each. They reach processes of this machine only, so the answer is held against /proc first.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from service.errors import WarmfleetError
from service.ops_client import NoServiceError, ask, nobody

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from service.ops_client import Address

    Payload = Mapping[str, Any]
    Tell = Callable[[Payload], object]

MOVE_S = 10.0
"""Within which the arbiter obeys a signal; it looks once a second."""
POLL_S = 0.1
PROC: Final = Path("/proc")


class ControlError(WarmfleetError):
    """The service cannot be told anything from here. Exit code 1."""


@dataclass(frozen=True)
class Service:
    """A running service: how to look at it, and how to tell it something.

    Attributes:
        look: returns what `/workers` says; None while nobody answers.
        send: signals the arbiter.
        alive: whether the arbiter still runs.
        clock: seconds, for tests.
        sleep: likewise.
    """

    look: Callable[[], Payload | None]
    send: Callable[[int], None]
    alive: Callable[[], bool] = lambda: True
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep

    def until(
        self,
        condition: Callable[[Payload], bool],
        timeout_s: float,
        tell: Tell = lambda _: None,
    ) -> Payload | None:
        """Return the first answer that meets the condition; None when the time is over.

        Raises:
            ControlError: the service has ended.
        """
        end = self.clock() + timeout_s
        while True:
            found = self.look()
            if found is not None:
                tell(found)
                if condition(found):
                    return found
            elif not self.alive():
                raise ControlError("the service has ended meanwhile; its log says why")
            if self.clock() >= end:
                return None
            self.sleep(POLL_S)

    def state(self) -> Payload:
        """Return what `/workers` says, after a while if need be.

        Raises:
            ControlError: nobody answers.
        """
        found = self.until(lambda _: True, MOVE_S)
        if found is None:
            msg = f"the service has not answered for {MOVE_S:g} s"
            raise ControlError(msg)
        return found


def find(address: Address, root: Path = PROC) -> Service:
    """Return the service with this ops listener, once it is sure to be of this machine.

    Raises:
        NoServiceError: nobody answers.
        ControlError: somebody whose processes are not here.
    """
    payload = ask(address, "/workers")
    if payload is None or not isinstance(payload.get("arbiter_pid"), int):
        raise NoServiceError(nobody(address))
    pid: int = payload["arbiter_pid"]
    workers = [row["pid"] for row in payload["workers"] if row["pid"]]
    if not (is_arbiter(pid, root) and any(_parent(worker, root) == pid for worker in workers)):
        msg = (
            f"the service on {address} has its arbiter, process {pid}, on another host or in another "
            "container; run this there, or with --kubectl"
        )
        raise ControlError(msg)
    return Service(
        partial(ask, address, "/workers"), partial(send, pid), alive=partial(is_arbiter, pid, root)
    )


def is_arbiter(pid: int, root: Path = PROC) -> bool:
    """Whether a process of this machine runs and is a Gunicorn; which one, its number does not tell."""
    try:
        return b"gunicorn" in (root / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def _parent(pid: int, root: Path) -> int:
    try:
        fields = (root / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return int(fields.split()[1])
    except (OSError, ValueError, IndexError):  # gone meanwhile
        return 0


def send(pid: int, signum: int) -> None:
    """Signal the arbiter.

    Raises:
        ControlError: it is another user's, or gone.
    """
    try:
        os.kill(pid, signum)
    except PermissionError:
        msg = f"process {pid}, the arbiter, belongs to another user; run this as that user, or as root"
        raise ControlError(msg) from None
    except ProcessLookupError:
        msg = f"the arbiter, process {pid}, has ended"
        raise ControlError(msg) from None


# ---------------------------------------------------------------------------------------------
# scale


@dataclass(frozen=True)
class Scaled:
    """What came of a wish for so many workers.

    Attributes:
        before: workers that Gunicorn kept.
        after: workers that it keeps now.
        wanted: workers asked for.
        reason: why `after` is not `wanted`: lines, the first of which ends the sentence.
    """

    before: int
    after: int
    wanted: int
    reason: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether it is as wanted."""
        return self.after == self.wanted

    def __str__(self) -> str:
        """Say it."""
        if self.done and self.before == self.after:
            return f"{self.after} workers, as before"
        moved = f"{self.before} -> {self.after} workers"
        return (
            moved
            if self.done
            else "\n  ".join((f"{moved}, not {self.wanted}: {self.reason[0]}", *self.reason[1:]))
        )


def next_signal(target: int, planned: int, wanted: int) -> int | None:
    """Return the signal that leads towards the wanted number; None once it is reached, and will stay.

    A service that still grows to more than is wanted stays there only after one step back.
    """
    if target < wanted or target == wanted < planned:
        return signal.SIGTTIN
    return signal.SIGTTOU if target > wanted else None


def limit_of(payload: Payload) -> int | None:
    """Return how many workers the service will run at most; None if it is not known, or only advice."""
    budget = payload.get("budget", {})
    return budget.get("fits") if budget.get("policy") != "warn" else None


def scale(service: Service, wanted: int) -> Scaled:
    """Signal step by step until the target is the wanted number, or does not move any more."""
    payload = service.state()
    before = payload["target"]
    while True:
        target, budget = payload["target"], payload.get("budget", {})
        signum = next_signal(target, budget.get("planned", 0), wanted)
        if signum is None:
            return Scaled(before, target, wanted)
        limit = limit_of(payload)
        if signum == signal.SIGTTIN and limit is not None and target >= limit:
            return Scaled(before, target, wanted, ("the budget allows no more", *budget["text"]))
        service.send(signum)
        moved = service.until(partial(_has_moved, target), MOVE_S)
        if moved is None:
            stuck = f"the service took no more within {MOVE_S:g} s; its log says why"
            return Scaled(before, target, wanted, (stuck, *budget.get("text", ())))
        payload = moved


def _has_moved(before: int, payload: Payload) -> bool:
    return bool(payload["target"] != before)


# ---------------------------------------------------------------------------------------------
# roll


def roll(service: Service) -> int:
    """Declare a new epoch; return its number.

    Raises:
        ControlError: the service does not answer, or did not take it.
    """
    before = service.state()["roll_epoch"]
    service.send(signal.SIGHUP)
    found = service.until(lambda payload: payload["roll_epoch"] > before, MOVE_S)
    if found is None:
        msg = f"the arbiter began no rolling restart within {MOVE_S:g} s; its log may say why"
        raise ControlError(msg)
    epoch: int = found["roll_epoch"]
    return epoch
