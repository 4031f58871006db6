# SPDX-License-Identifier: Apache-2.0
"""`warmfleet plan` for people: a table, bars, sentences. Pure; command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.table import Table

from service.budget import size
from service.commands.forecast import Bar, Row, fits_in, parts_of
from service.commands.scouting import Scouted

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 40
FILLS: Final = {"others": "░", "shared": "▒", "workers": "█", "free": "·", "kept": " "}
LEGEND: Final = "░ others   ▒ shared by all workers   █ workers   · free for workers   blank: kept free"
HEADS: Final = {"device": "a GPU", "host": "the host", "cores": "the cores", "max_workers": "max_workers"}


def table(rows: Sequence[Row]) -> Table:
    """Return what each combination costs, and how many workers of it fit."""
    parts = list(dict.fromkeys(name for row in rows for name in parts_of(row)))
    kinds = list(dict.fromkeys(name for row in rows for name in fits_in(row)))
    made = Table(title="what a worker takes, and how many fit", title_justify="left")
    made.add_column("dtype")
    made.add_column("batch tokens", justify="right")
    for name in parts:
        made.add_column(name, justify="right")
    for name in kinds:
        made.add_column(HEADS[name], justify="right")
    made.add_column("workers", justify="right")
    made.add_column("because of")
    notes = any(row.note for row in rows)
    if notes:
        made.add_column("note", overflow="fold")
    for row in rows:
        made.add_row(*cells(row, parts, kinds), *([row.note] if notes else []))
    return made


def cells(row: Row, parts: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """Return the cells of one combination; what did not boot has dashes."""
    costs, fits = parts_of(row), fits_in(row)
    dtype, tokens = row.asked.dtype, row.asked.max_batch_tokens
    if isinstance(row.scouted, Scouted):
        dtype, tokens = row.scouted.dtype, row.scouted.max_batch_tokens
    total, binding = (str(row.plan.fits), row.plan.binding) if row.plan else ("-", "")
    return [
        dtype,
        str(tokens or "default"),
        *(costs.get(name, "-") for name in parts),
        *(fits.get(name, "-") for name in kinds),
        total,
        binding,
    ]


def chart(memories: Sequence[Bar]) -> str:
    """Return a bar for each memory, in characters that differ without colour, and what they mean."""
    widest = max(len(bar.name) for bar in memories)
    lines = [f"{bar.name:<{widest}} |{fill(bar)}| {claim(bar)}" for bar in memories]
    return "\n".join([*lines, LEGEND])


def claim(bar: Bar) -> str:
    """Say how much of a memory is used."""
    used = bar.others + bar.shared + bar.workers
    return f"{size(used)} of {size(bar.total)}" + (", MORE THAN THERE IS" if used > bar.total else "")


def fill(bar: Bar, width: int = WIDTH) -> str:
    """Return the parts of a memory as so many characters, each part rounded where it ends."""
    parts = {name: getattr(bar, name) for name in FILLS}
    whole = max(1, bar.total, sum(parts.values()))
    text, end = "", 0
    for name, count in parts.items():
        end += count
        text += FILLS[name] * (round(width * end / whole) - len(text))
    return text.ljust(width)
