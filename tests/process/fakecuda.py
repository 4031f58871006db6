# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the fake CUDA driver: compile it once, and say with which environment a process gets it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "fakecuda"
LIBRARIES = {"fakecuda.c": "libcuda.so.1", "fakenvml.c": "libnvidia-ml.so.1"}


def build(folder: Path) -> Path:
    """Compile both libraries into `folder`; without gcc skip at home and fail in CI."""
    gcc = shutil.which("gcc")
    if gcc is None:
        message = "gcc is missing, so the fake CUDA driver cannot be compiled"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    for source, library in LIBRARIES.items():
        flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([gcc, *flags, "-o", folder / library, SOURCES / source, "-ldl"], check=True)
    return folder


def log_lines(environ: dict[str, str]) -> list[str]:
    """Return what the fake driver and NVML have logged so far."""
    log = Path(environ["FAKECUDA_LOG"])
    return log.read_text().splitlines() if log.exists() else []


def pid_of(line: str) -> int:
    """Return the process that wrote a line of the log."""
    return int(line.split(maxsplit=1)[0].removeprefix("pid="))


@pytest.fixture(scope="session")
def fake_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both libraries."""
    return build(tmp_path_factory.mktemp("fakecuda"))


@pytest.fixture
def fake_driver(fake_libraries: Path, tmp_path: Path) -> dict[str, str]:
    """What to add to the environment of a process, before its start, so that it meets the fake driver."""
    path = os.environ.get("LD_LIBRARY_PATH")
    return {
        "LD_LIBRARY_PATH": f"{fake_libraries}:{path}" if path else str(fake_libraries),
        "FAKECUDA_LOG": str(tmp_path / "cuda.log"),
    }
