# SPDX-License-Identifier: Apache-2.0
"""For all tests: the folder is the marker, and a missing tool skips at home and fails in CI."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from service.preflight import PACKAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TESTS = Path(__file__).parent
FOLDERS = {"unit", "process", "browser", "chart", "image", "docs", "gpu", "model"}

STYLING = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
"""Variables by which whoever runs the tests would change what commands print."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the pictures of the documentation be taken anew; a usual run leaves them as they are."""
    parser.addoption("--screenshots", action="store_true", help="take the pictures of docs/images")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the name of its folder, so that `-m unit` and `tests/unit` are the same."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if folder in FOLDERS:
            item.add_marker(folder)


@pytest.fixture(scope="session", autouse=True)
def _unstyled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in STYLING:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def need_runtime() -> Callable[[str], str]:
    """Check that the packages of a backend are installed: as `need`, for Python packages."""

    def find(backend: str) -> str:
        missing = [package for package in PACKAGES.get(backend, ()) if find_spec(package) is None]
        if missing and os.environ.get("CI") == "true":
            pytest.fail(f"backend {backend} is not installed, and CI must run every test: no {missing}")
        if missing:
            pytest.skip(f"backend {backend} is not installed: no {', '.join(missing)}")
        return backend

    return find


@pytest.fixture(scope="session")
def need() -> Callable[[str], str]:
    """Find a program, of a Python package too: gives its path, skips the test without it, fails it in CI."""

    def find(program: str) -> str:
        path = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if path is None and os.environ.get("CI") == "true":
            pytest.fail(f"{program} is not installed, and CI must run every test")
        if path is None:
            pytest.skip(f"{program} is not installed")
        return path

    return find
