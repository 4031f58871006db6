# SPDX-License-Identifier: Apache-2.0
"""The command line: `warmfleet serve`, `settings` and `diagram`. A process of its own, above Gunicorn's."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

import click

from service import __version__, lifecycle
from service.progress import run_with_progress
from service.settings import PREFIX, Settings, load_or_exit, table

EXAMPLES = """
\b
Examples:
  warmfleet serve                                      the demo model on two workers
  warmfleet serve --model-id org/name --workers 4      a model from the hub
  warmfleet serve --backend stub --stub-forward-ms 20  no model: try the service itself
"""


@click.group(epilog=EXAMPLES)
@click.version_option(__version__, prog_name="warmfleet")
def main() -> None:
    """Serve a sentence-transformers model from N warm Gunicorn workers."""


def setting_options(command: click.Command) -> click.Command:
    """Give a command one option for each setting; the settings validate, not the options."""
    for name, field in Settings.model_fields.items():
        option = click.Option([f"--{name.replace('_', '-')}"], help=field.description, metavar="VALUE")
        command.params.append(option)
    return command


@setting_options
@main.command(epilog=EXAMPLES)
def serve(**given: Any) -> None:  # noqa: ANN401 - one per setting
    """Start the service; options override the environment's WARMFLEET_* variables.

    Exit codes: 0 stopped as asked, 1 a setting cannot work, 2 the command line is wrong,
    3 no worker could become ready.
    """
    for name, value in given.items():
        if value is not None:
            os.environ[PREFIX + name.upper()] = value
    settings = load_or_exit()
    command = [sys.executable, "-m", "gunicorn", "-c", _conf()]
    if sys.stderr.isatty():
        sys.exit(run_with_progress(command, settings))
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 - the arbiter takes this process over, PID 1 or not


@main.command("settings")
def show_settings() -> None:
    """Print every setting: variable, default and meaning (docs/settings.md is this text)."""
    click.echo(table())


@main.command()
def diagram() -> None:
    """Print the life cycle of a worker as a Mermaid diagram (docs/architecture.md shows it)."""
    click.echo(lifecycle.diagram())


def _conf() -> str:
    """Return the path of gunicorn_conf.py, which is installed beside the package."""
    spec = find_spec("gunicorn_conf")
    if spec is None or spec.origin is None:
        msg = "gunicorn_conf.py is not installed; run `gunicorn -c gunicorn_conf.py` in its folder instead"
        raise click.ClickException(msg)
    return spec.origin
