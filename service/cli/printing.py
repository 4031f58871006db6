# SPDX-License-Identifier: Apache-2.0
"""Commands that only print: `settings`, `diagram`, `completion`. Command line."""

from __future__ import annotations

import click

from service import lifecycle
from service.cli.common import examples
from service.settings import table


@click.command(
    "settings",
    epilog=examples(
        {"warmfleet settings": "all of them", "warmfleet settings | grep MEMORY": "some of them"}
    ),
)
def show_settings() -> None:
    """Print every setting: variable, default and meaning (docs/settings.md is this text).

    Exit codes: 0 always.
    """
    click.echo(table())


@click.command(epilog=examples({"warmfleet diagram": "paste it where Mermaid is drawn"}))
def diagram() -> None:
    """Print the life cycle of a worker as a Mermaid diagram (docs/architecture.md shows it).

    Exit codes: 0 always.
    """
    click.echo(lifecycle.diagram())


@click.command(
    epilog=examples(
        {
            'eval "$(warmfleet completion bash)"': "in ~/.bashrc",
            'eval "$(warmfleet completion zsh)"': "in ~/.zshrc, after compinit",
            "warmfleet completion fish | source": "in config.fish",
        }
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a SHELL complete commands, options and their choices.

    Exit codes: 0 printed, 2 the command line is wrong.
    """
    from service.commands.completion import script

    click.echo(script(context.find_root().command, shell))


COMMANDS = (show_settings, diagram, completion)
