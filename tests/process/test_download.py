# SPDX-License-Identifier: Apache-2.0
"""Models in real processes: an arbiter that stays fit to fork, and downloads that fail in a sentence."""

from __future__ import annotations

import errno
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
from harness import runs, until
from test_cli import CLI, busy_port, descendants, pickled

from service import download, models
from service.errors import ModelError
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_the_secret_of_this_test"
ROOT = str(Path(models.__file__).parents[1])
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


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS], ids=os.strerror)
def test_cache_that_cannot_be_written_says_what_to_set(number: int) -> None:
    """Such as the default one of a user whose home is the root folder, and that read-only."""
    error = OSError(number, os.strerror(number), "/.cache")
    said = "/.cache cannot be written to; set WARMFLEET_HUB_CACHE to a folder that can be"
    assert download.explain(error, "") == said


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


# The command


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `warmfleet download` to its end."""
    return subprocess.run(
        [*CLI, "download", *arguments],
        env=os.environ | {"PYTHONPATH": ROOT} | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_command_fills_the_cache_once(tmp_path: Path, hub: type[Hub]) -> None:
    """The second time the model is there and the hub is not asked; ports, torch and GPUs never are."""
    marks = [tmp_path / name for name in ("torch", "pynvml")]
    for mark in marks:
        (tmp_path / f"{mark.name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise ImportError\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    arguments = ["--model-id", "org/name", "--hub-cache", str(tmp_path / "cache"), "--hf-token", TOKEN]
    folder = tmp_path / "cache" / "models--org--name" / "snapshots" / COMMIT
    with busy_port() as api, busy_port() as ops:
        arguments += ["--bind", api, "--ops-bind", ops]
        done = command(*arguments, PYTHONPATH=path)
        said = f"model org/name is downloaded to {folder}\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
        assert models.find(settings_for("org/name", hub_cache=str(tmp_path / "cache"))) == folder
        assert hub.tokens == {f"Bearer {TOKEN}"}
        hub.refuse = "RepoNotFound"
        done = command(*arguments, PYTHONPATH=path)
        said = f"model org/name is in {folder}: nothing to download\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    assert not any(mark.exists() for mark in marks)


def test_command_has_nothing_to_do_for_a_local_model(tmp_path: Path) -> None:
    """A folder and a package that hold safetensors are said to be there; a stub has no model."""
    folder = tmp_path / "package_of_this_test" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    for name in (str(folder), "package:package_of_this_test/model"):
        done = command("--model-id", name, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
        said = f"model {name} is in {folder}: nothing to download\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    done = command("--backend", "stub")
    assert (done.returncode, done.stdout) == (0, "backend stub has no model: nothing to download\n")


def test_command_refuses_a_local_model_of_no_use(tmp_path: Path) -> None:
    """A folder of pickles is there, but would not start."""
    done = command("--model-id", str(pickled(tmp_path / "model")))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "as a pickle (pytorch_model.bin), not as safetensors" in line


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        ("GatedRepo", "it is gated; accept its terms on its page, and set WARMFLEET_HF_TOKEN to a token"),
        ("RepoNotFound", "the hub shows no such model; check the id"),
    ],
)
def test_command_says_in_a_line_why_it_failed(tmp_path: Path, hub: type[Hub], refuse: str, said: str) -> None:
    """Exit code 1, nothing on stdout, and the sentence that a start would have logged."""
    hub.refuse = refuse
    done = command("--model-id", "org/name", "--hub-cache", str(tmp_path), WARMFLEET_HF_TOKEN=TOKEN)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warmfleet: model org/name cannot be downloaded: {said}")
    assert TOKEN not in line


def test_command_offline_says_that_the_cache_lacks_the_model(tmp_path: Path) -> None:
    """Exit code 1, as a start would end."""
    done = command("--model-id", "org/name", "--hub-cache", str(tmp_path), HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("warmfleet: model org/name is not, or not in full, in the cache")


def test_command_logs_how_far_it_is(tmp_path: Path) -> None:
    """Progress goes to the log, in its format; the deadline is the setting's."""
    code = (
        "from service import cli, download; download.PROGRESS_EVERY_S = 0.1;"
        "cli.main(['download', '--model-id', 'org/name', '--download-timeout', '1', '--log-format', 'json'])"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": ROOT} | place,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    *told, last = done.stderr.splitlines()
    assert re.fullmatch(r"downloading org/name: 0 MB .* of at most 1 s", json.loads(told[0])["message"])
    assert last.startswith("warmfleet: model org/name was not downloaded within download_timeout, 1 s")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_command_that_is_stopped_leaves_no_process(tmp_path: Path, signum: signal.Signals) -> None:
    """Amid a download it ends at once, and so does its child; what is on disk stays for the next try."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        with subprocess.Popen(
            [*CLI, "download", "--model-id", "org/name"],
            env=os.environ | {"PYTHONPATH": ROOT} | place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A background job of a shell is born deaf to Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
        ) as process:
            try:
                silent.settimeout(30)
                with silent.accept()[0]:
                    (child,) = descendants(process.pid)
                    process.send_signal(signum)
                    assert process.wait(10) == (1 if signum == signal.SIGINT else 128 + signum)
                    until(lambda: not runs(child), what="the child is gone")
            finally:
                process.kill()


# Helpers


def failure(settings: Settings) -> str:
    """Return the sentence with which `fetch` fails."""
    with pytest.raises(ModelError) as caught:
        download.fetch(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_python(code: str) -> str:
    """Run code in a fresh interpreter that imported nothing yet."""
    environment = {**os.environ, "PYTHONPATH": ROOT}
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
