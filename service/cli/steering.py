# SPDX-License-Identifier: Apache-2.0
"""Commands that tell a running service something: `scale`, `roll`. Command line."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from service.cli.common import TIMEOUT, ended_like_interrupted, examples, in_one_line, in_pod, of_ops
from service.settings import MOST_WORKERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.commands.control import Tell
    from service.ops_client import Address


@click.command(
    epilog=examples(
        {
            "warmfleet scale 4": "four workers on this host",
            "warmfleet scale 4 --wait": "and wait until four are ready",
            "warmfleet scale 4 --kubectl pod/warmfleet-0": "of one pod; replicas are kubectl's",
        }
    )
)
@click.argument("workers", type=click.IntRange(1, MOST_WORKERS))
@of_ops
@in_pod
@click.option("--wait", "waits", is_flag=True, help="Wait until that many are ready, and no others are left.")
@TIMEOUT
def scale(address: Address, workers: int, timeout: float, *, waits: bool) -> None:
    """Make a service that runs on this host keep that many WORKERS, as far as its budget allows.

    Exit codes: 0 it does, 1 it keeps another number, cannot be told or ended meanwhile,
    2 the command line is wrong, 3 nobody answers.
    """
    from service.commands import control, settling

    with in_one_line():
        service = control.find(address)
        done = control.scale(service, workers)
        click.echo(done)
        if waits and done.done:
            with ended_like_interrupted(), _shown(f"{workers} workers") as tell:
                settling.wait_scaled(service, workers, timeout, tell)
            click.echo(f"{workers} workers are ready")
    sys.exit(0 if done.done else 1)


@click.command(
    epilog=examples(
        {
            "warmfleet roll": "begin, and return at once",
            "warmfleet roll --wait --timeout 120": "until every worker is a fresh one",
            "warmfleet roll --wait --kubectl pod/warmfleet-0": "in a cluster",
        }
    )
)
@of_ops
@in_pod
@click.option("--wait", "waits", is_flag=True, help="Wait until every worker is a fresh one, and ready.")
@TIMEOUT
def roll(address: Address, timeout: float, *, waits: bool) -> None:
    """Replace each worker of a service that runs on this host, one by one, without losing a request.

    Exit codes: 0 done (without --wait: begun), 1 it cannot be told, ended meanwhile or was not over in time,
    2 the command line is wrong, 3 nobody answers.
    """
    from service.commands import control, settling

    with in_one_line():
        service = control.find(address)
        epoch = control.roll(service)
        click.echo(f"rolling restart: epoch {epoch}")
        if waits:
            with ended_like_interrupted(), _shown(f"epoch {epoch}") as tell:
                found = settling.wait_rolled(service, epoch, timeout, tell)
            click.echo(f"{found['target']} workers are ready in epoch {epoch}")


@contextmanager
def _shown(title: str) -> Iterator[Tell]:
    """Show how far each worker is, on a terminal; elsewhere nothing."""
    from service.bars import SlotBars
    from service.commands.status import console_for

    console = console_for(sys.stderr)
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda _: None
        return
    with SlotBars(console, title) as bars:
        yield lambda payload: bars.draw(payload["workers"])


COMMANDS = (scale, roll)
