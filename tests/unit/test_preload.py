# SPDX-License-Identifier: Apache-2.0
"""What the arbiter does with a downloaded folder before it hands it on."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from service import backends, device, download, preflight, preload
from service.backends.stub import StubBackend
from service.settings import Settings
from service.slots import CPU

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """The folders that backends are created for."""
    folders: list[Path | None] = []

    def create(settings: Settings, folder: Path | None, *, cuda: bool) -> StubBackend:
        del cuda
        folders.append(folder)
        return StubBackend(settings)

    monkeypatch.setattr(backends, "create", create)
    return folders


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a download is going to return, empty as yet; everything else of the boot is faked."""
    settings = Settings(model_id="org/name")
    found = preflight.Preflight((CPU,), None)
    monkeypatch.setattr(preload, "load", lambda: settings)
    monkeypatch.setattr(preflight, "check", lambda settings: found)
    monkeypatch.setattr(device, "prepare_environment", lambda: None)
    monkeypatch.setattr(download, "fetch", lambda settings: tmp_path)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    return tmp_path


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(preload.LOG, "error", lambda text, *values: lines.append(text % values))
    return lines


def test_downloaded_model_is_handed_on(
    fetched: Path, handed_on: list[Path | None], errors: list[str]
) -> None:
    """A folder that passes the check goes to the workers."""
    (fetched / "config.json").write_text("{}")
    (fetched / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert preload.application().state.problem == ""
    assert handed_on == [fetched]
    assert errors == []


def test_downloaded_model_is_checked(fetched: Path, handed_on: list[Path | None], errors: list[str]) -> None:
    """One that another program left a pickle in is refused as any folder is, and reaches no worker."""
    (fetched / "modules.json").write_text("[]")
    (fetched / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (fetched / "2_Dense").mkdir()
    (fetched / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    problem = preload.application().state.problem
    assert handed_on == [None]
    assert len(errors) == 1
    assert problem in errors[0]
    assert f"{fetched} holds weights as a pickle (2_Dense/pytorch_model.bin)" in errors[0]
