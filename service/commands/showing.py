# SPDX-License-Identifier: Apache-2.0
"""Parts of the status document for a terminal: verdict, slots, memory. Pure; command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from service.budget import size
from service.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

    Document = Mapping[str, Any]
    Row = Mapping[str, Any]

COLOURS: Final = {
    "ready": "green",
    "starting": "yellow",
    "degraded": "yellow",
    "failed": "red",
    "backoff": "red",
    "draining": "blue",
    "empty": "bright_black",
}
"""Of states and of the fleet's status; what is not listed is under way, as `starting`."""
FILLS: Final = {"others": ("░", "bright_black"), "shared": ("▒", "cyan"), "workers": ("█", "green")}
FREE: Final = ("·", "bright_black")
LEGEND: Final = "░ others  ▒ shared by the workers  █ workers  · free  blank: kept free"
MINUTE, HOUR, DAY = 60, 3600, 86400
GAP: Final = "  "
PLACE = 6
"""Of the column of texts a second: behind the load."""
TROUBLED: Final = (State.FAILED.label, State.BACKOFF.label)


def colour(state: str) -> str:
    """Return the colour of a state."""
    return COLOURS.get(state, COLOURS["starting"])


def age(seconds: float | None) -> str:
    """Return a span of time in two units at most: `3.2 s`, `42 s`, `5m 12s`, `3h 4m`, `2d 1h`."""
    if seconds is None:
        return "-"
    if seconds < MINUTE:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"  # noqa: PLR2004 - digits that matter
    whole = int(seconds)
    if whole < HOUR:
        return f"{whole // MINUTE}m {whole % MINUTE}s"
    if whole < DAY:
        return f"{whole // HOUR}h {whole % HOUR // MINUTE}m"
    return f"{whole // DAY}d {whole % DAY // HOUR}h"


def duration(seconds: float | None) -> str:
    """Return what a request waits: `420 µs`, `3.1 ms`, `1.25 s`."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:  # noqa: PLR2004 - a millisecond
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms"  # noqa: PLR2004 - three digits
    return f"{seconds:.2f} s"


def number(count: float) -> str:
    """Return a rate with the digits that matter: `0.25`, `12`, `1 530`, `2.4 M`."""
    if count >= 1e6:  # noqa: PLR2004 - a million
        return f"{count / 1e6:.1f} M"
    if count >= 10 or count == int(count):  # noqa: PLR2004 - digits that matter
        return f"{count:,.0f}".replace(",", " ")
    return f"{count:.2f}"


def plain(text: str) -> str:
    """Return a text of the service as one line without control characters: it goes to somebody's terminal."""
    return "".join(mark if mark.isprintable() else " " for mark in text)


def verdict(document: Document) -> Text:
    """Return the sentence that says how the fleet is."""
    fleet = document["fleet"]
    return Text(plain(fleet["verdict"]), style=f"bold {colour(fleet['status'])}")


def about(document: Document) -> str:
    """Return what is served, by what, and for how long."""
    service = document["service"]
    revision = f" at {service['revision']}" if service.get("revision") else ""
    return plain(
        f"{service['model']}{revision} · {service['backend']} on {service['device']} · "
        f"up {age(service['uptime_seconds'])} · arbiter {service['arbiter_pid']} on {service['host']} · "
        f"API {service['api']}"
    )


def memory(row: Row) -> str:
    """Return what a worker has: of its device, and of the host."""
    found = row.get("memory_bytes") or {}
    host = found.get("uss") or found.get("rss") or 0
    device = (found.get("device_reserved") or 0) + (found.get("device_context") or 0)
    parts = [size(device)] * bool(device) + [f"{size(host)}{' host' * bool(device)}"] * bool(host)
    return " + ".join(parts) or "-"


def failures(row: Row) -> str:
    """Return how often the slot's workers have ended unasked, by reason."""
    reasons = {reason: count for reason, count in (row.get("failures_by_reason") or {}).items() if count}
    total = max(sum(reasons.values()), row.get("failures") or 0)
    named = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return named or str(total)


