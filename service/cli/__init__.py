# SPDX-License-Identifier: Apache-2.0
"""The command line: starts, plans, checks, watches and steers. A process above Gunicorn's, or beside."""

from __future__ import annotations

from typing import Final

import click

from service import __version__
from service.cli import printing, starting, steering, watching
from service.cli.common import examples

WIDTH = 100
"""Columns of help, where the terminal has them."""
CONTEXT: Final = {"max_content_width": WIDTH, "help_option_names": ["-h", "--help"]}
EXAMPLES = examples(
    {
        "warmfleet serve": "the demo model on two workers",
        "warmfleet serve --model-id org/name --workers 4": "a model from the hub",
        "warmfleet serve --backend stub --stub-forward-ms 20": "no model: try the service itself",
        "warmfleet wait": "until it is ready, for scripts",
        "warmfleet status": "how it is",
        "warmfleet top": "the same, live",
        "warmfleet scale 4": "four workers from now on",
        "warmfleet roll --wait": "a fresh process for each worker",
        "warmfleet bench": "what it serves, and how fast",
        "warmfleet plan": "how many workers fit this machine",
    }
)


class InOrder(click.Group):
    """Lists its commands in the order that they were added: as they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return their names."""
        del ctx
        return list(self.commands)


@click.group(cls=InOrder, epilog=EXAMPLES, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="warmfleet")
def main() -> None:
    """Serve a sentence-transformers model from N warm Gunicorn workers, look at them, and steer them."""


for module in (starting, watching, steering, printing):
    for command in module.COMMANDS:
        main.add_command(command)
