# SPDX-License-Identifier: Apache-2.0
"""Models in real processes: an arbiter that stays fit to fork, and downloads that fail in a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from service import download, models
from service.errors import ModelError
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_the_secret_of_this_test"
WEIGHTS = b"\x02\0\0\0\0\0\0\0{}"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start from an environment that says nothing of the hub, and without a cache."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "WARMFLEET_")) or name.lower().endswith(
            "_proxy"
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


def settings_for(model_id: str, **others: Any) -> Settings:
    return Settings(model_id=model_id, **others)


def test_arbiter_stays_fit_to_fork() -> None:
    """`find` on a hub id leaves a single thread and no torch behind, and the import alone no hub client."""
    code = (
        "import sys; from service import models; from service.settings import Settings;"
        "early = 'huggingface_hub' in sys.modules;"
        "models.find(Settings(model_id='org/name'));"
        "threads = [l.split()[1] for l in open('/proc/self/status') if l.startswith('Threads')];"
        "print(early, 'torch' in sys.modules, *threads)"
    )
    assert run_python(code) == "False False 1"


def test_offline_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, a download is refused at once, in the words of `find`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(subprocess, "Popen", None)
    settings = settings_for("org/name", hub_cache=str(tmp_path))
    assert failure(settings) == models.refuse_offline(settings)


def test_unreachable_hub_fails_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A closed port fails within seconds, naming model, hub and cause, and no secret."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:{TOKEN}@127.0.0.1:{port}")
    start_s = time.monotonic()
    text = failure(settings_for("org/name", hub_cache=str(tmp_path), hf_token=TOKEN))
    assert time.monotonic() - start_s < 10
    assert text.startswith(
        f"model org/name cannot be downloaded: the hub at 127.0.0.1:{port} failed (ConnectError:"
    )
    assert text.endswith("check the network, or name a folder or package")
    assert TOKEN not in text + "".join(capfd.readouterr())


def test_download_fetches_what_is_wanted_and_nothing_else(
    tmp_path: Path, hub: type[Hub], capfd: pytest.CaptureFixture[str]
) -> None:
    """Safetensors and small texts arrive, with the token sent; pickles, other runtimes and code do not."""
    settings = settings_for("org/name", hub_cache=str(tmp_path), hf_token=TOKEN)
    folder = download.fetch(settings)
    assert folder == tmp_path / "models--org--name" / "snapshots" / COMMIT
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.*")} == {
        "config.json",
        "model.safetensors",
        "vocab.txt",
        "1_Pooling/config.json",
    }
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capfd.readouterr())
    models.check_folder(folder)
    assert models.find(settings) == folder


def test_download_takes_code_only_when_it_is_trusted(tmp_path: Path, hub: type[Hub]) -> None:
    """With `trust_remote_code` the Python files come along, and a cache without them does not suffice."""
    plain = settings_for("org/name", hub_cache=str(tmp_path))
    trusting = settings_for("org/name", hub_cache=str(tmp_path), trust_remote_code=True, revision="main")
    assert not (download.fetch(plain) / "modeling.py").exists()
    assert models.find(trusting) is None
    folder = download.fetch(trusting)
    assert (folder / "modeling.py").exists()
    assert models.find(trusting) == folder


def test_hub_model_without_safetensors_is_refused(tmp_path: Path, hub: type[Hub]) -> None:
    """A repository that holds pickles only is refused after its small files; the pickle is never fetched."""
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    assert failure(settings_for("org/name", hub_cache=str(tmp_path))) == (
        "model org/name has no *.safetensors on the hub; "
        "convert it once, where you trust it, by SentenceTransformer(MODEL).save_pretrained(NEW_FOLDER)"
    )
    assert list(tmp_path.rglob("*.bin")) == []


@pytest.mark.parametrize(
    ("code", "clause"),
    [
        (
            "GatedRepo",
            "it is gated; accept its terms on its page, and set WARMFLEET_HF_TOKEN to a token of yours",
        ),
        (
            "RepoNotFound",
            "the hub shows no such model; check the id, or set WARMFLEET_HF_TOKEN if it is private",
        ),
        ("RevisionNotFound", "it has no revision v2; correct WARMFLEET_REVISION, or unset it"),
    ],
)
def test_refusal_of_the_hub_says_what_to_do(tmp_path: Path, hub: type[Hub], code: str, clause: str) -> None:
    """Gated, absent or private, and no such revision: each has its own clause."""
    hub.refuse = code
    settings = settings_for("org/name", hub_cache=str(tmp_path), revision="v2", hf_token=TOKEN)
    assert failure(settings) == f"model org/name cannot be downloaded: {clause}"


def test_full_disk_and_other_errors_keep_their_first_line(tmp_path: Path, hub: type[Hub]) -> None:
    """What has no clause of its own keeps the name of its class and its first line."""
    (tmp_path / "cache").write_text("a file where the cache should be")
    text = failure(settings_for("org/name", hub_cache=str(tmp_path / "cache")))
    assert text.startswith("model org/name cannot be downloaded: NotADirectoryError: [Errno 20]")


def test_download_past_its_deadline_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that never answers costs the deadline and no more; progress was told, and no child is left."""
    started, told = spy_on_children(monkeypatch), []
    monkeypatch.setattr(download.LOG, "info", lambda text, *values: told.append(text % values))
    monkeypatch.setattr(download, "PROGRESS_EVERY_S", 0.4)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "x.incomplete").write_bytes(bytes(3_000_000))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        text = failure(settings_for("org/name", hub_cache=str(tmp_path), hf_token=TOKEN, download_timeout=1))
    assert text == (
        "model org/name was not downloaded within download_timeout, 1 s (3 MB are there); "
        "raise it, or fill the hub cache beforehand"
    )
    assert re.fullmatch(r"downloading org/name: 3 MB on disk after [01] s of at most 1 s", told[0])
    assert [child.returncode for child in started] == [-signal.SIGKILL]
    assert TOKEN not in str(started[0].args)


