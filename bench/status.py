# SPDX-License-Identifier: Apache-2.0
"""What the status page costs: throughput with three open streams beside none, and what a document takes.

One running service for each backend; within a round it is loaded twice, in an order by the seed, once with
streams open and once without. What a stream costs by itself is the CPU of the idle service with and without.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from random import Random
from typing import TYPE_CHECKING, Any

import harness
from harness import HOST, KeepAlive, Meter, Record, median, spread, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from harness import Server

BACKENDS: dict[str, dict[str, Any]] = {
    "stub": {"backend": "stub", "stub_forward_ms": 0, "warmup_shapes": "1x8"},
    "model": {"backend": "torch"},
}
STREAMS = 3
SETTLE_S = 0.5
CONNECT_S = 0.5
BAR = 0.01
"""Of the throughput without streams may be lost."""
QUIET_S = 3.0
"""After a boot documents come faster."""
FIRST = b"GET /events HTTP/1.1\r\nhost: bench\r\n\r\n"


@contextmanager
def watching(server: Server, streams: int) -> Iterator[list[int]]:
    """Have so many clients read /events, in a thread of their own; the list has the bytes of each."""
    received, stop = [0] * streams, threading.Event()

    async def read(number: int) -> None:
        reader, writer = await asyncio.open_connection(HOST, server.ops_port)
        writer.write(FIRST)
        while not stop.is_set():
            received[number] += len(await reader.read(1 << 16))
        writer.close()

    async def read_all() -> None:
        await asyncio.gather(*(read(number) for number in range(streams)))

    thread = threading.Thread(target=lambda: asyncio.run(read_all()))
    if streams:
        thread.start()
        time.sleep(CONNECT_S)
    try:
        yield received
    finally:
        stop.set()
        if streams:
            thread.join()


async def load(port: int, clients: int, seconds: float, seed: int) -> int:
    """Keep so many clients busy; return the requests answered."""
    random, until = Random(seed), time.perf_counter() + seconds

    async def client() -> int:
        connection, count = KeepAlive(port, [harness.short_text(random)]), 0
        while time.perf_counter() < until:
            assert await connection.send() == 200
            count += 1
        connection.close()
        return count

    return sum(await asyncio.gather(*(client() for _ in range(clients))))


def loaded(server: Server, args: argparse.Namespace, streams: int, seed: int) -> dict[str, Any]:
    """Load a service while so many clients watch; return its rate and its CPU a request."""
    with watching(server, streams) as received:
        asyncio.run(load(server.port, args.clients, SETTLE_S, seed))
        meter, before = Meter(server), list(received)
        requests = asyncio.run(load(server.port, args.clients, args.seconds, seed))
        read = meter.read()
        streamed = sum(received) - sum(before)
    return {
        "requests": requests,
        "per_second": requests / read["wall_s"],
        "cpu_us": 1e6 * read["server_cpu_s"] / requests,
        "streamed_bytes": streamed,
        "others_cores": read["others_cores"],
    }


def idle(server: Server, args: argparse.Namespace, streams: int) -> dict[str, Any]:
    """Let a service do nothing but be watched; return its CPU a second."""
    with watching(server, streams) as received:
        meter, before = Meter(server), list(received)
        time.sleep(args.seconds)
        read = meter.read()
        streamed = sum(received) - sum(before)
    return {
        "cpu_ms_a_second": 1e3 * read["server_cpu_s"] / read["wall_s"],
        "streamed_bytes_a_second": streamed / read["wall_s"],
        "others_cores": read["others_cores"],
    }


def asked(server: Server, times: int, idle_ms_a_second: float) -> dict[str, Any]:
    """Ask /status again and again on one connection; return what an answer adds to the idle service's CPU."""
    connection = HTTPConnection(HOST, server.ops_port, timeout=30)
    meter = Meter(server)
    replies = [harness.exchange(connection, "/status", None, time.perf_counter()) for _ in range(times)]
    read = meter.read()
    connection.close()
    assert {reply.status for reply in replies} == {200}
    return {
        "bytes": len(replies[-1].body),
        "cpu_ms": (1e3 * read["server_cpu_s"] - idle_ms_a_second * read["wall_s"]) / times,
        "latency_ms": 1e3 * median(reply.seconds for reply in replies),
        "others_cores": read["others_cores"],
    }


