# SPDX-License-Identifier: Apache-2.0
"""Packed batches on a GPU, in every precision: the rows of encode on the CPU, and none mixed up in flight.

CUDA_VISIBLE_DEVICES=0 python -m pytest tests/gpu/test_packing_gpu.py
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from service import gpus
from service.backends.base import Cut, forward
from service.errors import OutOfMemoryError
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.backends.sentence_transformers import TorchBackend

sys.path.append(str(Path(__file__).parents[1] / "model"))

MIN_COSINE = 0.999
UNIT = 1e-5
"""How far the length of a float32 vector may be from 1."""
SAME_FLOAT32 = 1e-4
"""Largest absolute difference of two float32 computations on unlike devices."""
CHOSEN = {
    "bert": "encoder",
    "roberta": "encoder",
    "xlm-roberta": "encoder",
    "mpnet": "encoder",
    "modernbert": "attention",
    "distilbert": "attention",
    "qwen2": "padded",
    "t5": "padded",
}

pytestmark = [pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    """Skip all of this, with the reason, where there is no GPU to test on."""
    if not gpus.list_gpus():
        pytest.skip("no NVIDIA GPU answers here")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch is a CPU build here, or sees no device")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, TorchBackend]]:
    """Return a maker of models on the GPU, and of their folders."""
    import tiny

    from service.backends.sentence_transformers import TorchBackend

    folders: dict[str, Path] = {}

    def make(architecture: str, **settings: Any) -> tuple[Path, TorchBackend]:
        if architecture not in folders:
            folders[architecture] = tiny.embedding(tmp_path_factory.mktemp("tiny"), architecture)
        backend = TorchBackend(Settings(**settings), folders[architecture], cuda=True)
        backend.load()
        backend.place(threads=1)
        return folders[architecture], backend

    return make


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("architecture", CHOSEN)
def test_rows_are_those_of_encode_on_the_cpu(
    architecture: str,
    dtype: str,
    place: Callable[..., tuple[Path, TorchBackend]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each architecture takes its way, and every way gives the vectors of float32 in this precision."""
    import tiny
    from sentence_transformers import SentenceTransformer

    from service.backends.packing import PACKED
    from service.backends.sentence_transformers import TorchBackend

    texts = tiny.texts()
    names = [*[route.name for route in PACKED], "padded"]
    ways = []
    for number in range(names.index(CHOSEN[architecture]), len(names)):
        # A model for each way: the encoder's has lost its own layers.
        monkeypatch.setattr(TorchBackend, "_ways", PACKED[number:])
        folder, backend = place(architecture, dtype=dtype)
        ways.append(backend.packing)
        assert backend.dtype == dtype
        expected = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts)
        found = forward(backend, backend.collate(backend.tokenize(texts, cut=Cut.RIGHT)))
        assert found.shape == expected.shape
        assert not backend.normalized or np.abs(np.linalg.norm(found, axis=1) - 1).max() <= UNIT
        cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        print(
            architecture, dtype, backend.packing, float(cosines.min()), float(np.abs(found - expected).max())
        )
        assert cosines.min() >= MIN_COSINE, backend.packing
        assert dtype != "float32" or np.abs(found - expected).max() <= SAME_FLOAT32, backend.packing
    assert (ways[0], ways[-1]) == (CHOSEN[architecture], "padded")


def test_batches_in_flight_keep_their_rows(place: Callable[..., tuple[Path, TorchBackend]]) -> None:
    """Many batches are launched before the first is read: pinned memory is not used twice meanwhile."""
    import tiny

    _, backend = place("bert")
    texts = tiny.texts()
    groups = [backend.tokenize(texts[number : number + 7], cut=Cut.RIGHT) for number in range(0, 49, 7)]
    alone = [forward(backend, backend.collate(group)) for group in groups]
    pending = [backend.launch(backend.collate(group)) for _ in range(8) for group in groups]
    found = [one.rows() for one in pending]
    for number, rows in enumerate(found):
        np.testing.assert_allclose(rows, alone[number % len(groups)], atol=2e-2)
    assert all(one.done() for one in pending)


def test_done_turns_true_without_waiting(place: Callable[..., tuple[Path, TorchBackend]]) -> None:
    """A batch can be asked whether it is ready, and becomes so by itself."""
    _, backend = place("bert")
    pending = backend.launch(backend.collate(backend.tokenize(["a b c"], cut=Cut.RIGHT)))
    deadline = time.monotonic() + 30
    while not pending.done():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert pending.rows().shape == (1, backend.dimension)


def test_token_vectors_come_in_order(place: Callable[..., tuple[Path, TorchBackend]]) -> None:
    """Packed and padded give the same token vectors, text after text."""
    import tiny

    _, backend = place("bert", dtype="float32")
    encodings = backend.tokenize(tiny.texts()[:20], cut=Cut.RIGHT)
    packed = forward(backend, backend.collate(encodings, token_vectors=True))
    _, backend = place("bert", dtype="float32", packing="off")
    padded = forward(backend, backend.collate(encodings, token_vectors=True))
    assert len(packed) == sum(map(len, encodings))
    np.testing.assert_allclose(packed, padded, atol=SAME_FLOAT32 * 10)


def test_layers_that_no_pass_reads_are_freed(place: Callable[..., tuple[Path, TorchBackend]]) -> None:
    """The encoder has its own weights: with it, a model takes no more memory than padded."""
    import gc

    import torch

    held = []
    for packing in ("off", "off", "on"):  # once more before: libraries take workspaces at the first pass
        gc.collect()
        before = torch.cuda.memory_allocated()
        _, backend = place("bert", packing=packing)
        gc.collect()
        held.append(torch.cuda.memory_allocated() - before)
        assert (backend._model[0].model is None) == (packing == "on")
        del backend
    assert 0 < held[2] <= held[1]


def test_a_batch_that_does_not_fit_is_out_of_memory(place: Callable[..., tuple[Path, TorchBackend]]) -> None:
    """The device says no, in our words; smaller batches go on after that."""
    import torch

    _, backend = place("bert")
    encodings = backend.tokenize(["a b c d e f"], cut=Cut.RIGHT) * 200_000  # 100 MB a tensor
    backend.trim()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(OutOfMemoryError):
            forward(backend, backend.collate(encodings))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    backend.trim()
    assert forward(backend, backend.collate(encodings[:2])).shape == (2, backend.dimension)
    memory = backend.memory()
    assert memory
    assert memory.peak_bytes >= memory.allocated_bytes > 0
