# SPDX-License-Identifier: Apache-2.0
"""`warmfleet status`: how a running service is, once. Command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from service.commands.showing import about, budget, number, slots, verdict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TextIO

    Document = Mapping[str, Any]

WIDTH = 160
"""Columns where there is no terminal to ask."""


def console_for(stream: TextIO) -> Console:
    """Return a console that wraps at the terminal's width, or at ours where there is none."""
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False)


def show(document: Document, console: Console) -> None:
    """Print the document for people: the verdict, what is served, a row for each slot, budget and totals."""
    console.print(verdict(document))
    if document["service"].get("warning"):
        console.print(document["service"]["warning"], style="yellow", markup=False)
    console.print(about(document), markup=False)
    console.print()
    console.print(slots(document["slots"]))
    console.print()
    console.print(f"budget: {budget(document)}", markup=False)
    console.print(totals(document), markup=False)


def totals(document: Document) -> str:
    """Return what was served since the start, in a sentence."""
    found = document["totals"]
    answers = ", ".join(
        f"{number(count)} with {status}" for status, count in sorted(found["requests"].items())
    )
    return f"since the start: {number(found['texts'])} texts, requests answered: {answers or 'none yet'}"
