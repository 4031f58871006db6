# SPDX-License-Identifier: Apache-2.0
"""`warmfleet completion`: the script that makes a shell complete our commands and options. Command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from click.shell_completion import BashComplete, FishComplete, ZshComplete

if TYPE_CHECKING:
    import click
    from click.shell_completion import ShellComplete

SHELLS: Final[dict[str, type[ShellComplete]]] = {
    "bash": BashComplete,
    "zsh": ZshComplete,
    "fish": FishComplete,
}
NAME: Final = "warmfleet"


def script(command: click.Command, shell: str) -> str:
    """Return the script for a shell; it asks the command itself, so it never needs another one."""
    made = SHELLS[shell](command, {}, NAME, f"_{NAME.upper()}_COMPLETE")
    return made.source_template % made.source_vars()
