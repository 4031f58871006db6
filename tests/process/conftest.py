# SPDX-License-Identifier: Apache-2.0
"""Models of other types than the demo's, tiny and random, with what sentence-transformers makes of texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]

# A model in the test's own process would leave threads behind, beside which other tests fork.
MAKE = """
import json, sys
from pathlib import Path
import tiny, torch
from sentence_transformers import CrossEncoder, SparseEncoder

torch.set_num_threads(1)
folder, texts = Path(sys.argv[1]), json.loads(sys.argv[2])
query, raw = texts[0], torch.nn.Identity()
said = {}

def scores(name, labels):
    model = CrossEncoder(str(tiny.scores(folder / name, labels=labels)), device="cpu")
    pairs = [(query, text) for text in texts]
    with torch.no_grad():
        tokens = model.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        single = model.model(**tokens).logits.tolist()
    several = {"apply_softmax": True} if len(labels) > 1 else {}
    said[name] = {
        "pairs": model.predict(pairs, **several).tolist(),
        "raw pairs": model.predict(pairs, activation_fn=raw).tolist(),
        "raw texts": single,
    }

scores("reranker", ["LABEL_0"])
scores("classifier", ["wrong", "right"])
model = SparseEncoder(str(tiny.sparse(folder / "sparse")), device="cpu")
said["sparse"] = {"vectors": model.encode(texts, convert_to_sparse_tensor=False).tolist()}
(folder / "said.json").write_text(json.dumps(said), encoding="utf-8")
"""


@dataclass(frozen=True)
class Tiny:
    """A model's folder, the texts it was shown, and what it said of them.

    Attributes:
        folder: as `save` left it.
        texts: the first is the query of the pairs.
        said: `pairs`, `raw pairs` and `raw texts` of a cross-encoder, `vectors` of a sparse encoder.
    """

    folder: Path
    texts: list[str]
    said: dict[str, Any]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    """A reranker, a classifier and a sparse encoder: BERTs of three layers with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = ["a river", "the mountain is high", "cat", "3.14 Zürich", "on and on " * 90]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS / "model")}
    command = [sys.executable, "-c", MAKE, str(folder), json.dumps(texts)]
    subprocess.run(command, env=environ, check=True, timeout=300)
    said = json.loads((folder / "said.json").read_text(encoding="utf-8"))
    return {name: Tiny(folder / name / "model", texts, said[name]) for name in said}
