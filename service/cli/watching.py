# SPDX-License-Identifier: Apache-2.0
"""Commands that look at a running service: `status`, `wait`, `top`, `bench`. Command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from service.cli.common import (
    TIMEOUT,
    AddressType,
    apply,
    ended_like_interrupted,
    examples,
    in_one_line,
    in_pod,
    of_ops,
)
from service.ops_client import Address


@click.command(
    epilog=examples(
        {
            "warmfleet status": "of the service on this host",
            "warmfleet status pod-7:9000": "of one somewhere else",
            "warmfleet status --json | jq .fleet": "as data: the document of /status",
            "warmfleet status --kubectl deploy/warmfleet": "of one in a cluster",
        }
    )
)
@of_ops
@in_pod
@click.option("--json", "as_json", is_flag=True, help="Print the status document, docs/api.md.")
def status(address: Address, *, as_json: bool) -> None:
    """Say how a running service is: the verdict, each worker, the budget, what was served.

    Exit codes: 0 ready, 1 not ready, 2 the command line is wrong, 3 nobody answers.
    """
    from service.commands.status import console_for, show
    from service.ops_client import look

    with in_one_line():
        document = look(address)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        show(document, console_for(sys.stdout))
    sys.exit(0 if document["fleet"]["ready"] else 1)


@click.command(
    epilog=examples(
        {
            "warmfleet wait && run-my-tests": "once it is ready",
            "warmfleet wait --timeout 60 localhost:9000": "a minute at most",
            "warmfleet wait --timeout 0": "just ask",
        }
    )
)
@of_ops
@in_pod
@TIMEOUT
def wait(address: Address, timeout: float) -> None:
    """Wait until a service is ready, has failed for good, or the time is over; also for one not yet started.

    On a terminal it shows a bar for each worker, elsewhere a line for each step of the fleet on stderr.

    Exit codes: 0 ready, 1 not ready in time, 2 the command line is wrong, 3 nobody answered in time,
    4 it has failed or ended.
    """
    from service.commands import waiting
    from service.commands.following import follow
    from service.commands.status import console_for

    with ended_like_interrupted(), waiting.telling(console_for(sys.stderr), address) as tell:
        outcome = waiting.wait(follow(address), address, timeout, tell)
    click.echo(outcome.text if outcome.code == 0 else f"warmfleet: {outcome.text}", err=outcome.code != 0)
    sys.exit(outcome.code)


@click.command(
    epilog=examples(
        {
            "warmfleet top": "the service on this host",
            "warmfleet top http://pod-7:9000": "one somewhere else",
            "warmfleet top --kubectl deploy/warmfleet": "one in a cluster",
        }
    )
)
@of_ops
@in_pod
def top(address: Address) -> None:
    """Watch a service live: verdict, traffic, latencies, memory and every worker. `q` or Ctrl-C leaves.

    It may be started before the service, and stays while that goes away and comes back.

    Exit codes: 0 left, 2 the command line is wrong, or this is no terminal.
    """
    from service.commands.top import NoTerminalError
    from service.commands.top import top as watch

    try:
        with ended_like_interrupted():
            watch(address)
    except NoTerminalError as error:
        raise click.UsageError(str(error)) from None


@click.command(
    epilog=examples(
        {
            "warmfleet bench": "ten seconds, eight clients, one text a request",
            "warmfleet bench --clients 64 --texts 32 --seconds 30": "as much as it takes",
            "warmfleet bench http://pod-7:8000 --html report.html": "one somewhere else, with plots",
        }
    )
)
@click.argument("address", metavar="[API]", type=AddressType(), required=False)
@click.option(
    "--seconds", type=click.FloatRange(0.1, 600), default=10.0, show_default=True, help="How long to send."
)
@click.option(
    "--clients", type=click.IntRange(1, 1024), default=8, show_default=True, help="Connections at once."
)
@click.option(
    "--texts", type=click.IntRange(1, 1024), default=1, show_default=True, help="Texts of a request."
)
@click.option("--words", type=click.IntRange(1, 2000), default=16, show_default=True, help="Words of a text.")
@click.option(
    "--json", "as_json", type=click.Path(dir_okay=False, path_type=Path), help="Save the figures here."
)
@click.option(
    "--html", "as_html", type=click.Path(dir_okay=False, path_type=Path), help="Save a page with plots here."
)
def bench(
    *,
    address: Address | None,
    seconds: float,
    clients: int,
    texts: int,
    words: int,
    as_json: Path | None,
    as_html: Path | None,
) -> None:
    """Put a quick load on a running service: latencies, a histogram, and where the time went.

    Each client sends a request, waits for the reply, and sends the next. API is the listener of the API;
    default: WARMFLEET_BIND, or else 127.0.0.1:8000. A key is read as the service does, from
    WARMFLEET_API_KEY or WARMFLEET_API_KEY_FILE. Ctrl-C ends it early.

    Exit codes: 0 every request was answered with vectors, 1 some were not, 2 the command line is wrong,
    3 nobody answers.
    """
    from service.commands import bench as benchmark
    from service.commands.bench_text import show
    from service.commands.load import Work
    from service.commands.status import console_for
    from service.security import keys_of

    settings = apply({})
    if address is None and settings.bind.startswith("unix:"):
        raise click.UsageError(
            f"the API listens on {settings.bind}; bench speaks TCP, so name another address"
        )
    with in_one_line():
        found = benchmark.bench(
            address or Address.parse(settings.bind),
            Work(seconds, clients, texts, words),
            next(iter(keys_of(settings)), None),
            console_for(sys.stderr),
        )
        show(found, console_for(sys.stdout))
        benchmark.save(found, as_json=as_json, as_html=as_html)
    sys.exit(0 if found.clean else 1)


COMMANDS = (status, wait, top, bench)
