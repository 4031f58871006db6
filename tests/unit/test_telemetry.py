# SPDX-License-Identifier: Apache-2.0
"""What the service computes with reports to nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

IMPORT = """
from service import device
device.prepare_environment()
import onnxruntime
"""


def test_onnxruntime_keeps_no_id_of_the_machine(need_runtime: Callable[[str], str], tmp_path: Path) -> None:
    """Imported as the service imports it, onnxruntime leaves no file behind, as it does for its telemetry."""
    need_runtime("onnx")
    environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environ.pop("ORT_DISABLE_TELEMETRY", None)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], env=environ, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0
    assert list(tmp_path.rglob("*")) == []
