# SPDX-License-Identifier: Apache-2.0
"""Overload: what accepted requests, probes and memory do at three times the load that can be served.

The real model on two workers, one mixed text a request. A closed loop finds the capacity, then requests
arrive as a Poisson process at 0.9 and at 3 times that, for a minute each, whatever becomes of them.
Meanwhile `/ready` and `/metrics` are asked four times a second, each time on a new connection, and the
memory of the tree is read every five seconds. Latency counts from the moment a request was due.
"""

from __future__ import annotations

import time
from itertools import cycle
from random import Random
from typing import TYPE_CHECKING, Any

import harness
import load
import uvloop
from harness import Meter, Record, Server, median, table
from load import Call, Load, Probe, Trend

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

LATENCY_BAR, PROBE_BAR_MS, MEMORY_BAR_PERCENT = 2.0, 250.0, 2.0
PROBES = ("/ready", "/metrics")
DRAIN_S = 60.0
POOL = 4096


def requests(seed: int) -> Iterator[Call]:
    """Return mixed texts, one a request, without end."""
    random = Random(seed)
    texts = [text for _ in range(POOL // 32) for text in load.mixed_texts(random, 32)]
    return cycle([load.post_texts("/embed", [text]) for text in texts])


def capacity(server: Server, calls: Iterator[Call], seconds: float, args: argparse.Namespace) -> float:
    """Return the requests a second of a closed loop, without its drain."""
    run = Load(server.port)
    uvloop.run(run.closed_loop(calls, clients=args.clients, seconds=seconds))
    inside = [one for one in run.of(200) if one.done_at <= run.began_at + seconds]
    assert len(inside) > 10, run.statuses()
    return len(inside) / seconds


def phase(server: Server, calls: Iterator[Call], rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Let requests arrive at a rate; return all that was seen."""
    run = Load(server.port)
    probes = {path: Probe(server.ops_port, path, args.probe_s) for path in PROBES}
    memory = Trend(lambda: sum(one["pss"] for one in server.memory()), args.memory_s)
    refused = refused_texts(server)
    meter, own_s = Meter(server), harness.own_s()

    async def run_phase() -> None:
        loop = run.open_loop(
            calls, rate=rate, seconds=args.seconds, random=Random(args.seed), deadline_s=DRAIN_S
        )
        await load.beside(loop, memory.run(), *(probe.run() for probe in probes.values()))

    uvloop.run(run_phase())
    read = meter.read()
    time.sleep(1)
    after = [outcome.retry_after for outcome in run.of(429) if outcome.retry_after is not None]
    settled = [point for point in memory.points if point[0] >= run.began_at + args.seconds / 3]
    slope, error = load.slope_per_minute(settled)
    pss = [value for _, value in memory.points]
    return {
        "rate": rate,
        "accepted_ms": run.latency_ms(),
        "refused_ms": load.latency_ms([one.seconds for one in run.of(429)]),
        "statuses": run.statuses(),
        "served_per_s": sum(one.done_at <= run.began_at + args.seconds for one in run.of(200)) / args.seconds,
        "counted_refused": refused_texts(server) - refused,
        "retry_after_s": {"n": len(after), "least": min(after), "median": median(after), "most": max(after)}
        if after
        else {"n": 0},
        "probes": {path: probe.summary() for path, probe in probes.items()},
        "pss_mb": pss,
        "pss_mb_per_minute": slope,
        "pss_error": error,
        "others_cores": read["others_cores"],
        "client_cores": (harness.own_s() - own_s) / read["wall_s"],
    }


def refused_texts(server: Server) -> float:
    """Return what the workers counted as refused."""
    return sum(value for _, value in server.metric("warmfleet_rejected_texts_total"))


def measure(number: int, record: Record, args: argparse.Namespace) -> None:
    """Boot, find the capacity, go below and beyond it, and look at it once more."""
    settings = {"max_concurrent_requests": args.max_concurrent, "backend": args.backend}
    calls = requests(args.seed + number)
    with harness.warmfleet(workers=args.workers, **settings, **harness.chosen_settings(args)) as server:
        server.wait_ok(server.ops_port, "/ready")
        capacity(server, calls, args.capacity_s / 3, args)
        rate = capacity(server, calls, args.capacity_s, args)
        harness.progress(f"round {number + 1}: capacity {rate:.1f} requests/s")
        for factor in args.factors:
            found = phase(server, calls, factor * rate, args)
            record.add(kind="phase", round=number, factor=factor, capacity=rate, **found)
            p99 = found["accepted_ms"].get("p99", float("nan"))
            harness.progress(
                f"round {number + 1}: {factor:g} times: {found['statuses']}, accepted p99 {p99:.0f} ms "
                f"[{found['others_cores']:.2f}, client {found['client_cores']:.2f}]"
            )
            time.sleep(2)
        again = capacity(server, calls, args.capacity_s, args)
        record.add(kind="capacity", round=number, before=rate, after=again)
        harness.progress(f"round {number + 1}: capacity afterwards {again:.1f} requests/s")


def summarise(record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables and the bars."""
    rows, probe_rows = [], []
    for sample in record.of(kind="phase"):
        accepted, refused, after = sample["accepted_ms"], sample["refused_ms"], sample["retry_after_s"]
        other = {status: n for status, n in sample["statuses"].items() if status not in ("200", "429")}
        rows.append(
            [
                sample["round"] + 1,
                f"{sample['factor']:g}",
                f"{sample['rate']:.0f}",
                f"{sample['served_per_s']:.0f}",
                *(f"{accepted.get(key, float('nan')):.0f}" for key in ("p50", "p95", "p99")),
                accepted["n"],
                sample["statuses"].get("429", 0),
                other or "none",
                "/".join(f"{after[key]:g}" for key in ("least", "median", "most")) if after["n"] else "-",
                "/".join(f"{refused[key]:.1f}" for key in ("p50", "p99")) if refused["n"] else "-",
                f"{sample['others_cores']:.2f}",
            ]
        )
        for path, seen in sample["probes"].items():
            probe_rows.append(
                [
                    sample["round"] + 1,
                    f"{sample['factor']:g}",
                    path,
                    seen["n"],
                    *(f"{seen.get(key, float('nan')):.1f}" for key in ("p50", "p99", "p100")),
                    seen["statuses"],
                ]
            )
    print(
        f"\n{args.workers} workers, max_concurrent_requests={args.max_concurrent} texts each, "
        f"one mixed text a request, Poisson arrivals for {args.seconds:g} s.\n"
    )
    head = ["round", "x capacity", "arrivals/s", "served/s", "p50, ms", "p95", "p99", "accepted", "429"]
    print(table([*head, "other", "Retry-After, s", "429 p50/p99, ms", "others' cores"], rows))
    print("\nProbes meanwhile, each on a new connection.\n")
    print(table(["round", "x capacity", "path", "n", "p50, ms", "p99", "max", "statuses"], probe_rows))
    return bars(record, args)


def bars(record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Print the bars of each round, the worst of them last."""
    rows = []
    low, high = min(args.factors), max(args.factors)
    for number in range(args.rounds):
        below, beyond = (
            record.of(kind="phase", round=number, factor=low),
            record.of(kind="phase", round=number, factor=high),
        )
        if not below or not beyond:
            continue
        (calm,), (storm,) = below, beyond
        ratio = storm["accepted_ms"].get("p99", float("nan")) / calm["accepted_ms"].get("p99", float("nan"))
        probes = [seen for sample in (calm, storm) for seen in sample["probes"].values()]
        slowest = max(seen.get("p100", float("inf")) for seen in probes)
        wrong_probes = sum(n for seen in probes for status, n in seen["statuses"].items() if status != "200")
        pss = median(storm["pss_mb"])
        growth = 100 * storm["pss_mb_per_minute"] / pss
        other = sum(n for status, n in storm["statuses"].items() if status not in ("200", "429"))
        rows += [
            [
                number + 1,
                f"accepted p99 at {high:g} / at {low:g}",
                f"{ratio:.2f}",
                f"< {LATENCY_BAR:g}",
                harness.verdict(ratio, LATENCY_BAR),
            ],
            [
                number + 1,
                f"neither 200 nor 429 at {high:g}",
                other + storm["accepted_ms"]["cut_off"],
                "0",
                harness.verdict(other + storm["accepted_ms"]["cut_off"], 0),
            ],
            [
                number + 1,
                "429 that the client and the workers counted",
                f"{storm['statuses'].get('429', 0)} / {storm['counted_refused']:.0f}",
                "same",
                harness.verdict(abs(storm["statuses"].get("429", 0) - storm["counted_refused"]), 0),
            ],
            [
                number + 1,
                "slowest probe, ms",
                f"{slowest:.1f}",
                f"{PROBE_BAR_MS:g}",
                harness.verdict(slowest, PROBE_BAR_MS),
            ],
            [number + 1, "probes without 200", wrong_probes, "0", harness.verdict(wrong_probes, 0)],
            [
                number + 1,
                f"PSS at {high:g}: {pss:.0f} MB, % a minute",
                f"{growth:+.2f} +- {100 * storm['pss_error'] / pss:.2f}",
                f"{MEMORY_BAR_PERCENT:g}",
                harness.verdict(growth, MEMORY_BAR_PERCENT),
            ],
        ]
    print("\nBars.\n")
    print(table(["round", "figure", "value", "bar", ""], rows))
    return {
        "bars": [dict(zip(("round", "figure", "value", "bar", "verdict"), row, strict=True)) for row in rows]
    }


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--backend", default="torch")
    parser.add_argument(
        "--max-concurrent", type=int, default=32, help="texts that a worker admits at once (%(default)s)"
    )
    parser.add_argument("--clients", type=int, default=32, help="of the closed loop (%(default)s)")
    parser.add_argument("--capacity-s", type=float, default=15, help="of the closed loop (%(default)s)")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.9, 3.0], help="of the capacity")
    parser.add_argument("--seconds", type=float, default=60, help="of each phase (%(default)s)")
    parser.add_argument(
        "--probe-s", type=float, default=0.25, help="between two probes of a path (%(default)s)"
    )
    parser.add_argument("--memory-s", type=float, default=5, help="between two looks at it (%(default)s)")
    harness.settings_option(parser)
    args = parser.parse_args()
    minutes = args.rounds * (0.4 + (2.4 * args.capacity_s + len(args.factors) * (args.seconds + 4)) / 60)
    harness.progress(f"{args.rounds} round(s): about {minutes:.1f} min")
    harness.warm_page_cache()
    record = Record("overload", args)
    for number in range(args.rounds):
        measure(number, record, args)
        record.save()
    record.finish(summarise(record, args))


if __name__ == "__main__":
    main()
