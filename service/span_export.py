# SPDX-License-Identifier: Apache-2.0
"""From event loop and model thread to a collector: a bounded queue, and a thread that empties it. Worker.

What was worked on leaves a `Visit` or a `Pass`, which takes a microsecond; spans are made of them here.
Nobody waits for the collector: what does not fit is dropped and counted.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from service import otlp
from service.logging import get
from service.metrics import SPAN_DROP_REASONS, SpanCounts
from service.otlp import Collector, ExportError
from service.settings import pairs
from service.tracing import begin_pass, span_of, spans_in, spans_of
from service.trail import Pass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.settings import Settings
    from service.tickets import Entry
    from service.tracing import Span, Value, Visit

LOG = get()
MOST_WAITING: Final = 4096
"""Requests and passes: some 4 MB, and seconds of a busy worker."""
BATCH: Final = 64
"""Requests and passes of one post: some 50 kB."""
EVERY_S: Final = 0.5
TRIES_AFTER_S: Final = (0.5, 1.0, 2.0)
TELL_EVERY_S: Final = 60.0
FULL, FAILED, STOPPED = SPAN_DROP_REASONS


class Spans:
    """Takes what is left behind, from any thread, and exports it.

    Attributes:
        ratio: share of the requests to trace of which no client has decided.
    """

    def __init__(
        self,
        collector: Collector,
        ratio: float,
        slot: int,
        counts: SpanCounts,
        *,
        where: str = "the collector",
    ) -> None:
        """Export to a collector, called `where` in the log; `start` begins."""
        self.ratio = ratio
        self._collector, self._slot, self._where = collector, slot, where
        self._exported, self._dropped = counts.exported, counts.dropped
        self._waiting: deque[Visit | Pass] = deque()
        self._wake, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._in_hand = self._lost = 0
        self._told = -TELL_EVERY_S
        self._failing = False

    @classmethod
    def of(cls, settings: Settings, slot: int) -> Spans | None:
        """Return a started exporter, or None where no endpoint is set."""
        endpoint, secret = settings.otlp_endpoint, settings.otlp_headers
        if endpoint is None:
            return None
        collector = Collector(endpoint, pairs(secret.get_secret_value()) if secret else {})
        made = cls(collector, settings.otlp_sample, slot, SpanCounts(slot), where=endpoint)
        made.start()
        return made

    def start(self) -> None:
        """Begin to export."""
        self._thread.start()

    # Any thread

    def leave(self, item: Visit | Pass) -> None:
        """Take what a request or a pass left behind, or drop it: nobody waits here."""
        waiting = len(self._waiting)
        if waiting >= MOST_WAITING:
            self._dropped(FULL, spans_in(item))
            return
        self._waiting.append(item)
        if waiting >= BATCH:
            self._wake.set()

    def passed(self, entries: Sequence[Entry], began: float, ended: float, error: Exception | None) -> None:
        """Model thread: a pass has ended; it is a span if one of its requests is traced."""
        owners = dict.fromkeys(entry.owner for entry in entries)
        journeys = [owner.trail.journey for owner in owners if owner.trail and owner.trail.journey]
        if journeys:
            told = {"texts": len(entries), "requests": len(owners)}
            tokens = sum(entry.length for entry in entries)
            name = type(error).__name__ if error else ""
            self.leave(begin_pass(journeys, began, ended, tokens=tokens, error=name, **told))

    def close(self, timeout_s: float) -> None:
        """Export what is there, for so long at most; the rest is dropped. Blocks."""
        self._ending.set()
        self._wake.set()
        self._thread.join(timeout_s)
        left = self._in_hand
        with suppress(IndexError):  # empty, by us or by a thread that is late
            while True:
                left += spans_in(self._waiting.popleft())
        if left:
            self._dropped(STOPPED, left)

    # Its own thread

    def _run(self) -> None:
        attributes = otlp.resource(self._slot)
        while True:
            self._wake.wait(EVERY_S)
            self._wake.clear()
            ending = self._ending.is_set()  # asked first: what is left before the end is exported
            while self._waiting:
                self._export(attributes)
            if ending:
                self._collector.close()
                return

    def _export(self, attributes: dict[str, Value]) -> None:
        """Send a batch, again if that may help; a failure is told, and nothing else."""
        items: list[Visit | Pass] = []
        with suppress(IndexError):  # `close` may have taken the rest
            while len(items) < BATCH:
                items.append(self._waiting.popleft())
        self._in_hand = sum(map(spans_in, items))  # before it takes time: `close` counts what is left
        spans: list[Span] = []
        for item in items:
            spans += [span_of(item)] if isinstance(item, Pass) else spans_of(item)
            time.sleep(0)  # lets the event loop in: Python would make it wait for five milliseconds
        try:
            self._send(otlp.encode(spans, attributes))
        except Exception as error:  # noqa: BLE001 - spans may be lost, this thread may not
            self._dropped(FAILED, len(spans))
            self._tell(str(error) if isinstance(error, ExportError) else repr(error), len(spans))
        else:
            self._exported(len(spans))
            if self._failing:
                self._failing = False
                LOG.info("spans are exported to %s again", self._where)
        self._in_hand = 0

    def _send(self, body: bytes) -> None:
        for pause in TRIES_AFTER_S:
            try:
                self._collector.send(body)
            except ExportError as error:
                if not error.again or self._ending.wait(pause):
                    raise
            else:
                return
        self._collector.send(body)

    def _tell(self, why: str, spans: int) -> None:
        """Say that spans are lost: at once, then once a minute."""
        self._failing = True
        self._lost += spans
        if time.monotonic() - self._told >= TELL_EVERY_S:
            self._told = time.monotonic()
            LOG.warning("%d spans could not be exported to %s: %s", self._lost, self._where, why)
            self._lost = 0
