# SPDX-License-Identifier: Apache-2.0
"""How evenly connections spread over the workers, on the stub backend: a burst, and keep-alive clients.

Burst: so many connections are opened and sent a request each in one go; who served is counted by slot
(warmfleet's counters) or by pid (a stock Gunicorn with uvicorn-worker and the same forward as a sleep).
Keep-alive: clients in a closed loop connect while one worker of four is warm; once the others are
ready, how long until each has its share. The share is read off the load of /workers (in a closed loop:
the clients that a worker has), since a worker with a single client is as busy as one with twenty.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import harness
from harness import HOST, KeepAlive, Record, Server, spread, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

LOOPS = ("uvloop", "asyncio")
EVEN = 0.25
HELD = 5
"""Looks in a row that must be even, so that a moment's chance does not count."""
LOOK_S = 0.1
SCENARIO = """
[[fault]]
stage = "load"
kind = "slow"
slots = [{slots}]
generations = [1]
seconds = {seconds}
"""


def deviation(counts: Iterable[int], workers: int) -> float:
    """Return the largest distance from an even share, as a part of it; a worker without any counts too."""
    listed = [*counts]
    listed += [0] * (workers - len(listed))
    even = sum(listed) / workers
    return max(abs(count - even) for count in listed) / even if even else float("inf")


# ---------------------------------------------------------------------------------------------
# Burst


def stub(loop: str, forward_ms: float, args: argparse.Namespace, **settings: str | float) -> Server:
    """Return warmfleet on stub workers that warm one small shape."""
    chosen = {
        "backend": "stub",
        "stub_forward_ms": forward_ms,
        "warmup_shapes": "1x8",
        "max_batch_requests": 1,
    }
    chosen |= settings
    return harness.warmfleet(workers=args.workers, loop=loop, **chosen)


def stock(loop: str, forward_ms: float, args: argparse.Namespace) -> Server:
    """Return a stock Gunicorn with uvicorn-worker."""
    (port,) = harness.free_ports(1)
    env = {"SLEEP_MS": str(forward_ms)}
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "-k",
        "uvicorn_worker.UvicornWorker",
        "-w",
        str(args.workers),
    ]
    command += [
        "--chdir",
        str(harness.BENCH),
        "--bind",
        f"{HOST}:{port}",
        "--no-control-socket",
        "stock_app:app",
    ]
    return Server(command, port=port, env=env if loop == "uvloop" else harness.no_uvloop(env))


def loop_of(server: Server) -> str:
    """Return the event loop that the last worker really runs: what it has mapped."""
    return "uvloop" if "uvloop" in Path(f"/proc/{server.pids()[-1]}/maps").read_text() else "asyncio"


def burst(port: int, connections: int) -> tuple[list[str], float]:
    """Open all connections and send on each at once; return who answered (x-pid, if any) and the seconds."""
    body = json.dumps(["fair"]).encode()
    head = f"POST /embed HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    wire = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    began = time.perf_counter()
    sockets = []
    for _ in range(connections):
        sockets.append(socket.create_connection((HOST, port), timeout=60))
        sockets[-1].sendall(wire)
    replies = [b"".join(iter(lambda sock=sock: sock.recv(65536), b"")) for sock in sockets]
    for sock in sockets:
        sock.close()
    bad = [reply[:80] for reply in replies if not reply.startswith(b"HTTP/1.1 200")]
    assert not bad, f"{len(bad)} of {connections} were not answered with 200: {bad[0]!r}"
    found = [re.search(rb"x-pid: *(\d+)", reply) for reply in replies]
    return [match[1].decode() if match else "" for match in found], time.perf_counter() - began


def measure_burst(system: str, loop: str, forward_ms: float, args: argparse.Namespace) -> dict[str, Any]:
    """Start a server, send the bursts, count who served."""
    bursts = []
    server = (stub if system == "warmfleet" else stock)(loop, forward_ms, args)
    with server:
        if system == "warmfleet":
            server.wait_ok(server.ops_port, "/ready")
        else:
            up = "Application startup complete"
            server.wait(lambda: server.log().count(up) >= args.workers, f"{args.workers} times {up!r}")
        real_loop = loop_of(server)
        assert real_loop == loop, f"{system} runs {real_loop}"
        for _ in range(args.bursts):
            before = server.served() if system == "warmfleet" else {}
            pids, seconds = burst(server.port, args.connections)
            if system == "warmfleet":
                counts = new_counts(server, before, args.connections)
            else:
                counts = sorted((pids.count(pid) for pid in set(pids)), reverse=True)
            bursts.append(
                {"counts": counts, "deviation": deviation(counts, args.workers), "seconds": seconds}
            )
            time.sleep(0.3)
    return {"bursts": bursts}