def test_child_that_dies_without_a_word_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is killed from outside (the kernel, out of memory) gives its status as the reason."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    text = failure(settings_for("org/name", hub_cache=str(tmp_path)))
    assert text.endswith("cannot be downloaded: its process ended with status 1; the lines above may say why")


def test_child_ends_when_the_arbiter_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the other end of its stdin closes, as when the arbiter is killed, the child ends by itself."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with download.start_child(settings_for("org/name", hub_cache=str(tmp_path))) as child:
            try:
                silent.settimeout(30)
                silent.accept()[0].close()
                assert child.stdin is not None
                child.stdin.close()
                assert child.wait(10) == 1
            finally:
                child.kill()


# Helpers


def failure(settings: Settings) -> str:
    """Return the sentence with which `fetch` fails."""
    with pytest.raises(ModelError) as caught:
        download.fetch(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_python(code: str) -> str:
    """Run code in a fresh interpreter that imported nothing yet."""
    root = str(Path(models.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def spy_on_children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    started: list[subprocess.Popen[str]] = []
    start_child = download.start_child

    def spy(settings: Settings) -> subprocess.Popen[str]:
        started.append(start_child(settings))
        return started[-1]

    monkeypatch.setattr(download, "start_child", spy)
    return started


class Hub(BaseHTTPRequestHandler):
    """A stand-in of the hub with one model, as far as snapshot_download asks."""

    files: ClassVar[dict[str, bytes]] = {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "vocab.txt": b"a",
        "1_Pooling/config.json": b"[]",
        "pytorch_model.bin": b"pickle",
        "onnx/config.json": b"{ }",
        "openvino/openvino_model.xml": b"<xml/>",
        "modeling.py": b"1",
    }
    refuse: ClassVar[str] = ""
    tokens: ClassVar[set[str | None]] = set()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "org/name" in path:
            self.tokens.add(self.headers.get("Authorization"))
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if self.refuse:
            self.answer(404 if self.refuse != "GatedRepo" else 403, b"", {"X-Error-Code": self.refuse})
        elif name:
            etag = hashlib.sha1(self.files[name]).hexdigest()  # noqa: S324 - what the hub names blobs by
            self.answer(200, self.files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            rows = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in self.files.items()]
            self.answer(200, json.dumps(rows).encode(), {})
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode(), {})

    do_HEAD = do_GET  # noqa: N815 - likewise

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("FreshHub", (Hub,), {"tokens": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield handler
        server.shutdown()
        thread.join()
