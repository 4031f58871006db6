# SPDX-License-Identifier: Apache-2.0
"""The type of a model is read off its files, and one that is not served is refused by name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from service.backends.base import Kind
from service.backends.kinds import detect
from service.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

DECLARED, MODULES, CONFIG = "config_sentence_transformers.json", "modules.json", "config.json"
DENSE = [
    {"type": "sentence_transformers.models.Transformer"},
    {"type": "sentence_transformers.models.Pooling"},
]
SPLADE = [
    {"type": "sentence_transformers.sparse_encoder.models.MLMTransformer"},
    {"type": "sentence_transformers.sparse_encoder.models.SpladePooling"},
]
SCORING = {"architectures": ["BertForSequenceClassification"]}
PLAIN = {"architectures": ["BertModel"]}


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({DECLARED: {"model_type": "SentenceTransformer"}, MODULES: DENSE, CONFIG: PLAIN}, Kind.EMBEDDING),
        ({DECLARED: {"model_type": "SparseEncoder"}, MODULES: DENSE}, Kind.SPARSE),
        ({DECLARED: {"model_type": "CrossEncoder"}, MODULES: DENSE, CONFIG: SCORING}, Kind.SCORES),
        ({DECLARED: {"__version__": {}}, MODULES: DENSE, CONFIG: SCORING}, Kind.EMBEDDING),
        ({MODULES: DENSE}, Kind.EMBEDDING),
        ({MODULES: SPLADE, CONFIG: PLAIN}, Kind.SPARSE),
        ({CONFIG: SCORING}, Kind.SCORES),
        ({CONFIG: PLAIN}, Kind.EMBEDDING),
        ({CONFIG: {"architectures": None}}, Kind.EMBEDDING),
        ({}, Kind.EMBEDDING),
    ],
)
def test_a_folder_tells_its_type(files: dict[str, Any], kind: Kind, tmp_path: Path) -> None:
    """A declaration of sentence-transformers 5 counts first, then the modules, then the architecture."""
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert detect(tmp_path) is kind


@pytest.mark.parametrize("broken", ["{", "\xff", "[]", "3", "null"])
def test_a_broken_file_is_left_to_loading(broken: str, tmp_path: Path) -> None:
    """What is no JSON, or not of the expected form, says nothing here: the library's own error is better."""
    for name in (DECLARED, MODULES, CONFIG):
        (tmp_path / name).write_bytes(broken.encode("latin-1"))
    assert detect(tmp_path) is Kind.EMBEDDING


def test_a_type_that_is_not_served_is_named(tmp_path: Path) -> None:
    """A late-interaction model is refused before its weights are read, with what is served."""
    (tmp_path / DECLARED).write_text('{"model_type": "MultiVectorEncoder"}', encoding="utf-8")
    with pytest.raises(ModelError, match="is a MultiVectorEncoder; served are SentenceTransformer, Sparse"):
        detect(tmp_path)
