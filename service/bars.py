# SPDX-License-Identifier: Apache-2.0
"""How far each worker's boot is, as bars on a terminal. Command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import Console

    Row = Mapping[str, Any]

STEPS: Final = {
    "empty": 0.0,
    "spawned": 0.02,
    "pinned": 0.04,
    "backoff": 0.05,
    "waiting": 0.05,
    "loading": 0.1,
    "warming": 0.3,
}
"""How far a state is on the bar; warming fills the rest by its own progress."""
TROUBLED: Final = ("failed", "backoff")
LONGEST = 80
"""Characters beside a bar."""


def stage_of(row: Row) -> tuple[float, str]:
    """Return how far a worker's boot is, 0 to 1, and what it does, from its row in any of our documents."""
    state = row["state"]
    done = STEPS.get(state, 1.0)
    if state == "warming":
        done += (1 - done) * row["progress"]
    doing = row.get("last_error") if state in TROUBLED else row.get("doing")
    if isinstance(doing, dict):
        doing = doing["text"]
    return done, f"{state} {doing or ''}".strip()


class SlotBars(Progress):
    """A bar for each slot, below a line in words; gone when it ends."""

    def __init__(self, console: Console, title: str, doing: str = "") -> None:
        """Begin with the line alone."""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[doing]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._title = self.add_task(title, total=None, doing=doing)
        self._bars: dict[int, TaskID] = {}

    def say(self, doing: str, *, done: bool = False) -> None:
        """Say how the whole of it is."""
        self.update(self._title, total=1 if done else None, completed=int(done), doing=_fit(doing))

    def draw(self, rows: Iterable[Row]) -> None:
        """Draw the slots as these rows have them; a slot without a row is no more."""
        found = {row["slot"]: row for row in rows}
        for slot in sorted(self._bars.keys() - found.keys()):
            self.remove_task(self._bars.pop(slot))
        for slot, row in sorted(found.items()):
            if slot not in self._bars:
                self._bars[slot] = self.add_task(f"slot {slot}", total=1, doing="")
            done, doing = stage_of(row)
            self.update(self._bars[slot], completed=done, doing=_fit(doing))


def _fit(text: str) -> str:
    return escape("".join(mark if mark.isprintable() else " " for mark in text)[:LONGEST])