def interval(ratios: list[float]) -> str:
    """Return the mean with its standard error, as percent of change."""
    if len(ratios) < 2:
        return "-"
    error = statistics.stdev(ratios) / math.sqrt(len(ratios))
    return f"{100 * (statistics.mean(ratios) - 1):+.2f} ± {100 * error:.2f} %"


def measure_backend(name: str, args: argparse.Namespace, record: Record, random: Random) -> dict[str, Any]:
    """Run all rounds on one backend; return the row of the table and the summary."""
    settings = BACKENDS[name] | harness.chosen_settings(args)
    with harness.warmfleet(workers=args.workers, **settings) as server:
        server.wait_ok(server.ops_port, "/ready")
        time.sleep(QUIET_S)
        for number in range(args.rounds):
            for streams in random.sample([0, STREAMS], 2):
                seed = args.seed + number
                sample = loaded(server, args, streams, seed)
                record.add(part="load", backend=name, round=number, streams=streams, **sample)
            for streams in random.sample([0, STREAMS], 2):
                sample = idle(server, args, streams)
                record.add(part="idle", backend=name, round=number, streams=streams, **sample)
            record.save()
    pairs = {streams: record.of(part="load", backend=name, streams=streams) for streams in (0, STREAMS)}
    rates, cpus = (
        [w[key] / wo[key] for w, wo in zip(pairs[STREAMS], pairs[0], strict=True)]
        for key in ("per_second", "cpu_us")
    )
    quiet, watched = (
        median(s["cpu_ms_a_second"] for s in record.of(part="idle", backend=name, streams=streams))
        for streams in (0, STREAMS)
    )
    samples = pairs[0] + pairs[STREAMS]
    row = (
        name,
        spread((s["per_second"] for s in pairs[0]), 0),
        spread(rates, 4),
        interval(rates),
        spread(cpus, 4),
        f"{(watched - quiet) / STREAMS:.2f}",
        f"{median(s['others_cores'] for s in samples):.2f}",
    )
    summary = {
        "rate_ratio": median(rates),
        "cpu_ratio": median(cpus),
        "cpu_ms_a_second_and_stream": (watched - quiet) / STREAMS,
    }
    return {"row": row, "summary": summary}


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=20)
    parser.add_argument("--workers", type=int, default=2, help="of the loaded service (%(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="with keep-alive (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5, help="of each load and rest (%(default)s)")
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--slots", type=int, nargs="*", default=[2, 64], help="for the cost of /status")
    parser.add_argument("--asks", type=int, default=200, help="of /status (%(default)s)")
    harness.settings_option(parser)
    args = parser.parse_args()
    random, record = Random(args.seed), Record("status", args)
    found = {name: measure_backend(name, args, record, random) for name in args.backends}
    for slots in args.slots:
        with harness.warmfleet(workers=slots, **BACKENDS["stub"]) as server:
            server.wait_ok(server.ops_port, "/ready")
            time.sleep(QUIET_S)
            for streams in (0, STREAMS):
                record.add(part="document idle", slots=slots, streams=streams, **idle(server, args, streams))
            quiet = record.of(part="document idle", slots=slots, streams=0)[0]["cpu_ms_a_second"]
            record.add(part="document", slots=slots, **asked(server, args.asks, quiet))
    print(f"\n{args.clients} keep-alive clients, {STREAMS} streams beside none; median (least-most).\n")
    head = ["backend", "requests/s, none", "rate ratio", "mean change", "CPU ratio", "CPU ms/s a stream"]
    print(table([*head, "others' cores"], [one["row"] for one in found.values()]))
    for name, one in found.items():
        lost = 1 - one["summary"]["rate_ratio"]
        print(f"\n{name}, at most {BAR:.0%} of the rate is lost: {harness.verdict(lost, BAR)}")
    print()
    rows = [
        (
            one["slots"],
            one["bytes"],
            f"{one['cpu_ms']:.2f}",
            f"{one['latency_ms']:.2f}",
            *(
                f"{sample['cpu_ms_a_second']:.1f}"
                for sample in record.of(part="document idle", slots=one["slots"])
            ),
        )
        for one in record.of(part="document")
    ]
    head = [
        "slots",
        "bytes",
        "server CPU ms a /status",
        "latency ms",
        "idle CPU ms/s",
        f"with {STREAMS} streams",
    ]
    print(table(head, rows))
    record.finish({name: one["summary"] for name, one in found.items()})


if __name__ == "__main__":
    main()
