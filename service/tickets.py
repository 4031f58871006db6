# SPDX-License-Identifier: Apache-2.0
"""What a request leaves in the queue: an entry for each text, one ticket that collects the rows. Worker."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.trail import TRAIL

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import numpy as np
    from numpy.typing import NDArray

    from service.backends.base import Encoding
    from service.errors import RequestError


WASTE = 2
"""A request may keep so many times the memory of its own token vectors."""


class Ticket:
    """A request's place in the queue: collects its rows, and tells when all are there.

    The model thread writes all but `abandoned` and `trail`, which are the event loop's.

    Attributes:
        rows: one array a text, in the order of the texts.
        began: when the first of its batches was launched, in seconds of `time.perf_counter`.
        ended: when the last of its rows came back.
        waiting: texts without a row.
        error: what made it fail.
        abandoned: nobody waits for it any more.
        trail: ids of the request, if it is one.
    """

    __slots__ = ("abandoned", "began", "ended", "error", "notify", "rows", "trail", "waiting")

    def __init__(self, texts: int, notify: Callable[[Ticket], None]) -> None:
        """Wait for the rows of so many texts; `notify` is called on the model thread, once."""
        self.rows: list[NDArray[np.float32] | None] = [None] * texts
        self.waiting = texts
        self.began = self.ended = 0.0
        self.error: RequestError | None = None
        self.abandoned = False
        self.trail = TRAIL.get()
        self.notify = notify

    @property
    def is_over(self) -> bool:
        """Whether it is complete, has failed, or its client left."""
        return self.abandoned or not self.waiting

    def fail(self, error: RequestError) -> None:
        """End the request with an error, unless it is over."""
        if not self.is_over:
            self.waiting = 0
            self.error = error
            self.notify(self)

    def receive(self, index: int, row: NDArray[np.float32]) -> None:
        """Keep the row of one text, unless the request is over; with the last one it is complete."""
        if self.is_over:
            return
        self.rows[index] = row
        self.waiting -= 1
        if not self.waiting:
            self.ended = time.perf_counter()
            self.notify(self)


@dataclass(frozen=True, slots=True)
class Entry:
    """One text in the queue."""

    encoding: Encoding
    owner: Ticket
    index: int
    group: Hashable
    token_vectors: bool

    @property
    def length(self) -> int:
        """Return its tokens."""
        return len(self.encoding)


def deliver(entries: list[Entry], rows: NDArray[np.float32]) -> None:
    """Hand each text its row, or, if the batch is of those, the vectors of its tokens."""
    if entries[0].token_vectors:
        _deliver_token_vectors(entries, rows)
        return
    for entry, row in zip(entries, rows, strict=True):
        entry.owner.receive(entry.index, row)


def _deliver_token_vectors(entries: list[Entry], rows: NDArray[np.float32]) -> None:
    """Copy the share of a small request: a view of it would keep the whole batch, which may be 100 MB."""
    shares: Counter[Ticket] = Counter()
    for entry in entries:
        shares[entry.owner] += entry.length
    start = 0
    for entry in entries:
        own = rows[start : start + entry.length]
        start += entry.length
        entry.owner.receive(entry.index, own.copy() if len(rows) > WASTE * shares[entry.owner] else own)


def alive(entries: list[Entry]) -> list[Entry]:
    """Return those whose request is not over."""
    return [entry for entry in entries if not entry.owner.is_over]


def halves(entries: list[Entry]) -> list[list[Entry]]:
    """Split by tokens; one text cannot be split."""
    if len(entries) == 1:
        return [entries]
    half, tokens, middle = sum(entry.length for entry in entries) / 2, 0, 0
    while middle < len(entries) - 1 and (not middle or tokens + entries[middle].length <= half):
        tokens += entries[middle].length
        middle += 1
    return [entries[:middle], entries[middle:]]


def by_request(entries: list[Entry]) -> list[list[Entry]]:
    """Split by request; within one request a wrong text fails the others too."""
    requests: dict[Ticket, list[Entry]] = {}
    for entry in entries:
        requests.setdefault(entry.owner, []).append(entry)
    return list(requests.values())
