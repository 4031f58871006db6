# SPDX-License-Identifier: Apache-2.0
"""The command line: starts, plans, checks and steers the service. A process of its own, above Gunicorn's."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import click

from service import __version__, lifecycle
from service.commands.options import DTYPES, SIZE, TOKENS, setting_options
from service.errors import WarmfleetError
from service.progress import run_with_progress
from service.settings import MOST_WORKERS, PREFIX, Settings, load_or_exit, table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
EXAMPLES = """
\b
Examples:
  warmfleet serve                                      the demo model on two workers
  warmfleet serve --model-id org/name --workers 4      a model from the hub
  warmfleet serve --backend stub --stub-forward-ms 20  no model: try the service itself
  warmfleet download --model-id org/name               fill the hub cache, and start nothing
  warmfleet plan --gpus 4 --gpu-memory 80GiB           how many workers would fit another machine
  warmfleet check                                      what a start would find, with nothing started
  warmfleet scale 4                                    a running service: four workers from now on
  warmfleet roll --wait                                a running service: a fresh process for each worker
"""


@click.group(epilog=EXAMPLES)
@click.version_option(__version__, prog_name="warmfleet")
def main() -> None:
    """Serve a sentence-transformers model from N warm Gunicorn workers."""


@setting_options
@main.command(epilog=EXAMPLES)
def serve(**given: Any) -> None:  # noqa: ANN401 - one per setting
    """Start the service; options override the environment's WARMFLEET_* variables.

    Exit codes: 0 stopped as asked, 1 a setting cannot work, 2 the command line is wrong,
    3 no worker could become ready.
    """
    settings = _apply(given)
    command = _gunicorn()
    if sys.stderr.isatty():
        sys.exit(run_with_progress(command, settings))
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 - the arbiter takes this process over, PID 1 or not


@setting_options
@main.command()
@click.option("--dtypes", type=DTYPES, help="Precisions to try, comma separated; the first is planned with.")
@click.option("--gpu-memory", type=SIZE, help="Memory of each GPU to plan for, such as 80GiB.")
@click.option(
    "--gpus", type=click.IntRange(1), help="GPUs to plan for; `--devices` names those to measure on."
)
@click.option("--host-memory", type=SIZE, help="Host memory to plan for, such as 64GiB.")
@click.option("--cores", type=click.IntRange(1), help="CPU cores to plan for.")
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
def plan(
    dtypes: tuple[str, ...] | None,
    gpu_memory: int | None,
    gpus: int | None,
    host_memory: int | None,
    cores: int | None,
    *,
    as_json: bool,
    **given: Any,  # noqa: ANN401 - one per setting
) -> None:
    """Boot one worker, measure it, and print how many fit and the Helm values for them.

    It is tried with half and twice the tokens of a batch too, on GPUs also in float32; a list after
    --max-batch-tokens or --dtypes says what to try instead.

    Exit codes: 0 a worker fits, 1 none does or nothing could be measured, 2 the command line is wrong.
    """
    from service.commands import planning
    from service.commands.forecast import Machine

    tokens = given["max_batch_tokens"]
    listed = TOKENS.convert(tokens, None, None) if tokens else ()
    settings = _apply(given | ({"max_batch_tokens": str(listed[0])} if listed else {}))
    machine = Machine(gpu_memory, gpus, host_memory, cores)
    sweep = planning.Sweep(listed, dtypes or ())
    with _in_one_line(), _ended_like_interrupted():
        sys.exit(0 if planning.plan(_gunicorn(), settings, machine, sweep, data=as_json) else 1)


@setting_options
@main.command("download")
def fill(**given: Any) -> None:  # noqa: ANN401 - one per setting
    """Fetch the model into the hub cache, unless it is here, and end: for an init container, say.

    Exit codes: 0 the model is here, 1 it is not, one line says why, 2 the command line is wrong.
    """
    from service.commands import downloading

    settings = _apply(given)
    with _in_one_line(), _ended_like_interrupted():
        click.echo(downloading.fill(settings))


@setting_options
@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
def check(*, as_json: bool, **given: Any) -> None:  # noqa: ANN401 - one per setting
    """Say what a start would find and do; nothing is loaded or started.

    Exit codes: 0 it would start, 1 it would be refused, 2 the command line is wrong.
    """
    from service.commands import checking

    settings = _apply(given)
    with _in_one_line():
        report = checking.check(settings)
    click.echo(json.dumps(checking.as_json(report), indent=2) if as_json else checking.text(report))
    sys.exit(1 if report.refused else 0)


OPS_BIND = click.option("--ops-bind", metavar="VALUE", help=Settings.model_fields["ops_bind"].description)


@main.command()
@click.argument("workers", type=click.IntRange(1, MOST_WORKERS))
@OPS_BIND
def scale(workers: int, ops_bind: str | None) -> None:
    """Make a service that runs on this host keep that many WORKERS, as far as its budget allows.

    Exit codes: 0 it does, 1 it keeps another number, or cannot be told.
    """
    from service.commands import control

    bind = _apply({"ops_bind": ops_bind}).ops_bind
    with _in_one_line():
        done = control.scale(control.find(bind), workers)
    click.echo(done)
    sys.exit(0 if done.done else 1)


@main.command()
@click.option("--wait", is_flag=True, help="Wait until every worker is a fresh one, and ready.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait at most.")
@OPS_BIND
def roll(ops_bind: str | None, timeout: float, *, wait: bool) -> None:
    """Replace each worker of a service that runs on this host, one by one, without losing a request.

    Exit codes: 0 done (without --wait: begun), 1 it cannot be told, or was not over in time.
    """
    from service.commands import control

    bind = _apply({"ops_bind": ops_bind}).ops_bind
    with _in_one_line():
        service = control.find(bind)
        epoch = control.roll(service)
        click.echo(f"rolling restart: epoch {epoch}")
        if wait:
            found = control.wait_rolled(service, epoch, timeout)
            click.echo(f"{found['target']} workers are ready in epoch {epoch}")


@main.command("settings")
def show_settings() -> None:
    """Print every setting: variable, default and meaning (docs/settings.md is this text)."""
    click.echo(table())


@main.command()
def diagram() -> None:
    """Print the life cycle of a worker as a Mermaid diagram (docs/architecture.md shows it)."""
    click.echo(lifecycle.diagram())


def _apply(given: dict[str, Any]) -> Settings:
    """Let options override the environment; return the settings."""
    for name, value in given.items():
        if value is not None:
            os.environ[PREFIX + name.upper()] = value
    return load_or_exit()


@contextmanager
def _in_one_line() -> Iterator[None]:
    """End with exit code 1 and one line for what cannot work."""
    try:
        yield
    except WarmfleetError as error:
        click.echo(f"warmfleet: {error}", err=True)
        sys.exit(1)


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """Let a stop by signal end a child too, as Ctrl-C does; PID 1 would not even notice it."""

    def leave(signum: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    before = [signal.signal(signum, leave) for signum in ENDING]
    try:
        yield
    finally:
        for signum, handler in zip(ENDING, before, strict=True):
            signal.signal(signum, handler)


def _gunicorn() -> list[str]:
    """Return the command that starts the service."""
    return [sys.executable, "-m", "gunicorn", "-c", _conf()]


def _conf() -> str:
    """Return the path of gunicorn_conf.py, which is installed beside the package."""
    spec = find_spec("gunicorn_conf")
    if spec is None or spec.origin is None:
        msg = "gunicorn_conf.py is not installed; run `gunicorn -c gunicorn_conf.py` in its folder instead"
        raise click.ClickException(msg)
    return spec.origin
