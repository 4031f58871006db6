# SPDX-License-Identifier: Apache-2.0
"""The image under test, built once a session, and what must be there to build and run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from images import CONTEXT, LABELS, MODEL_TIME, ROOT, Engine, base_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = "localhost/warmfleet-test:cpu"
TOOLS = ("debootstrap", "buildah", "podman", "runc", "catatonit")
FROM_NOTHING_S = 1200

# A model in the test's own process would leave threads behind, beside which other tests fork.
MAKE = "import sys; from pathlib import Path; import tiny; tiny.embedding(Path(sys.argv[1]))"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test here the time of the first, which makes the base and builds the image."""
    for item in items:
        if item.path.parent == ROOT / "tests" / "image":
            item.add_marker(pytest.mark.timeout(FROM_NOTHING_S))


@pytest.fixture(scope="session")
def engine(need: Callable[[str], str]) -> Engine:
    """The store with the base image in it; skips where no container can run, in CI too."""
    for tool in TOOLS:
        need(tool)
    if os.geteuid() != 0:
        pytest.skip("images are built and run as root here, for overlay mounts without a user namespace")
    found = Engine()
    found.make_base()
    probe = found.podman(
        "run", "--rm", "--network=host", "--no-healthcheck", base_name(), "true", check=False
    )
    if probe.returncode != 0:
        pytest.skip(f"this kernel runs no container: {probe.stderr.strip()}")
    return found


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The CPU variant with the demo model."""
    engine.build(CPU, VARIANT="cpu", **LABELS)
    return CPU


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build context like the repository's, with a tiny model in models/ and a pickle beside it."""
    folder = tmp_path_factory.mktemp("context")
    for name in CONTEXT:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, folder / name)
    made = folder / "made"
    made.mkdir()
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests" / "model")}
    subprocess.run([sys.executable, "-c", MAKE, str(made)], env=environ, check=True, timeout=300)
    shutil.copytree(made / "model", folder / "models" / "tiny")
    for file in (folder / "models" / "tiny").rglob("*"):
        os.utime(file, (MODEL_TIME, MODEL_TIME))
    pickled = folder / "models" / "pickled"
    pickled.mkdir()
    shutil.copy2(made / "model" / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder
