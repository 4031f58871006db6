# SPDX-License-Identifier: Apache-2.0
"""How late /ready answers while the workers boot the real model: from the listen until all are ready.

One client asks back to back, either on a new connection each time (as probes do) or on one that is kept;
the two ways take turns, a boot each. Every reply names the state of each slot, so a slow one is told by
what the workers did just before it and at its end. The client itself takes CPU from the workers.
"""

from __future__ import annotations

import http.client
import json
import time
from random import Random
from typing import TYPE_CHECKING, Any

import harness
from harness import Record, Server, percentile, table

if TYPE_CHECKING:
    import argparse

MODES = ("new connections", "keep-alive")
SLOWEST = 5
UNKNOWN = "before the first reply"
KNOCK_S = 0.002
"""Between two attempts to connect before anybody listens."""


def measure(preload: str, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Boot once, and ask all the while; return every latency, grouped by what the slots did."""
    server = harness.warmfleet(workers=args.workers, preload=preload)
    with server:
        while not listens(server.ops_port):
            assert server.process.poll() is None, "the server ended before it listened"
            time.sleep(KNOCK_S)
        listen_s = server.since_exec()
        spans, lost = ask(server, args, keep=mode == "keep-alive")
        stages = {slot: row["stage_seconds"] for slot, row in server.workers().items()}
    return {"listen_s": listen_s, "stages": stages, "lost": lost, "spans": spans}


def listens(port: int) -> bool:
    """Say whether a connection is taken; nothing is sent."""
    with harness.socket.socket() as sock:
        return sock.connect_ex((harness.HOST, port)) == 0


def ask(server: Server, args: argparse.Namespace, *, keep: bool) -> tuple[list[dict[str, Any]], int]:
    """Ask until /ready says yes; return spans of like replies, and how many requests got no reply.

    A span is a run of replies that say the same: when it began, what they say, and the latency of each.
    """
    spans: list[dict[str, Any]] = []
    lost = 0
    origin = time.perf_counter()
    connection: http.client.HTTPConnection | None = None
    while time.perf_counter() - origin < harness.START_S:
        began = time.perf_counter()
        connection = connection or http.client.HTTPConnection(harness.HOST, server.ops_port, timeout=60)
        try:
            reply = harness.exchange(connection, "/ready", None, began)
        except (OSError, http.client.HTTPException):
            lost += 1
            connection.close()
            connection = None
            continue
        said = doing(reply.body)
        if not spans or spans[-1]["said"] != said:
            spans.append({"t": round(began - origin, 4), "said": said, "ms": []})
        spans[-1]["ms"].append(round(reply.seconds * 1e3, 2))
        if reply.status == 200:
            break
        if not keep or "close" in reply.headers.get("connection", ""):
            connection.close()
            connection = None
        time.sleep(args.pause_ms / 1e3)
    return spans, lost


def doing(body: bytes) -> str:
    """Return the state of each slot, and what it is busy with, as one line."""
    rows = json.loads(body)["workers"]
    return "; ".join(f"{row['state']} ({row['doing']})" if row["doing"] else row["state"] for row in rows)


def states(line: str) -> str:
    """Return the states alone, each once: `loading+warming`."""
    return "+".join(sorted({part.split(" (")[0] for part in line.split("; ")}))


def replies_of(sample: dict[str, Any]) -> list[tuple[float, str, str]]:
    """Return each reply as latency, what the reply before it said, and what it said."""
    said, replies = UNKNOWN, []
    for span in sample["spans"]:
        for ms in span["ms"]:
            replies.append((ms, said, span["said"]))
            said = span["said"]
    return replies


def summarise(record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Print the percentiles by way of preloading and by state, then the slowest."""
    rows, by_state, slowest, summary = [], [], [], {}
    for preload in args.preload:
        for mode in MODES:
            samples = record.of(preload=preload, mode=mode)
            replies = [reply for sample in samples for reply in replies_of(sample)]
            if not replies:
                continue
            figures = latencies([reply[0] for reply in replies])
            rows.append((preload, mode, len(samples), *figures.values(), sum(s["lost"] for s in samples)))
            summary[f"{preload}, {mode}"] = figures
            stages: dict[str, list[float]] = {}
            for ms, before, said in replies:
                stages.setdefault(states(before), []).append(ms)
                slowest.append((ms, preload, mode, before, said))
            by_state += [(preload, mode, name, *latencies(found).values()) for name, found in stages.items()]
    units = ["n", "p50 ms", "p99 ms", "max ms"]
    print("\nEvery reply from the listen until all workers are ready.\n")
    print(table(["preload", "connections", "boots", *units, "lost"], rows))
    print("\nBy the states of the workers when the request was sent (as the reply before said).\n")
    print(table(["preload", "connections", "states", *units], by_state))
    print("\nThe slowest.\n")
    head = ["ms", "preload", "connections", "the reply before said", "it said"]
    worst = sorted(slowest, reverse=True)[:SLOWEST]
    print(table(head, [(f"{ms:.0f}", *rest) for ms, *rest in worst]))
    return summary


def latencies(values: list[float]) -> dict[str, float]:
    """Return count, p50, p99 and maximum, in ms."""
    return {
        "n": len(values),
        "p50_ms": round(percentile(values, 50), 1),
        "p99_ms": round(percentile(values, 99), 1),
        "max_ms": round(max(values), 1),
    }


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--workers", type=int, default=2, help="that boot (%(default)s)")
    parser.add_argument(
        "--preload", nargs="+", default=["weights", "imports"], choices=["weights", "imports"]
    )
    parser.add_argument("--pause-ms", type=float, default=0, help="between two requests (%(default)s: none)")
    args = parser.parse_args()
    random, record = Random(args.seed), Record("ready-latency", args)
    cells = [(preload, mode) for preload in args.preload for mode in MODES]
    for number in range(args.rounds):
        for preload, mode in random.sample(cells, len(cells)):
            sample = measure(preload, mode, args)
            record.add(round=number, preload=preload, mode=mode, **sample)
            figures = latencies([reply[0] for reply in replies_of(sample)])
            harness.progress(f"round {number + 1}: preload {preload}, {mode}: {figures}")
        record.save()
    record.finish(summarise(record, args))


if __name__ == "__main__":
    main()
