# SPDX-License-Identifier: Apache-2.0
"""The screen of `warmfleet top`, from what was seen of a service. Pure; command line.

Theory of operation. Totals never fall while a service lives, so the last documents of some seconds give every
rate: between the oldest and the newest of them. A restart empties the window.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.text import Text

from service.commands.figures import Figures, between, same_life
from service.commands.showing import (
    LEGEND,
    about,
    age,
    aligned,
    bar,
    budget,
    duration,
    number,
    plain,
    room_words,
    slots,
    verdict,
)
from service.lifecycle import State
from service.ops_client import nobody

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from service.commands.following import Seen
    from service.ops_client import Address

    Document = Mapping[str, Any]

WINDOW_S = 10.0
"""That rates and quantiles are of."""
STALE_S = 3.0
"""A live service is heard of every second."""
HISTORY = 240
"""Points of the graph."""
TICKS: Final = " ▁▂▃▄▅▆▇█"
BAR = 40
LEAST_SLOTS = 3
KEYS: Final = "q leaves"


@dataclass
class Watch:
    """What was seen so far.

    Attributes:
        address: of the service.
        document: the last one; None: nobody has ever answered.
        heard: when it came, by the clock of what is seen.
        answers: whether the last look found somebody.
        live: whether the last document came by the stream.
        window: the documents of the last seconds.
        history: texts a second, one point a second at most.
    """

    address: Address
    document: Document | None = None
    heard: float = 0.0
    answers: bool = True
    live: bool = False
    window: deque[Document] = field(default_factory=deque)
    history: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _point: Document | None = None

    def take(self, seen: Seen) -> None:
        """Take in one look."""
        self.answers = seen.document is not None
        if seen.document is None:
            return
        self.document, self.heard, self.live = seen.document, seen.at, seen.live
        if self.window and not same_life(self.window[-1], seen.document):
            self.window.clear()
            self._point = None
        self.window.append(seen.document)
        newest = seen.document["service"]["uptime_seconds"]
        while len(self.window) > 2 and newest - self.window[1]["service"]["uptime_seconds"] > WINDOW_S:  # noqa: PLR2004 - two documents make a rate
            self.window.popleft()
        self._plot(seen.document)

    @property
    def figures(self) -> Figures | None:
        """Return what happened within the window."""
        return between(self.window[0], self.window[-1]) if len(self.window) > 1 else None

    def _plot(self, document: Document) -> None:
        """Add a point to the graph, if a second has gone since the last one."""
        if self._point is None:
            self._point = document
        elif document["service"]["uptime_seconds"] - self._point["service"]["uptime_seconds"] >= 1:
            found = between(self._point, document)
            self._point = document
            if found:
                self.history.append(found.texts)


def screen(watch: Watch, now: float, width: int, height: int) -> RenderableType:
    """Return what fills a terminal of this size.

    Args:
        watch: what was seen.
        now: by the clock of what is seen.
        width: columns.
        height: lines.
    """
    document = watch.document
    if document is None:
        said = f"asking {watch.address}" if watch.answers else f"{nobody(watch.address)} Trying again."
        return Group(Text(said, style="yellow"), Text(KEYS, style="bright_black"))
    figures = watch.figures
    above = [heading(watch, now), verdict(document), Text(about(document), style="bright_black")]
    if document["service"].get("warning"):
        above.append(Text(plain(document["service"]["warning"]), style="yellow"))
    above += [Text(), *traffic(figures, watch.history, width), Text()]
    below = [Text(), *_stages(figures), Text(), *_memory(document, width)]
    between = workers(document["slots"], figures.by_slot if figures else {}, height - len(above) - len(below))
    return Group(*(_line(line, width) for line in (*above, *between, *below)))


def workers(rows: Sequence[Mapping[str, Any]], texts: Mapping[str, float], height: int) -> list[Text]:
    """Return the slots as lines, as many as there is room for, and how many there are besides."""
    shown = fit(rows, max(LEAST_SLOTS, height - 1))
    left = [row for row in rows if row not in shown]
    lines = slots(shown, texts)
    if left:
        calm = all(row["state"] == State.READY.label for row in left)
        what = "all of them ready" if calm else "for which the window is too low"
        lines.append(Text(f"and {len(left)} more slots, {what}", style="bright_black"))
    return lines


def heading(watch: Watch, now: float) -> Text:
    """Return whom this is about, and how fresh it is."""
    silent = now - watch.heard
    made = Text(f"warmfleet top {watch.address}  ", style="bold")
    if watch.answers and silent <= STALE_S:
        made.append("live" if watch.live else "polled", style="green" if watch.live else "yellow")
    else:
        made.append(f"nobody has answered for {age(silent)}; trying again", style="bold red")
    return made.append(f"  {KEYS}", style="bright_black")


def traffic(figures: Figures | None, history: Sequence[float], width: int) -> list[Text]:
    """Return two lines: what is served a second, and its graph."""
    if figures is None:
        return [Text("traffic: measuring", style="bright_black"), Text()]
    answers = ", ".join(f"{number(rate)} with {status}" for status, rate in figures.requests.items() if rate)
    parts = [f"{number(figures.texts)} texts/s", f"{number(figures.tokens)} tokens/s"]
    if figures.batch_texts is not None:
        parts.append(f"{number(figures.batches)} batches/s of {figures.batch_texts:.1f} texts")
    if figures.padding is not None:
        parts.append(f"{figures.padding:.0%} padding")
    made = Text("  ".join(parts), style="bold").append(f"  replies/s: {answers or 'none'}", style="default")
    if figures.refused:
        made.append(f"  {number(figures.refused)} requests/s are refused (429)", style="bold yellow")
    return [made, Text(spark(history, max(1, width - 20)), style="green")]


def spark(values: Sequence[float], width: int) -> str:
    """Return the last values as a graph of one line, with the highest of them beside it."""
    last = list(values)[-width:]
    top = max(last, default=0.0)
    if not top:
        return ""
    steps = len(TICKS) - 1
    return "".join(TICKS[math.ceil(value * steps / top)] for value in last) + f" ≤ {number(top)}/s"


def fit(rows: Sequence[Mapping[str, Any]], room: int) -> list[Mapping[str, Any]]:
    """Return as many rows as there is room for, in their order: those that are not ready before the rest."""
    if len(rows) <= room:
        return list(rows)
    ranked = sorted(rows, key=lambda row: row["state"] == State.READY.label)
    chosen = {row["slot"] for row in ranked[: max(1, room - 1)]}
    return [row for row in rows if row["slot"] in chosen]


def _line(text: Text, width: int) -> Text:
    """Return a text that takes one line, whatever it holds."""
    made = text.copy()
    made.truncate(max(1, width), overflow="ellipsis")
    made.no_wrap = True
    return made


def _stages(figures: Figures | None) -> list[Text]:
    """Return median and 99th percentile of each stage of a request."""
    heads = ("stage", "     p50", "     p99", "    mean", "requests")
    table = [[Text(head, style="bold") for head in heads]]
    for name, stage in (figures.stages if figures else {}).items():
        cells = (name, duration(stage.p50), duration(stage.p99), duration(stage.mean), str(stage.count))
        table.append([Text(cell, style="bold" if name == "total" else "") for cell in cells])
    return aligned(table, {1, 2, 3, 4})


def _memory(document: Document, width: int) -> list[Text]:
    """Return a bar for each memory, or why there is none yet."""
    rooms = document["budget"]["rooms"]
    names = max((len(room["name"]) for room in rooms), default=0)
    lines = [
        Text(f"{room['name']:{names}}  ")
        + bar(room, min(BAR, max(8, width // 3)))
        + Text(f"  {room_words(room)}")
        for room in rooms
    ]
    tail = f"{budget(document)}   {LEGEND}" if rooms else budget(document)
    return [*lines, Text(tail, style="bright_black")]
