# SPDX-License-Identifier: Apache-2.0
"""Status documents as the service makes them, built from what a test cares about."""

from __future__ import annotations

from typing import Any

Document = dict[str, Any]

TIMES = "\N{MULTIPLICATION SIGN}"
GIB, MIB = 1 << 30, 1 << 20
EDGES = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0]
STAGES = ("tokenize", "queue", "forward", "encode", "total")
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title="owned"</script> & "quoted"'


def boot(
    began: float,
    *,
    load: float = 2.0,
    warmup: float | None = 1.5,
    generation: int = 1,
    outcome: str = "ready",
) -> Document:
    """A boot that waited shortly; `warmup` None: it is still at the load."""
    stages = [
        {"stage": "wait", "at": began, "seconds": 0.1},
        {"stage": "load", "at": began + 0.1, "seconds": load},
    ]
    end = began + 0.1 + load
    if warmup is None:
        stages[-1]["seconds"] = None
    else:
        stages.append({"stage": "warmup", "at": end, "seconds": warmup})
        end += warmup
    lasted = outcome in ("ready", "gone")
    return {
        "generation": generation,
        "began": began,
        "stages": stages,
        "ready_at": end if lasted else None,
        "ended_at": end + 20 if outcome == "gone" else end if outcome == "failed" else None,
        "outcome": outcome,
    }


def shape(texts: int, tokens: int, steady: float, *, converged: bool = True) -> Document:
    """A shape whose first pass took three times as long as those that followed."""
    passes = [3 * steady, 1.2 * steady, 1.01 * steady, steady]
    return {
        "texts": texts,
        "tokens": tokens,
        "passes": passes,
        "first_s": passes[0],
        "steady_s": steady,
        "rounds": len(passes),
        "converged": converged,
    }


def slot(number: int, state: str = "ready", **changes: Any) -> Document:
    """A slot on a CPU that has booted once."""
    return {
        "slot": number,
        "pid": 1000 + number,
        "state": state,
        "seconds_in_state": 83.0,
        "heartbeat_age_seconds": 0.05,
        "device": "cpu",
        "generation": 1,
        "epoch": 0,
        "progress": 0.0,
        "doing": None,
        "eta_seconds": None,
        "retry_in_seconds": None,
        "load": 3,
        "requests_in_flight": 2,
        "queued_texts": 1,
        "queued_tokens": 20,
        "max_batch_tokens": 512,
        "declared_batch_tokens": 512,
        "warmup_seconds": 1.5,
        "stage_seconds": {"import": 6.2, "wait": 0.1, "load": 2.0, "to_device": 0.0, "warmup": 1.5},
        "memory_bytes": {
            "rss": 420 * MIB,
            "pss": 260 * MIB,
            "uss": 150 * MIB,
            "device_allocated": 0,
            "device_reserved": 0,
            "device_peak": 0,
            "device_context": 0,
        },
        "failures": 0,
        "failures_by_reason": {},
        "last_error": None,
        "boots": [boot(6.6)],
        "warmup": [shape(64, 512, 0.3), shape(16, 128, 0.04), shape(1, 16, 0.004)],
    } | changes


def cold(number: int) -> Document:
    """A slot that has only just been forked: nothing is known of it."""
    memory = dict.fromkeys(
        ("rss", "pss", "uss", "device_allocated", "device_reserved", "device_peak", "device_context")
    )
    return slot(
        number,
        "waiting",
        seconds_in_state=0.2,
        warmup_seconds=None,
        stage_seconds={},
        memory_bytes=memory,
        max_batch_tokens=None,
        boots=[
            {
                "generation": 1,
                "began": 6.6,
                "stages": [{"stage": "wait", "at": 6.6, "seconds": None}],
                "ready_at": None,
                "ended_at": None,
                "outcome": "booting",
            }
        ],
        warmup=[],
    )


def failing(number: int, text: str = HOSTILE) -> Document:
    """A slot whose boots fail."""
    boots = [
        boot(6.6, outcome="gone"),
        *(boot(40.0 + 9 * g, warmup=None, outcome="failed", generation=g) for g in (2, 3)),
    ]
    return slot(
        number,
        "backoff",
        seconds_in_state=1.4,
        generation=4,
        failures=2,
        retry_in_seconds=2.6,
        failures_by_reason={"killed": 1, "load": 2},
        last_error={"state": "loading", "text": text},
        boots=boots,
    )


