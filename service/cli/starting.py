# SPDX-License-Identifier: Apache-2.0
"""Commands that start the service, or look at what a start would do: `serve`, `plan`, `check`, `download`."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from typing import Any

import click

from service.cli.common import apply, ended_like_interrupted, examples, in_one_line
from service.commands.options import DTYPES, SIZE, TOKENS, setting_options
from service.ops_client import url


@setting_options
@click.command(
    epilog=examples(
        {
            "warmfleet serve": "the demo model on two workers",
            "warmfleet serve --open": "and its status page in a browser",
            "warmfleet serve --model-id org/name --workers 4": "a model from the hub",
            "warmfleet serve --workers auto --bind 0.0.0.0:8000": "as many workers as fit",
            "warmfleet serve --backend stub --stub-forward-ms 20": "no model: try the service itself",
        }
    )
)
@click.option("--open", "shows", is_flag=True, help="Show the status page in a browser; on a terminal only.")
def serve(*, shows: bool, **given: Any) -> None:  # noqa: ANN401 - one per setting
    """Start the service; options override the environment's WARMFLEET_* variables.

    On a terminal it shows how far each worker is; elsewhere this process becomes Gunicorn's arbiter.

    Exit codes: 0 stopped as asked, 1 a setting cannot work, 2 the command line is wrong,
    3 no worker could become ready.
    """
    settings = apply(given)
    command = _gunicorn()
    if sys.stderr.isatty():
        from service.progress import run_with_progress

        sys.exit(run_with_progress(command, settings, show=shows))
    if shows:
        click.echo(
            f"warmfleet: --open needs a terminal; the status page is {url(settings.ops_bind)}", err=True
        )
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 - the arbiter takes this process over, PID 1 or not


@setting_options
@click.command(
    epilog=examples(
        {
            "warmfleet plan": "this machine, the demo model",
            "warmfleet plan --dtypes float32,bfloat16 --json": "two precisions, as data",
            "warmfleet plan --gpus 4 --gpu-memory 80GiB": "a machine that you do not have",
        }
    )
)
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
    settings = apply(given | ({"max_batch_tokens": str(listed[0])} if listed else {}))
    machine = Machine(gpu_memory, gpus, host_memory, cores)
    sweep = planning.Sweep(listed, dtypes or ())
    with in_one_line(), ended_like_interrupted():
        sys.exit(0 if planning.plan(_gunicorn(), settings, machine, sweep, data=as_json) else 1)


@setting_options
@click.command(
    "download",
    epilog=examples({"warmfleet download --model-id org/name --revision main": "fill the hub cache"}),
)
def fill(**given: Any) -> None:  # noqa: ANN401 - one per setting
    """Fetch the model into the hub cache, unless it is here, and end: for an init container, say.

    Exit codes: 0 the model is here, 1 it is not, one line says why, 2 the command line is wrong.
    """
    from service.commands import downloading

    settings = apply(given)
    with in_one_line(), ended_like_interrupted():
        click.echo(downloading.fill(settings))


@setting_options
@click.command(
    epilog=examples(
        {
            "warmfleet check --model-id org/name": "would it start here?",
            "warmfleet check --json": "as data",
        }
    )
)
@click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
def check(*, as_json: bool, **given: Any) -> None:  # noqa: ANN401 - one per setting
    """Say what a start would find and do; nothing is loaded or started.

    Exit codes: 0 it would start, 1 it would be refused, 2 the command line is wrong.
    """
    from service.commands import checking

    settings = apply(given)
    with in_one_line():
        report = checking.check(settings)
    click.echo(json.dumps(checking.as_json(report), indent=2) if as_json else checking.text(report))
    sys.exit(1 if report.refused else 0)


COMMANDS = (serve, plan, check, fill)


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