def remark(row: Row) -> str:
    """Return what a slot is doing, or what its last error was."""
    parts = []
    if row.get("retry_in_seconds") is not None:
        parts.append(f"tries again in {age(max(0.0, row['retry_in_seconds']))}")
    if row.get("doing"):
        parts.append(str(row["doing"]))
    if row.get("eta_seconds") is not None:
        parts.append(f"{age(row['eta_seconds'])} left")
    if row.get("last_error"):
        parts.append(f"last error while {row['last_error']['state']}: {row['last_error']['text']}")
    return plain(", ".join(parts))


def state(row: Row) -> Text:
    """Return the state of a slot in its colour, with how far it is."""
    label = row["state"]
    share = f" {row['progress']:.0%}" if label == State.WARMING.label else ""
    return Text(label + share, style=colour(label))


def slots(rows: Sequence[Row], texts: Mapping[str, float] | None = None) -> list[Text]:
    """Return a line of heads and one for each slot; with `texts`, a column of texts a second by slot."""
    heads = ["slot", "state", "age", "device", "gen", "load", "memory", "failures", "doing, last error"]
    right = {"slot", "gen", "load", "texts/s", "memory"}
    table = [[Text(head, style="bold") for head in heads]]
    for row in rows:
        style = "red" if row["state"] in TROUBLED else "bright_black"
        line = [
            Text(str(row["slot"])),
            state(row),
            Text(age(row["seconds_in_state"])),
            Text(plain(row["device"] or "-")),
            Text(str(row["generation"])),
            Text(str(row["load"])),
            Text(memory(row)),
            Text(failures(row)),
            Text(remark(row), style=style),
        ]
        table.append(line)
    if texts is not None:
        rates = [number(texts.get(str(row["slot"]), 0.0)) for row in rows]
        heads.insert(PLACE, "texts/s")
        for line, rate in zip(table, [Text("texts/s", style="bold"), *map(Text, rates)], strict=True):
            line.insert(PLACE, rate)
    return aligned(table, {nth for nth, head in enumerate(heads) if head in right})


def aligned(table: Sequence[Sequence[Text]], right: AbstractSet[int]) -> list[Text]:
    """Return the rows as lines with columns; nothing is cut, and nothing follows the last column.

    Args:
        table: rows of as many cells.
        right: columns that end, rather than begin, at one place.
    """
    widths = [max(cell.cell_len for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        made = Text()
        for nth, (cell, width) in enumerate(zip(row, widths, strict=True)):
            gap = Text(" " * (width - cell.cell_len))
            made += gap + cell if nth in right else cell + gap
            made.append(GAP)
        made.rstrip()
        lines.append(made)
    return lines


def budget(document: Document) -> str:
    """Return the sum's result: how many workers fit, and what allows no more."""
    lines = document["budget"]["text"]
    return lines[-1] if lines else ""


def bar(room: Mapping[str, Any], width: int) -> Text:
    """Return a memory as a bar: others, shared, workers, what is free, and what is kept free."""
    total = max(1, room["total_bytes"])
    used = {
        "others": room["others_bytes"] or 0,
        "shared": room["shared_bytes"] or 0,
        "workers": sum(worker["bytes"] for worker in room["workers"]),
    }
    made, taken, filled = Text(), 0, 0
    for kind, (mark, style) in FILLS.items():
        taken += used[kind]
        end = min(width, round(width * taken / total))
        made.append(mark * (end - filled), style=style)
        filled = max(filled, end)
    limit = min(width, round(width * (room["limit_bytes"] or total) / total))
    made.append(FREE[0] * (limit - filled), style=FREE[1])
    return made + Text(" " * (width - max(limit, filled)))


def room_words(room: Mapping[str, Any]) -> str:
    """Return a memory in words: what is used, and what one more worker needs."""
    used = (
        (room["others_bytes"] or 0)
        + (room["shared_bytes"] or 0)
        + sum(worker["bytes"] for worker in room["workers"])
    )
    text = f"{size(used)} of {size(room['total_bytes'])}"
    further = room.get("next_worker")
    if further:
        fits = "fits" if further["fits"] else "does not fit"
        text += f" · one more needs {size(further['bytes'])}: {fits}"
    return text
