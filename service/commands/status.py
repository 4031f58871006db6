# SPDX-License-Identifier: Apache-2.0
"""`warmfleet status`: how a running service is, once. Command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from service.commands.showing import about, budget, number, plain, slots, verdict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TextIO

    Document = Mapping[str, Any]

WIDTH = 160
"""Columns where there is no terminal to ask."""


def console_for(stream: TextIO) -> Console:
    """Return a console that colours what goes to a terminal, and cuts and wraps nothing elsewhere."""
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)


def show(document: Document, console: Console) -> None:
    """Print the document for people: the verdict, what is served, a row for each slot, budget and totals."""
    lines = [verdict(document), Text(about(document)), Text(), *slots(document["slots"]), Text()]
    if document["service"].get("warning"):
        lines.insert(1, Text(plain(document["service"]["warning"]), style="yellow"))
    for line in [*lines, Text(f"budget: {budget(document)}"), Text(totals(document))]:
        console.print(line, soft_wrap=True)


def totals(document: Document) -> str:
    """Return what was served since the start, in a sentence."""
    found = document["totals"]
    answers = ", ".join(
        f"{number(count)} with {status}" for status, count in sorted(found["requests"].items())
    )
    return f"since the start: {number(found['texts'])} texts, requests answered: {answers or 'none yet'}"
