# SPDX-License-Identifier: Apache-2.0
"""The results of `warmfleet bench` for a terminal. Pure; command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.table import Table
from rich.text import Text

from service.commands.showing import duration, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from service.commands.results import Bucket, Results

BAR = 40
WORDS: Final = {"lost": "lost"}
EIGHTHS: Final = " ▏▎▍▌▋▊▉"


def show(results: Results, console: Console) -> None:
    """Print everything, the remarks last."""
    for line in summary(results):
        console.print(line, markup=False)
    if results.latency:
        console.print()
        console.print(percentiles(results))
        console.print()
        console.print(chart(results.histogram))
    if results.server:
        console.print()
        console.print(server(results), markup=False)
    for remark in results.remarks:
        console.print(f"! {remark}", style="yellow", markup=False)


def summary(results: Results) -> list[str]:
    """Return what was asked, and what was answered."""
    rates = f"{number(results.texts_per_second)} texts/s, {number(results.requests_per_second)} requests/s"
    counts = (
        ", ".join(
            f"{count} {WORDS.get(status, f'with {status}')}" for status, count in results.statuses.items()
        )
        or "none"
    )
    return [f"{results.target}: {what(results)}", f"{rates}; replies: {counts}"]


def what(results: Results) -> str:
    """Return what was asked."""
    asked = results.asked
    clients = "1 client" if asked["clients"] == 1 else f"{asked['clients']:g} clients"
    texts = "1 text" if asked["texts"] == 1 else f"{asked['texts']:g} texts"
    return f"{clients} for {results.seconds:.1f} s, {texts} of {asked['words']:g} words in a request"


def percentiles(results: Results) -> Table:
    """Return the latencies in two lines."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    made.add_column("latency")
    for name in results.latency:
        made.add_column(name, justify="right", no_wrap=True)
    made.add_row("", *(duration(value) for value in results.latency.values()))
    return made


def chart(buckets: Sequence[Bucket]) -> Text:
    """Return the histogram, a line for each bucket."""
    most = max(bucket.count for bucket in buckets)
    total = sum(bucket.count for bucket in buckets)
    made = Text()
    for bucket in buckets:
        drawn = f"{bar(bucket.count / most):{BAR}}  {bucket.count} ({bucket.count / total:.1%})"
        made.append(f"≤ {duration(bucket.high):>8}  {drawn}\n")
    made.right_crop(1)
    return made


def bar(share: float, width: int = BAR) -> str:
    """Return a bar of a share, to an eighth of a column; what is not nothing can be seen."""
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def server(results: Results) -> str:
    """Return where the mean time went, by the service's own account."""
    mean = results.latency["mean"]
    within = sum(results.server.values())
    parts = ", ".join(f"{name} {duration(value)}" for name, value in results.server.items())
    share = f"{duration(within)}, {within / mean:.0%}"
    return f"of {duration(mean)} on average the service itself takes {share}: {parts}"
