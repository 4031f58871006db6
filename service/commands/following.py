# SPDX-License-Identifier: Apache-2.0
"""Follow a service: its status document as often as there is news, or that nobody answers. Command line.

`/events` brings the documents; while there is no stream, `/status` is asked instead. A worker that leaves
ends its stream with `bye`, and the next connection finds another one.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from service.ops_client import UNREACHABLE, Address, ask, is_status, stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Document = Mapping[str, Any]

POLL_S = 0.5
"""Between two looks while there is no stream; half as much or half as much again, so that many spread."""
BROKEN: Final = (*UNREACHABLE, ValueError)


@dataclass(frozen=True)
class Seen:
    """What one look has found.

    Attributes:
        at: seconds of the clock.
        document: the status document; None: nobody answered.
        live: it came by the stream.
    """

    at: float
    document: Document | None
    live: bool = False


def follow(
    address: Address,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[Seen]:
    """Yield what is seen, for ever: at least every few seconds, also while nobody answers."""
    while True:
        try:
            for event in stream(address):
                if event.name == "status" and is_status(document := json.loads(event.data)):
                    yield Seen(clock(), document, live=True)
        except BROKEN:
            pass
        answer = ask(address, "/status")
        yield Seen(clock(), answer if is_status(answer) else None)
        sleep(POLL_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
