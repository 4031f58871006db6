# SPDX-License-Identifier: Apache-2.0
"""The list of GPUs, as far as the arbiter makes it of what a child says (the child: tests/process)."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from service import gpus


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the child writes; afterwards also how it was called."""
    answer: dict[str, Any] = {"stdout": b"null", "stderr": b""}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        answer.update(options, command=command)
        if answer["stdout"] is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 0, answer["stdout"], answer["stderr"])

    monkeypatch.setattr(subprocess, "run", run)
    return answer


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(gpus.LOG, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_answer_is_the_childs_output(child: dict[str, Any], warnings: list[str]) -> None:
    """UUIDs, none, or None come from the child's standard output, in silence."""
    for stdout, expected in ((b'["GPU-1", "MIG-2"]', ["GPU-1", "MIG-2"]), (b"[]", []), (b"null", None)):
        child["stdout"] = stdout
        assert gpus.list_gpus() == expected
    assert warnings == []


def test_child_sees_all_gpus(child: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The child runs without CUDA_VISIBLE_DEVICES, which would hide GPUs from CUDA."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/driver")
    gpus.list_gpus(timeout_s=3)
    assert "CUDA_VISIBLE_DEVICES" not in child["env"]
    assert child["env"]["LD_LIBRARY_PATH"] == "/driver"
    assert child["command"] == [sys.executable, "-P", "-m", "service.gpus"]
    assert child["timeout"] == 3


def test_hanging_driver_is_given_up(child: dict[str, Any], warnings: list[str]) -> None:
    """A driver that does not answer in time counts as none, and the log says so."""
    child["stdout"] = None
    assert gpus.list_gpus(timeout_s=0.5) is None
    assert warnings == ["no GPU list: the NVIDIA driver did not answer within 0.5 s"]


def test_broken_child_is_reported(child: dict[str, Any], warnings: list[str]) -> None:
    """A child that writes no JSON counts as no driver, and the log ends with its last line."""
    child.update(stdout=b"", stderr=b"Traceback\nImportError: no service\n")
    assert gpus.list_gpus() is None
    assert warnings == ["no GPU list: the child that asks the driver failed: ImportError: no service"]
