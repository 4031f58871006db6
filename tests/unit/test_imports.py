# SPDX-License-Identifier: Apache-2.0
"""What the arbiter imports before it forks: nothing that starts threads, nothing heavy before the checks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from service.settings import PREFIX

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "torch", "transformers", "sentence_transformers")

# At the end of the process, however it ends: which of the heavy modules were imported?
REPORT = f"import atexit, sys; atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules]))"


def run(code: str, **settings: str) -> tuple[int, str, str]:
    """Run code in a fresh interpreter in the root of the project; return exit code, stdout and stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    done = subprocess.run(
        [sys.executable, "-c", f"{REPORT}; {code}"],
        cwd=ROOT,
        env=environment | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_importing_the_service_imports_neither_numpy_nor_torch() -> None:
    """The configuration, the hooks, the worker and the preload are all imported before the fork guard."""
    code = "import gunicorn_conf, service.hooks, service.worker, service.preload, service.cli"
    assert run(code) == (0, "[]\n", "")


def test_a_wrong_setting_ends_the_start_before_torch() -> None:
    """gunicorn_conf.py exits with 1 and one line, in milliseconds, as nothing heavy was imported."""
    line = "warmfleet: WARMFLEET_WORKERS=0: write a number of workers from 1 to 256, or auto\n"
    assert run("import gunicorn_conf", WARMFLEET_WORKERS="0") == (1, "[]\n", line)
