# SPDX-License-Identifier: Apache-2.0
"""docs/cli.md and the help texts: every command, exit codes to the letter, examples that parse."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

import pytest
from test_docs import block, page

from service.cli import main

if TYPE_CHECKING:
    import click

CODES = re.compile(r"Exit codes: (.*?)\.$", re.DOTALL | re.MULTILINE)


def exit_codes(command: click.Command) -> str:
    """Return the exit codes that a help text names, on one line."""
    found = CODES.search(command.help or "")
    assert found, f"{command.name}: its help text names no exit codes"
    return " ".join(found[1].split())


def table() -> str:
    """Return all of them."""
    rows = ["| command | exit codes |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {exit_codes(one)} |" for name, one in main.commands.items())])


def test_the_table_of_exit_codes_is_that_of_the_help_texts() -> None:
    """To the letter."""
    assert block(page("cli.md"), "exit codes") == table()


@pytest.mark.parametrize("name", main.commands)
def test_every_command_is_on_the_page(name: str) -> None:
    """With a transcript."""
    assert re.search(rf"^\$ warmfleet {name}\b", page("cli.md"), re.MULTILINE)


def examples() -> list[tuple[str, str]]:
    """Return each example of each help text, with the command it is shown by."""
    found = []
    for command in (main, *main.commands.values()):
        _, _, lines = (command.epilog or "").partition("Examples:\n")
        assert lines, f"{command.name}: its help text has no examples"
        found += [(str(command.name), re.split(r"  +", line.strip())[0]) for line in lines.splitlines()]
    return found


@pytest.mark.parametrize(("name", "example"), examples())
def test_every_example_is_a_command_line_that_works(name: str, example: str) -> None:
    """It is parsed as the program would, without running it; it is about the command that shows it."""
    inside = re.search(r"\$\((warmfleet [^)]*)\)", example)
    words = shlex.split(re.split(r" [|&]", inside[1] if inside else example)[0])
    assert words[0] == "warmfleet"
    command = main.commands[words[1]]
    assert name in (words[1], main.name)
    with command.make_context(words[1], words[2:]) as context:
        assert context.args == []