def new_counts(server: Server, before: dict[int, int], expected: int) -> list[int]:
    """Return what each slot served since; a request is counted a moment after its reply."""
    until = time.perf_counter() + 5
    while True:
        counts = [count - before.get(slot, 0) for slot, count in sorted(server.served().items())]
        if sum(counts) == expected:
            return counts
        assert time.perf_counter() < until, f"{sum(counts)} requests were counted, {expected} were sent"


# ---------------------------------------------------------------------------------------------
# Keep-alive clients


async def client(port: int, until: asyncio.Event, tally: dict[str, int]) -> None:
    """Send one request after another on a kept connection."""
    connection = KeepAlive(port, ["fair"])
    while not until.is_set():
        try:
            status = str(await connection.send())
        except (OSError, asyncio.IncompleteReadError) as error:
            connection.close()
            status = type(error).__name__
            await asyncio.sleep(0.05)
        tally[status] = tally.get(status, 0) + 1
    tally["connections"] = tally.get("connections", 0) + connection.connections
    connection.close()


async def watch(server: Server, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the clients; look at states, loads and counts until all are ready and some time has passed."""
    stop, tally = asyncio.Event(), {}
    clients = [asyncio.create_task(client(server.port, stop, tally)) for _ in range(args.clients)]
    looks: list[dict[str, Any]] = []
    origin, all_ready_at = time.perf_counter(), None
    while all_ready_at is None or looks[-1]["t"] < all_ready_at + args.watch_s:
        rows, served = await asyncio.gather(
            asyncio.to_thread(server.workers), asyncio.to_thread(server.served)
        )
        slots = sorted(rows)
        looks.append(
            {
                "t": time.perf_counter() - origin,
                "states": [rows[slot]["state"] for slot in slots],
                "loads": [rows[slot]["load"] for slot in slots],
                "served": [served.get(slot, 0) for slot in range(args.workers)],
            }
        )
        if all_ready_at is None and looks[-1]["states"] == ["ready"] * args.workers:
            all_ready_at = looks[-1]["t"]
        assert looks[-1]["t"] < harness.START_S, looks[-1]
        await asyncio.sleep(LOOK_S)
    stop.set()
    await asyncio.gather(*clients)
    looks.append({"tally": tally})
    return looks


def measure_keepalive(loop: str, args: argparse.Namespace) -> dict[str, Any]:
    """Boot four workers of which one is quick, let the clients in as soon as it is warm, and watch."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as scenario:
        slots = ", ".join(map(str, range(1, args.workers)))
        scenario.write(SCENARIO.format(slots=slots, seconds=args.load_s))
        scenario.flush()
        more = {"stub_scenario": scenario.name, "concurrent_loads": args.workers}
        with stub(loop, args.keepalive_ms, args, **more) as server:
            server.wait(lambda: server.workers().get(0, {}).get("state") == "ready", "READY of slot 0")
            *looks, last = asyncio.run(watch(server, args))
    ready_at = next(look["t"] for look in looks if look["states"] == ["ready"] * args.workers)
    before = [look for look in looks if look["t"] < ready_at]
    after = [look for look in looks if look["t"] >= ready_at]
    cold = [
        look["served"][slot]
        for look in before
        for slot, state in enumerate(look["states"])
        if state not in ("ready", "draining")
    ]
    return {
        "even_s": even_since(after, ready_at, "loads"),
        "last_loads": after[-1]["loads"],
        "last_deviation": deviation(after[-1]["loads"], args.workers),
        "served_after": [b - a for a, b in zip(after[0]["served"], after[-1]["served"], strict=True)],
        "served_by_cold_workers": max(cold, default=0),
        "tally": last["tally"],
        "looks": looks,
    }


def even_since(looks: list[dict[str, Any]], ready_at: float, key: str) -> float | None:
    """Return the seconds from all ready to the first of some even looks in a row; None: there were none."""
    run = 0
    for index, look in enumerate(looks):
        run = run + 1 if deviation(look[key], len(look[key])) <= EVEN else 0
        if run == HELD:
            return looks[index - HELD + 1]["t"] - ready_at
    return None


# ---------------------------------------------------------------------------------------------


def summarise(record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Print both tables."""
    rows, summary = [], {}
    for system in ("warmfleet", "stock gunicorn"):
        for loop in args.loops:
            for forward_ms in args.forward_ms:
                samples = record.of(kind="burst", system=system, loop=loop, forward_ms=forward_ms)
                bursts = [one for sample in samples for one in sample["bursts"]]
                if not bursts:
                    continue
                worst = max(bursts, key=lambda one: one["deviation"])
                deviations = [100 * one["deviation"] for one in bursts]
                shown = "/".join(map(str, worst["counts"]))
                seconds = spread(one["seconds"] for one in bursts)
                rows.append(
                    (system, loop, f"{forward_ms:g}", len(bursts), spread(deviations, 1), shown, seconds)
                )
                summary[f"{system}, {loop}, {forward_ms:g} ms"] = {
                    "deviation_percent": harness.median(deviations),
                    "deviation_worst_percent": max(deviations),
                    "worst_counts": worst["counts"],
                }
    print(f"\n{args.connections} connections at once on {args.workers} workers; median (least-most).\n")
    head = [
        "system",
        "loop",
        "forward ms",
        "bursts",
        "largest deviation, %",
        "worst burst by worker",
        "seconds",
    ]
    print(table(head, rows))
    kept = record.of(kind="keep-alive")
    if kept:
        print(f"\n{args.clients} keep-alive clients, opened while 1 of {args.workers} workers was warm.\n")
        head = [
            "loop",
            "seconds until within 25 %",
            "loads at the end",
            "deviation, %",
            "served once all were ready",
        ]
        rows = [
            (
                sample["loop"],
                "never" if sample["even_s"] is None else f"{sample['even_s']:.1f}",
                "/".join(map(str, sample["last_loads"])),
                f"{100 * sample['last_deviation']:.0f}",
                "/".join(map(str, sample["served_after"])),
                sample["served_by_cold_workers"],
                sample["tally"],
            )
            for sample in kept
        ]
        print(table([*head, "served by cold workers", "replies"], rows))
        summary["keep-alive"] = [
            {key: value for key, value in sample.items() if key != "looks"} for sample in kept
        ]
    return summary


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--connections", type=int, default=400, help="of a burst (%(default)s)")
    parser.add_argument("--bursts", type=int, default=3, help="on each server that is started (%(default)s)")
    parser.add_argument(
        "--forward-ms", type=float, nargs="+", default=[5, 20, 50], help="of the stub (%(default)s)"
    )
    parser.add_argument("--loops", nargs="+", default=LOOPS, choices=LOOPS)
    parser.add_argument("--clients", type=int, default=64, help="with keep-alive (%(default)s)")
    parser.add_argument("--keepalive-ms", type=float, default=20, help="forward under them (%(default)s)")
    parser.add_argument("--load-s", type=float, default=4, help="load of the slow workers (%(default)s)")
    parser.add_argument("--watch-s", type=float, default=10, help="once all are ready (%(default)s)")
    args = parser.parse_args()
    random, record = Random(args.seed), Record("fairness", args)
    cells = [
        (system, loop, ms)
        for system in ("warmfleet", "stock gunicorn")
        for loop in args.loops
        for ms in args.forward_ms
    ]
    for number in range(args.rounds):
        for system, loop, ms in random.sample(cells, len(cells)):
            sample = measure_burst(system, loop, ms, args)
            record.add(kind="burst", round=number, system=system, loop=loop, forward_ms=ms, **sample)
            shown = ["/".join(map(str, one["counts"])) for one in sample["bursts"]]
            harness.progress(f"round {number + 1}: {system}, {loop}, {ms:g} ms: {shown}")
        for loop in args.loops:
            sample = measure_keepalive(loop, args)
            record.add(kind="keep-alive", round=number, loop=loop, **sample)
            even, loads = sample["even_s"], sample["last_loads"]
            harness.progress(f"round {number + 1}: keep-alive, {loop}: even after {even} s, loads {loads}")
        record.save()
    record.finish(summarise(record, args))


if __name__ == "__main__":
    main()
