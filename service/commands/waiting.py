# SPDX-License-Identifier: Apache-2.0
"""`warmfleet wait`: until a service is ready, has failed, or the time is over. Command line."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from service.bars import SlotBars
from service.commands.control import is_arbiter
from service.commands.showing import plain, remark
from service.ops_client import nobody

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from rich.console import Console

    from service.commands.following import Seen
    from service.ops_client import Address

    Document = Mapping[str, Any]
    Tell = Callable[[Document | None], None]

READY: Final = 0
TOO_LATE: Final = 1
NOBODY: Final = 3
FAILED: Final = 4


@dataclass(frozen=True)
class Outcome:
    """How the waiting ended: the exit code, and a sentence."""

    code: int
    text: str


def ended_here(document: Document) -> bool:
    """Whether the arbiter is known to have ended: it was a process of this machine, and is none now."""
    service = document["service"]
    return bool(service["host"] == socket.gethostname()) and not is_arbiter(service["arbiter_pid"])


def wait(
    seen: Iterable[Seen],
    address: Address,
    timeout_s: float,
    tell: Tell,
    *,
    clock: Callable[[], float] = time.monotonic,
    has_ended: Callable[[Document], bool] = ended_here,
) -> Outcome:
    """Return as soon as it is decided.

    Args:
        seen: what is seen of the service, for ever.
        address: of the service, for the sentence.
        timeout_s: seconds to wait at most; 0: one look.
        tell: is told of everything seen.
        clock: that `seen` has its times of.
        has_ended: whether the service of a document runs no more, as far as can be known.
    """
    end = clock() + timeout_s
    last: Document | None = None
    document: Document | None = None
    for one in seen:
        document = one.document
        tell(document)
        if document is not None:
            last = document
            if document["fleet"]["ready"]:
                return Outcome(READY, document["fleet"]["verdict"])
            if document["fleet"]["status"] == "failed":
                return Outcome(FAILED, why_failed(document))
        elif last and not last["service"]["stopping"] and has_ended(last):
            return Outcome(FAILED, f"the service has ended before it was ready; {why_failed(last)}")
        if one.at >= end:
            break
    if last is None:
        return Outcome(NOBODY, nobody(address))
    late = f"not ready after {timeout_s:g} s"
    return Outcome(TOO_LATE, f"{late}: {last['fleet']['verdict'] if document else 'nobody answers any more'}")


def why_failed(document: Document) -> str:
    """Return the verdict, and what the slots say of their last errors."""
    errors = [
        f"slot {row['slot']}: {remark({'last_error': row['last_error']})}"
        for row in document["slots"]
        if row.get("last_error")
    ]
    return "; ".join([document["fleet"]["verdict"], *errors[:1]])


# ---------------------------------------------------------------------------------------------
# What is shown meanwhile


@contextlib.contextmanager
def telling(console: Console, address: Address) -> Iterator[Tell]:
    """Show what is seen: bars on a terminal, else a line for each step of the fleet."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield partial(_tell_in_lines, console, address, [])
        return
    with SlotBars(console, "fleet", f"asking {address}") as bars:

        def draw(document: Document | None) -> None:
            bars.say(nobody(address) if document is None else document["fleet"]["verdict"])
            bars.draw([] if document is None else document["slots"])

        yield draw


def _tell_in_lines(console: Console, address: Address, said: list[Any], document: Document | None) -> None:
    """Print the verdict when another worker is ready, or the status is another one."""
    fleet = document["fleet"] if document else {}
    step = (fleet.get("status"), fleet.get("ready_workers"), fleet.get("target_workers"))
    if said != [step] and not fleet.get("ready"):
        verdict = plain(fleet.get("verdict", f"nobody answers on {address}"))
        console.print(verdict, markup=False, soft_wrap=True)
    said[:] = [step]
