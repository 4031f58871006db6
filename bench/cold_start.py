# SPDX-License-Identifier: Apache-2.0
"""The first request after ready against the steady ones, for each worker, and for the tutorial server.

Every request is one short text on a connection of its own, one at a time. Which slot served is read off
warmfleet's counters after each request; the tutorial server is asked for its health at the same place,
so that both have the same pauses. The worker's ratio is its first request / the median of its steady
ones. One request is a noisy thing: beside the ratio stands what any single steady request gives.
"""

from __future__ import annotations

import time
from random import Random
from typing import TYPE_CHECKING, Any

import harness
from harness import Meter, Record, Server, median, percentile, spread, table

if TYPE_CHECKING:
    import argparse

BAR = 1.2
SETTLE = 4
"""Requests of each worker that are neither the first nor steady."""
STAGES = ("tokenize", "queue", "forward", "rest")
Timing = dict[str, float]


def measure(workers: int, args: argparse.Namespace, random: Random) -> dict[str, Any]:
    """Boot one system; time each worker's first and steady requests, in milliseconds."""
    if workers:
        server = harness.warmfleet(workers=workers, preload=args.preload)
    else:
        server = harness.tutorial(args.tutorial_threads)
    with server:
        server.wait_ok(server.ops_port, "/ready" if workers else "/health")
        meter = Meter(server)
        times = serve(server, workers, args, random)
        noise = meter.read()
    return {"requests": times, "others_cores": noise["others_cores"]}


def serve(server: Server, workers: int, args: argparse.Namespace, random: Random) -> dict[int, list[Timing]]:
    """Send until every worker has served enough; return the times by slot, in order."""
    times: dict[int, list[Timing]] = {slot: [] for slot in range(workers or 1)}
    before = server.served() if workers else {}
    for _ in range(20 * len(times) * (args.steady + SETTLE)):
        reply = harness.embed(server.port, [harness.short_text(random)])
        slot = 0
        if workers:
            after = server.served()
            while sum(after.values()) == sum(before.values()):  # counted just after the reply is sent
                after = server.served()
            (slot,) = [s for s, count in after.items() if count > before.get(s, 0)]
            before = after
        else:
            harness.request(server.port, "/health")
        times[slot].append({"ms": reply.seconds * 1e3} | reply.timing_ms())
        if min(map(len, times.values())) >= 1 + SETTLE + args.steady:
            break
        time.sleep(args.pause_ms / 1e3)
    return times


def summarise(record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Print first, steady and their ratio for each system; return what the table says."""
    rows, summary = [], {}
    for workers in (0, *args.workers):
        name = name_of(workers)
        samples = record.of(system=name)
        series = [[one["ms"] for one in times] for sample in samples for times in sample["requests"].values()]
        steady = [times[1 + SETTLE :] for times in series]
        ratios = [times[0] / median(calm) for times, calm in zip(series, steady, strict=True)]
        alone = [value / median(calm) for calm in steady for value in calm]
        rows.append(
            (
                name,
                len(series),
                spread((times[0] for times in series), 1),
                spread((times[1] for times in series), 1),
                spread(map(median, steady), 1),
                spread(ratios),
                f"{sum(ratio <= BAR for ratio in ratios)} of {len(ratios)}",
                f"{percentile(alone, 90):.2f}",
                harness.verdict(median(ratios), BAR),
            )
        )
        summary[name] = {
            "n": len(series),
            "first_ms": median(times[0] for times in series),
            "steady_ms": median(map(median, steady)),
            "ratio": median(ratios),
            "ratio_worst": max(ratios),
            "steady_p90_ratio": percentile(alone, 90),
            "bar": BAR,
            "met": median(ratios) <= BAR,
        }
    print("\nMedian (least-most) over workers. p90 of steady: what nine in ten steady requests stay below.\n")
    head = [
        "system",
        "n",
        "first ms",
        "second ms",
        "steady ms",
        "first / steady",
        f"at most {BAR}",
        "p90 of steady",
        "bar",
    ]
    print(table(head, rows))
    print("\nWhere the time goes, ms, median over workers: first / steady.\n")
    names = [name_of(workers) for workers in args.workers]
    print(table(["system", *STAGES], [[name, *stages(record, name)] for name in names]))
    return summary


def stages(record: Record, name: str) -> list[str]:
    """Return `first / steady` of each stage; `rest` is all that the engine does not see."""
    series = [times for sample in record.of(system=name) for times in sample["requests"].values()]
    return [
        f"{median(times[0][stage] for times in series):.1f} / "
        f"{median(one[stage] for times in series for one in times[1 + SETTLE :]):.1f}"
        for stage in STAGES
    ]


def name_of(workers: int) -> str:
    return f"warmfleet, {workers} workers" if workers else "tutorial"


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="fleet sizes (%(default)s)")
    parser.add_argument("--preload", default="auto", choices=["auto", "weights", "imports"])
    parser.add_argument("--steady", type=int, default=30, help="steady requests of each worker (%(default)s)")
    parser.add_argument("--pause-ms", type=float, default=20, help="between two requests (%(default)s)")
    parser.add_argument(
        "--tutorial-threads", type=int, default=0, help="torch threads of the tutorial; 0: torch's choice"
    )
    args = parser.parse_args()
    random, record = Random(args.seed), Record("cold-start", args)
    harness.warm_page_cache()
    for number in range(args.rounds):
        systems = [0, *args.workers]
        for workers in random.sample(systems, len(systems)):
            sample = measure(workers, args, random)
            record.add(round=number, system=name_of(workers), workers=workers, **sample)
            shown = {
                slot: f"{times[0]['ms']:.1f} / {median(one['ms'] for one in times[1 + SETTLE :]):.1f} ms"
                for slot, times in sample["requests"].items()
            }
            harness.progress(
                f"round {number + 1}: {name_of(workers)}: first / steady by slot {shown}, "
                f"others {sample['others_cores']:.2f} cores"
            )
        record.save()
    record.finish(summarise(record, args))


if __name__ == "__main__":
    main()
