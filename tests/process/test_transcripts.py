# SPDX-License-Identifier: Apache-2.0
"""docs/cli.md shows what the commands print; `python tests/process/transcripts.py` writes it anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from transcripts import BLOCK, PAGE, Player, player, same, steps

if TYPE_CHECKING:
    from collections.abc import Iterator

TRANSCRIPTS = [step for block in BLOCK.findall(PAGE.read_text(encoding="utf-8")) for step in steps(block)]


@pytest.fixture(scope="module")
def played() -> Iterator[Player]:
    """One service for all of them, in the page's order."""
    with player() as found:
        yield found


@pytest.mark.parametrize(("command", "shown"), TRANSCRIPTS, ids=[command for command, _ in TRANSCRIPTS])
def test_the_page_shows_what_is_printed(played: Player, command: str, shown: str) -> None:
    """But for numbers, times, and how long bars are."""
    assert same(played.play(command)) == same(shown)


def test_numbers_and_bars_are_no_difference() -> None:
    """Words are."""
    assert same("up 3.2 s  · 1 234 texts/s ██▍ 3 (0.1%)") == same("up 5m 12s · 99 texts/s ▏  4 (12.0%)")
    assert same("2 workers are ready") != same("2 workers are warm")
