# SPDX-License-Identifier: Apache-2.0
"""Imports point downwards, and torch stays behind service.backends: the contracts of pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_contracts_of_imports_are_kept() -> None:
    """import-linter, run as `make lint` runs it, finds all contracts kept."""
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [program, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    kept = "Contracts: 4 kept, 0 broken."
    assert (done.returncode, kept in done.stdout) == (0, True), done.stdout + done.stderr
