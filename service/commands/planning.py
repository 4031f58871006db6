# SPDX-License-Identifier: Apache-2.0
"""`warmfleet plan`: boot one worker of each combination, and say how many of them fit. Command line."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from service import cpus, device, preflight
from service.budget import render
from service.commands.forecast import (
    NO_GPU,
    ForecastError,
    Machine,
    Row,
    as_json,
    bars,
    chosen,
    forecast,
    further,
)
from service.commands.helm_values import secrets, values, yaml
from service.commands.plan_text import chart, table
from service.commands.scouting import Combination, Failed, Scouted, scout
from service.errors import WarmfleetError
from service.slots import CPU

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from service.settings import Settings

    Show = Callable[[float, str], None]

WIDTH = 140
"""Columns where there is no terminal to ask."""


class PlanError(WarmfleetError):
    """The user's own combination cannot boot, and not for want of memory. Exit code 1."""


@dataclass(frozen=True)
class Sweep:
    """What to try beside the user's settings; empty: what the model suggests."""

    tokens: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()


def plan(command: Sequence[str], settings: Settings, machine: Machine, sweep: Sweep, *, data: bool) -> bool:
    """Measure, print, and return whether even one worker fits.

    Args:
        command: starts Gunicorn.
        settings: as the environment has them.
        machine: to plan for.
        sweep: what to try.
        data: print JSON, and nothing else to stdout.

    Raises:
        WarmfleetError: nothing could be measured.
    """
    preflight.check_temporary()
    cuda = device.discover(settings) != (CPU,)
    if not cuda and (machine.gpu_memory or machine.gpus):
        raise ForecastError(NO_GPU)
    found = measure(command, settings, sweep, cuda=cuda)
    longest = max((one.longest for one in found if isinstance(one, Scouted)), default=0)
    cores = cpus.available().cores
    rows = [forecast(one, machine, settings, cores, longest) for one in found]
    if data:
        print(json.dumps(report(settings, rows), indent=2))  # noqa: T201 - that is what was asked for
    else:
        show(settings, rows, Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False))
    return bool(rows[0].plan and rows[0].plan.fits)


def measure(
    command: Sequence[str], settings: Settings, sweep: Sweep, *, cuda: bool
) -> list[Scouted | Failed]:
    """Boot one combination after the other, the user's own first.

    Raises:
        PlanError: that one fails, and not for want of memory: then so would the others.
    """
    own = Combination(
        sweep.dtypes[0] if sweep.dtypes else settings.dtype,
        sweep.tokens[0] if sweep.tokens else settings.max_batch_tokens,
    )
    with _progress() as step:
        first = scout(command, own, step(own, 0))
        if isinstance(first, Failed) and not first.no_room:
            raise PlanError(first.problem)
        rest = further(first, sweep.tokens, sweep.dtypes, cuda=cuda)
        return [first, *(scout(command, one, step(one, len(rest))) for one in rest)]


@contextmanager
def _progress() -> Iterator[Callable[[Combination, int], Show]]:
    """Draw a bar for each boot where there is a terminal; yield what makes a bar's reporter."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[doing]}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bars: list[Any] = []

        def step(asked: Combination, further: int) -> Show:
            for done in bars:
                progress.update(done, completed=1, doing="measured")
                progress.stop_task(done)
            of = f" of {further + 1}" if further else ""
            name = f"{len(bars) + 1}{of}: {asked.dtype}, {asked.max_batch_tokens or 'default'} tokens a batch"
            bar = progress.add_task(name, total=1, doing="")
            bars.append(bar)
            return lambda share, doing: progress.update(bar, completed=share, doing=doing[:80])

        yield step


# ---------------------------------------------------------------------------------------------
# What is said


def report(settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    """Return all that is said, as data; the first combination is the user's own."""
    own = rows[0]
    told: dict[str, Any] = {"model": settings.model_id, "combinations": [as_json(row) for row in rows]}
    if own.entry is None or own.plan is None or isinstance(own.scouted, Failed):
        return told | {"workers": None, "text": [own.note], "memories": [], "values": None}
    workers, remark = chosen(settings, own.plan)
    return told | {
        "workers": workers,
        "text": [*render(own.plan).splitlines(), *([remark] if remark else [])],
        "memories": [asdict(bar) for bar in bars(own.entry, own.plan, workers)],
        "values": values(settings, own.scouted, own.entry, workers) if workers else None,
    }


def show(settings: Settings, rows: Sequence[Row], console: Console) -> None:
    """Print the same for people."""
    own = rows[0]
    console.print(table(rows))
    if own.entry is None or own.plan is None or isinstance(own.scouted, Failed):
        return
    workers, remark = chosen(settings, own.plan)
    told = [
        f"\nthe sum for {own.scouted.dtype}, {own.scouted.max_batch_tokens} tokens a batch:",
        *(f"  {line}" for line in [*render(own.plan).splitlines(), *([remark] if remark else [])]),
        f"\nmemory with {workers} workers at their worst batch:",
        chart(bars(own.entry, own.plan, workers)),
    ]
    if workers:
        chart_values = yaml(values(settings, own.scouted, own.entry, workers))
        told += [
            "\nvalues for the Helm chart (no CPU limit: it would stop workers amid a batch):",
            chart_values,
        ]
        told += [f"# {name}: from a Secret" for name in secrets(settings)]
    console.out("\n".join(told), highlight=False)