def host_room(workers: int, *, total: int = 4 * GIB) -> Document:
    """The host's memory with so many workers."""
    price, used = 260 * MIB, 150 * MIB
    limit, others, shared = int(0.9 * total), 700 * MIB, 420 * MIB
    headroom = limit - others - shared - workers * used
    return {
        "name": "host",
        "kind": "host",
        "source": "cgroup v2 memory.max",
        "total_bytes": total,
        "utilization": 0.9,
        "limit_bytes": limit,
        "others_bytes": others,
        "shared_bytes": shared,
        "shared_name": "the arbiter and what workers share",
        "workers": [{"slot": n, "bytes": used, "parts": {"private": used}} for n in range(workers)],
        "next_worker": {
            "bytes": price,
            "parts": {"private": used, "busy": 96 * MIB, "slack": 14 * MIB},
            "fits": headroom >= price,
        },
        "headroom_bytes": headroom,
        "fits": max(0, (limit - others - shared) // price),
        "binding": True,
    }


def device_room(name: str, slots: list[int]) -> Document:
    """A GPU of 80 GiB with workers on it."""
    parts = {"context": 480 * MIB, "weights": 14 * GIB, "batch": 3 * GIB}
    size = sum(parts.values())
    limit = 72 * GIB
    headroom = limit - len(slots) * size - 2 * GIB
    return {
        "name": name,
        "kind": "device",
        "source": "NVML",
        "total_bytes": 80 * GIB,
        "utilization": 0.9,
        "limit_bytes": limit,
        "others_bytes": 2 * GIB,
        "shared_bytes": 0,
        "shared_name": "",
        "workers": [{"slot": n, "bytes": size, "parts": parts} for n in slots],
        "next_worker": {"bytes": size + GIB, "parts": {**parts, "slack": GIB}, "fits": headroom > size + GIB},
        "headroom_bytes": headroom,
        "fits": 3,
        "binding": False,
    }


def totals(seconds: float, *, texts_per_second: float = 500.0, slots: int = 4) -> Document:
    """Counters after so many seconds of even traffic: two batches of 8 texts for each 16 texts."""
    texts = int(seconds * texts_per_second)
    batches = texts // 8
    counts = [0] * (len(EDGES) + 1)
    counts[4], counts[6], counts[7] = texts // 2, texts // 2 - texts // 50, texts // 50
    return {
        "texts": texts,
        "tokens": 20 * texts,
        "padding_tokens": texts,
        "rejected_texts": int(seconds),
        "dropped_texts": 0,
        "out_of_memory": 0,
        "requests": {"200": texts, "429": int(seconds)},
        "batches": batches,
        "batch_texts": texts,
        "batch_tokens": 20 * texts,
        "batch_seconds": 0.02 * batches,
        "stages": {
            "le": EDGES,
            "counts": dict.fromkeys(STAGES, counts),
            "sums": dict.fromkeys(STAGES, 0.03 * texts),
        },
        "by_slot": {
            str(n): {"texts": texts // slots, "tokens": 20 * texts // slots, "requests": texts // slots}
            for n in range(slots)
        },
    }


def document(
    slots: list[Document],
    *,
    at: float = 90.0,
    status: str | None = None,
    rooms: list[Document] | None = None,
    traffic: float = 500.0,
    **service: Any,
) -> Document:
    """A whole document, `at` seconds after the service began."""
    ready = sum(one["state"] == "ready" for one in slots)
    status = status or ("ready" if ready else "starting")
    found = [host_room(ready)] if rooms is None else rooms
    return {
        "schema": 1,
        "time": 1763782390.0 + at,
        "service": {
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "revision": None,
            "backend": "torch",
            "device": "cpu",
            "versions": {"warmfleet": "0.1.0", "python": "3.11.9", "gunicorn": "27.0.1", "torch": "2.13.0"},
            "host": "pod-abc",
            "arbiter_pid": 1,
            "answered_by": 0,
            "uptime_seconds": at,
            "import_seconds": 4.2,
            "preload_seconds": 0.4,
            "roll_epoch": 0,
            "stopping": False,
            "api": "0.0.0.0:8000",
            "warning": None,
        }
        | service,
        "fleet": {
            "status": status,
            "ready": status == "ready",
            "verdict": f"serving: {ready} of {len(slots)} ready"
            if ready
            else f"not serving: 0 of {len(slots)} ready",
            "detail": f"{ready} of {len(slots)} workers are ready",
            "ready_workers": ready,
            "wanted_workers": 1 if ready else len(slots),
            "target_workers": len(slots),
            "planned_workers": len(slots),
            "floor": 1,
            "was_ready": bool(ready),
        },
        "slots": slots,
        "budget": {
            "policy": "clamp",
            "wanted": "auto",
            "planned": len(slots),
            "fits": found[0]["fits"] if found else None,
            "binding": "host" if found else None,
            "oom_kills": 0,
            "text": ["host: 4.00 GiB * 0.9 = 3.60 GiB; a worker takes 260 MiB"]
            if found
            else ["no worker has been measured yet"],
            "rooms": found,
        },
        "totals": totals(at, texts_per_second=traffic, slots=len(slots)),
        "listen_queue": {"main": 0, "ops": 0},
    }


def booting(at: float) -> Document:
    """Four slots `at` seconds into a boot: one warms up, two load, one waits; no memory was measured yet."""
    warming = slot(
        0,
        "warming",
        seconds_in_state=at - 8.7,
        progress=min(0.95, (at - 8.7) / 6),
        doing=f"64{TIMES}512",
        eta_seconds=8.0,
        warmup_seconds=None,
        boots=[boot(6.6, warmup=None, outcome="booting")],
    )
    warming["boots"][0]["stages"] = [
        {"stage": "wait", "at": 6.6, "seconds": 0.1},
        {"stage": "load", "at": 6.7, "seconds": 2.0},
        {"stage": "warmup", "at": 8.7, "seconds": None},
    ]
    warming["warmup"] = [shape(64, 512, 0.3) | {"passes": [0.9, 0.4], "converged": None, "steady_s": None}]
    loading = [
        slot(
            n,
            "loading",
            seconds_in_state=at - 6.7,
            eta_seconds=1.4,
            warmup_seconds=None,
            boots=[boot(6.6, warmup=None, outcome="booting")],
            warmup=[],
        )
        for n in (1, 2)
    ]
    found = document([warming, *loading, cold(3)], at=at, rooms=[], traffic=0)
    found["fleet"]["verdict"] = f"not serving: 0 of 4 ready, slot 0 is warming: batch 64{TIMES}512, 8 s left"
    return found
