# SPDX-License-Identifier: Apache-2.0
"""What type of model lies in a folder, as its configuration files say. Both processes."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any, TypeVar

from service.backends.base import Kind
from service.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T", dict[str, Any], list[Any])
BY_MODEL_TYPE = {
    "SentenceTransformer": Kind.EMBEDDING,
    "SparseEncoder": Kind.SPARSE,
    "CrossEncoder": Kind.SCORES,
}
"""`model_type` of config_sentence_transformers.json, as sentence-transformers 5 and later write it."""


def detect(folder: Path) -> Kind:
    """Return the type of the model in a folder.

    Raises:
        ModelError: it is of a type that is not served, such as a late-interaction model.
    """
    declared = _read(folder / "config_sentence_transformers.json", dict).get("model_type")
    if declared is not None:
        if declared in BY_MODEL_TYPE:
            return BY_MODEL_TYPE[declared]
        served = ", ".join(BY_MODEL_TYPE)
        raise ModelError(f"the model in {folder} is a {declared}; served are {served}")
    modules = _read(folder / "modules.json", list)
    if modules:
        sparse = any(".sparse_encoder." in str(module) for module in modules)
        return Kind.SPARSE if sparse else Kind.EMBEDDING
    architectures = _read(folder / "config.json", dict).get("architectures") or []
    scores = any(name.endswith("ForSequenceClassification") for name in architectures)
    return Kind.SCORES if scores else Kind.EMBEDDING


def _read(file: Path, form: type[T]) -> T:
    """Return a file's content, nothing if it is not there or not of this form: loading will tell."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, form):
            return content
    return form()
