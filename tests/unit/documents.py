# SPDX-License-Identifier: Apache-2.0
"""Status documents, as a service would serve them."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20
STAGES = ("tokenize", "queue", "forward", "encode", "total")
LE = [0.001, 0.01, 0.1, 1.0]


def slot(number: int, state: str = "ready", **changes: Any) -> dict[str, Any]:
    """Return the row of a slot."""
    return {
        "slot": number,
        "pid": 100 + number,
        "state": state,
        "seconds_in_state": 42.0,
        "heartbeat_age_seconds": 0.05,
        "device": "cpu",
        "generation": 1,
        "epoch": 0,
        "progress": 0.0,
        "doing": None,
        "eta_seconds": None,
        "retry_in_seconds": None,
        "load": 3,
        "memory_bytes": {"rss": 300 * MIB, "pss": 200 * MIB, "uss": 100 * MIB},
        "failures": 0,
        "failures_by_reason": {},
        "last_error": None,
    } | changes


def document(*slots: dict[str, Any], uptime: float = 100.0, **changes: Any) -> dict[str, Any]:
    """Return a document with these slots; `changes` go into `fleet`, or into `service` by its names."""
    service = {
        "model": "org/name",
        "revision": None,
        "backend": "torch",
        "device": "cpu",
        "host": "pod-a",
        "arbiter_pid": 1,
        "uptime_seconds": uptime,
        "stopping": False,
        "api": "0.0.0.0:8000",
        "warning": None,
    }
    fleet = {
        "status": "ready",
        "ready": True,
        "verdict": "serving: 2 of 2 ready",
        "ready_workers": 2,
        "target_workers": 2,
    }
    return {
        "schema": 1,
        "service": service | {name: value for name, value in changes.items() if name in service},
        "fleet": fleet | {name: value for name, value in changes.items() if name in fleet},
        "slots": list(slots or (slot(0), slot(1))),
        "budget": {"text": ["host: a sum", "6 workers fit; host allows no more"], "rooms": [room()]},
        "totals": totals(),
    }


def room(**changes: Any) -> dict[str, Any]:
    """Return a host of 1000 MiB, 900 of which may be used."""
    return {
        "name": "host",
        "kind": "host",
        "total_bytes": 1000 * MIB,
        "limit_bytes": 900 * MIB,
        "others_bytes": 100 * MIB,
        "shared_bytes": 200 * MIB,
        "workers": [{"slot": 0, "bytes": 100 * MIB}, {"slot": 1, "bytes": 100 * MIB}],
        "next_worker": {"bytes": 150 * MIB, "parts": {}, "fits": True},
    } | changes


def totals(requests: int = 0, refused: int = 0, bucket: int = 1) -> dict[str, Any]:
    """Return the counters after so many requests of two texts of ten tokens, all of them in one bucket."""
    counts = [requests if nth == bucket else 0 for nth in range(len(LE) + 1)]
    return {
        "texts": 2 * requests,
        "tokens": 20 * requests,
        "padding_tokens": 5 * requests,
        "requests": {"200": requests, "429": refused},
        "batches": requests,
        "batch_texts": 2 * requests,
        "stages": {
            "le": LE,
            "counts": {name: list(counts) for name in STAGES},
            "sums": dict.fromkeys(STAGES, 0.005 * requests),
        },
        "by_slot": {"0": {"texts": 2 * requests, "tokens": 20 * requests, "requests": requests}},
    }
