# SPDX-License-Identifier: Apache-2.0
"""`warmfleet bench`: a quick, bounded load on a running service, and the files about it. Command line."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from service import __version__, cpus
from service.commands.bench_html import report
from service.commands.load import Log, Work, requests, run
from service.commands.results import conclude
from service.errors import WarmfleetError
from service.ops_client import DIRECT, UNREACHABLE, NoServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console

    from service.commands.results import Results
    from service.ops_client import Address

FIRST_S = 30.0
HINTS: Final = {
    401: "set WARMFLEET_API_KEY to a key of the service",
    404: "is it the API listener, not ops?",
    413: "fewer --texts fit a request",
}
SHOWN = 200
"""Characters of an error of the service."""


class BenchError(WarmfleetError):
    """The service does not do what is to be measured. Exit code 1."""


def bench(address: Address, work: Work, key: str | None, console: Console) -> Results:
    """Send, and return what came of it.

    Args:
        address: of the API.
        work: what is sent.
        key: API key, if the service wants one.
        console: where progress is shown, if it is a terminal.

    Raises:
        NoServiceError: nobody answers.
        BenchError: the first request is not answered with vectors.
    """
    wires = requests(address, work, key)
    _try(address, wires[0])
    when = datetime.now(UTC).isoformat(timespec="seconds")
    with _telling(console, work) as tell:
        log = run(address, wires, work, tell)
    return conclude(
        log,
        work,
        target=f"{address}/embed",
        local=address.local,
        cores=cpus.available().cores,
        when=when,
        version=__version__,
    )


def _try(address: Address, wire: bytes) -> None:
    """Send one request, so that what cannot work is told in a sentence instead of in statistics."""
    head, _, body = wire.partition(b"\r\n\r\n")
    lines = (line.partition(": ") for line in head.decode().split("\r\n")[1:])
    headers = {name: value for name, _, value in lines if name != "content-length"}
    request = urllib.request.Request(f"{address.url}/embed", body, headers)  # noqa: S310 - the scheme was checked
    try:
        with DIRECT.open(request, timeout=FIRST_S) as reply:
            reply.read()
    except urllib.error.HTTPError as error:
        with error:
            said = " ".join(error.read().decode(errors="replace").split())[:SHOWN]
        hint = f"; {HINTS[error.code]}" if error.code in HINTS else ""
        raise BenchError(f"{address}/embed answers {error.code}: {said}{hint}") from None
    except UNREACHABLE:
        raise NoServiceError(
            f"nobody answers on {address}; is the service running, and is that its API?"
        ) from None


def save(results: Results, *, as_json: Path | None, as_html: Path | None) -> None:
    """Write the files that were asked for.

    Raises:
        BenchError: one cannot be written.
    """
    if as_json is not None:
        _write(as_json, json.dumps(results.as_json(), indent=2) + "\n")
    if as_html is not None:
        _write(as_html, report(results))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from None


@contextmanager
def _telling(console: Console, work: Work) -> Iterator[Callable[[Log, float], None]]:
    """Show how far it is, on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("bench", total=work.seconds, rate="")

        def tell(log: Log, gone: float) -> None:
            rate = len(log.at) * work.texts / gone if gone else 0.0
            bars.update(task, completed=gone, rate=f"{rate:,.0f} texts/s; Ctrl-C ends it early")

        yield tell
