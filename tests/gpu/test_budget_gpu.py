# SPDX-License-Identifier: Apache-2.0
"""The budget on a real GPU: filled and never exceeded, fenced, predicted within 5 %, and refused at boot.

CUDA_VISIBLE_DEVICES=0 python -m pytest tests/gpu/test_budget_gpu.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from service import gpus
from service.gpu_memory import read_devices

sys.path.append(str(Path(__file__).parents[1] / "process"))

from harness import Service, assert_invariants, new_client, until
from test_gpu import PACKAGE, PATIENCE_S, missing

GIB = 1 << 30
LIMIT = 6 * GIB
ERROR = 0.05

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    """Skip all of this, with the reason, where there is no GPU to test on."""
    if lacking := missing():
        pytest.skip(lacking)


def first_gpu() -> str:
    """Return the UUID of the first GPU, or MIG instance."""
    listed = gpus.list_gpus()
    assert listed
    return listed[0]


def used() -> int:
    """Return the bytes in use on the first GPU, whoever uses them."""
    uuid = first_gpu()
    return read_devices([uuid])[uuid].used_bytes


def fleet(**settings: Any) -> Service:
    """Return a service on the first GPU."""
    return Service(
        environ={"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": first_gpu()},
        backend="torch",
        device="cuda",
        model_id=f"package:{PACKAGE}/model",
        **settings,
    )


def budget(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = service.get("/workers").json()["budget"]
    return found


def is_grown(service: Service) -> bool:
    """Whether as many workers are READY as are planned."""
    planned = budget(service)["planned"]
    return planned > 0 and list(service.states().values()) == ["ready"] * planned


def load_worst(service: Service) -> None:
    """Ask for batches as long as the model takes, enough of them to fill a pass of every worker."""
    text = "river " * 512
    with new_client(timeout=120) as client:
        for _ in range(16 * len(service.pids())):
            reply = client.post(f"{service.url}/embed", json=[text] * 32)
            assert reply.status_code == 200, reply.text


def test_auto_fills_the_limit_and_stays_in_it() -> None:
    """`auto` runs several workers under gpu_memory_limit; at the worst batch NVML shows less than that."""
    before = used()
    with fleet(workers="auto", max_workers=16, gpu_memory_limit=LIMIT) as service:
        service.wait_ready(PATIENCE_S)
        until(lambda: is_grown(service), PATIENCE_S, "the fleet has grown")
        assert len(service.pids()) >= 2
        load_worst(service)
        taken = used() - before
        print(f"{len(service.pids())} workers take {taken / GIB:.2f} GiB of {LIMIT / GIB:.2f}")
        assert taken <= LIMIT
        price = next(line["price"] for line in budget(service)["constraints"] if line["kind"] == "device")
        assert LIMIT - taken < 2 * price, "there was room for another worker"
        assert_invariants(service)


def test_prediction_is_within_five_percent() -> None:
    """Context, weights and worst batch, times the workers, are what NVML shows after the worst batches."""
    before = used()
    with fleet(workers=2) as service:
        service.wait_ready(PATIENCE_S)
        load_worst(service)
        cost = budget(service)["sum"]["cost"]
        predicted = 2 * (cost["context"] + cost["weights"] + cost["batch"])
        seen = used() - before
        print(f"predicted {predicted / GIB:.3f} GiB, NVML shows {seen / GIB:.3f} GiB")
        assert abs(predicted - seen) <= ERROR * seen
        assert_invariants(service)


def test_what_does_not_fit_shows_at_boot() -> None:
    """Under a limit that its batches exceed, the token budget is halved in warm-up, and traffic then fits."""
    with fleet(workers=1, gpu_memory_limit=GIB, max_batch_tokens=1 << 20, dtype="float32") as service:
        service.wait_ready(PATIENCE_S)
        assert service.worker(0)["max_batch_tokens"] < 1 << 20
        load_worst(service)
        assert service.metrics().total("warmfleet_out_of_memory_total") == 0
        assert_invariants(service)


def test_fence_stops_the_allocator() -> None:
    """Beyond its share a worker is out of memory, though the device has plenty left."""
    torch = pytest.importorskip("torch")
    from service.backends.sentence_transformers import TorchBackend
    from service.settings import Settings

    origin = next(path for path in sys.path if (Path(path) / PACKAGE / "model").is_dir())
    backend = TorchBackend(Settings(), Path(origin) / PACKAGE / "model", cuda=True)
    backend.load()
    backend.place(threads=1)
    held = backend.memory()
    assert held
    backend.fence(held.reserved_bytes + GIB // 4)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(GIB // 2, dtype=torch.uint8, device="cuda:0")
        assert torch.empty(GIB // 16, dtype=torch.uint8, device="cuda:0").is_cuda
    finally:
        backend.fence(held.total_bytes)
