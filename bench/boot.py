# SPDX-License-Identifier: Apache-2.0
"""Boot, respawn and memory: warmfleet with 1, 2 and 4 workers beside the tutorial server, interleaved.

Each round boots every system once, in a shuffled order in which the tutorial server and two workers
with preloaded weights are neighbours, as the first bar compares them. A boot is timed from exec to
/ready and to the first embedding; then every worker serves the same number of requests, the memory of
the tree is read, and each worker is killed once and timed until its slot is ready again.
"""

from __future__ import annotations

import os
import signal
import time
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import harness
from harness import Meter, Record, Server, median, spread, table

if TYPE_CHECKING:
    import argparse

BOOT_BAR, RESPAWN_BAR_S, PSS_BAR_MB = 1.2, 1.5, 80.0
LOOK_S = 0.01
STAGES = ("import", "wait", "load", "to_device", "warmup")


class System(NamedTuple):
    """One system of a round; no workers: the tutorial server."""

    workers: int = 0
    preload: str = ""

    @property
    def name(self) -> str:
        """Return its name in the tables."""
        return f"warmfleet, {self.workers} workers, {self.preload}" if self.workers else "tutorial"


PAIR = (System(), System(2, "weights"))


def order(random: Random, args: argparse.Namespace) -> list[System]:
    """Shuffle the systems, the first bar's pair side by side."""
    systems = [System(workers, preload) for preload in args.preload for workers in args.workers]
    units = [[system] for system in systems if system not in PAIR]
    units.append(random.sample(PAIR, 2) if PAIR[1] in systems else [PAIR[0]])
    random.shuffle(units)
    return [system for unit in units for system in unit]


def measure(system: System, args: argparse.Namespace, random: Random) -> dict[str, Any]:
    """Boot one system, and do everything to it."""
    if not system.workers:
        server = harness.tutorial(args.tutorial_threads)
    else:
        server = harness.warmfleet(workers=system.workers, preload=system.preload)
    meter = Meter(server)
    with server:
        server.wait_ok(server.ops_port, "/ready" if system.workers else "/health")
        ready_s = server.since_exec()
        first = harness.embed(server.port, [harness.short_text(random)])
        sample: dict[str, Any] = {
            "ready_s": ready_s,
            "first_embedding_s": server.since_exec(),
            "first_request_ms": first.seconds * 1e3,
            "boot": meter.read(),
        }
        if system.workers:
            rows = server.workers()
            sample["stages"] = {slot: row["stage_seconds"] for slot, row in rows.items()}
            sample["warmup_shapes"] = {slot: row["warmup_shapes"] for slot, row in rows.items()}
            sample["served"] = harness.serve_evenly(
                server, workers=system.workers, each=args.requests, random=random
            )
        else:
            for _ in range(args.requests):
                harness.embed(server.port, [harness.mixed_text(random)])
            sample["served"] = {0: args.requests}
        time.sleep(0.5)
        sample["memory_mb"] = server.memory()
        if system.workers:
            sample["respawns"] = [respawn(server, slot) for slot in range(system.workers)]
    return sample


def respawn(server: Server, slot: int) -> dict[str, Any]:
    """Kill a ready worker, and wait until its slot is ready in the next generation.

    Each slot is killed once in a boot: a worker that dies young a second time waits in back-off.
    """
    before = server.wait(
        lambda: (row := server.workers().get(slot)) and row["state"] == "ready" and row, "READY"
    )
    began = time.perf_counter()
    os.kill(before["pid"], signal.SIGKILL)
    while True:
        row = server.workers().get(slot)
        if row and row["state"] == "ready" and row["generation"] > before["generation"]:
            seconds = time.perf_counter() - began
            return {"slot": slot, "seconds": seconds, "stages": row["stage_seconds"]}
        assert time.perf_counter() - began < harness.START_S, row
        time.sleep(LOOK_S)


def pss_mb(sample: dict[str, Any]) -> float:
    return sum(process["pss"] for process in sample["memory_mb"])


def summarise(record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables and the bars; return what they say."""
    tutorial = {sample["round"]: sample for sample in record.of(system="tutorial")}
    systems = [System(), *(System(workers, preload) for preload in args.preload for workers in args.workers)]
    rows, summary = [], {}
    for system in systems:
        samples = record.of(system=system.name)
        end = "ready_s" if system.workers else "first_embedding_s"
        ratios = [s[end] / tutorial[s["round"]]["first_embedding_s"] for s in samples]
        cpu = [s["boot"]["server_cpu_s"] / tutorial[s["round"]]["boot"]["server_cpu_s"] for s in samples]
        respawns = [one["seconds"] for s in samples for one in s.get("respawns", ())]
        rows.append(
            (
                system.name,
                spread(s["ready_s"] for s in samples),
                spread(s["first_embedding_s"] for s in samples),
                spread(ratios),
                spread(cpu),
                spread(respawns),
                spread((pss_mb(s) for s in samples), 0),
                f"{median(s['boot']['others_cores'] for s in samples):.2f}",
            )
        )
        summary[system.name] = {
            "ready_s": median(s["ready_s"] for s in samples),
            "first_embedding_s": median(s["first_embedding_s"] for s in samples),
            "ready_to_tutorial_ratio": median(ratios),
            "cpu_to_tutorial_ratio": median(cpu),
            "respawn_s": median(respawns),
            "respawn_worst_s": max(respawns, default=None),
            "pss_mb": median(map(pss_mb, samples)),
        }
    print(
        "\nMedian (least-most). Ratio: end of boot / tutorial's first embedding, same round; likewise CPU.\n"
    )
    head = [
        "system",
        "ready s",
        "first embedding s",
        "ratio",
        "CPU ratio",
        "respawn s",
        "PSS MB",
        "others' cores",
    ]
    print(table(head, rows))
    print("\nWhere warmfleet's boot goes, s, for the last slot to be ready; rest: start of Gunicorn, fork.\n")
    print(
        table(["system", *STAGES, "rest"], [(s.name, *stages(record.of(system=s.name))) for s in systems[1:]])
    )
    summary["bars"] = bars(record, args, summary)
    return summary


def stages(samples: list[dict[str, Any]]) -> list[str]:
    """Return the median of each stage of the last slot to be ready, and of what no stage names."""
    columns: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "rest")}
    for sample in samples:
        last = max(sample["stages"].values(), key=lambda found: sum(found.values()))
        for stage in STAGES:
            columns[stage].append(last.get(stage, 0.0))
        columns["rest"].append(sample["ready_s"] - sum(columns[stage][-1] for stage in STAGES))
    return [f"{median(values):.2f}" for values in columns.values()]


def bars(record: Record, args: argparse.Namespace, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Print the three bars, for each way of preloading; they are promised for preloaded weights."""
    found = []
    for preload in args.preload:
        two = summary.get(System(2, preload).name)
        if two:
            found.append(
                (
                    "2 workers ready / tutorial's first embedding",
                    preload,
                    two["ready_to_tutorial_ratio"],
                    BOOT_BAR,
                )
            )
        samples = [s for s in record.samples if s.get("preload") == preload]
        respawns = [one["seconds"] for s in samples for one in s["respawns"]]
        found.append((f"respawn to ready, s (n = {len(respawns)})", preload, median(respawns), RESPAWN_BAR_S))
        most = max(args.workers)
        ones = {s["round"]: pss_mb(s) for s in samples if s["workers"] == 1}
        extra = [
            (pss_mb(s) - ones[s["round"]]) / (most - 1)
            for s in samples
            if s["workers"] == most and most > 1 and s["round"] in ones
        ]
        if extra:
            found.append((f"PSS per extra worker, MB ({most} to 1)", preload, median(extra), PSS_BAR_MB))
    print()
    print(
        table(
            ["figure", "preload", "median", "bar", ""],
            [
                (what, pre, f"{value:.2f}", bar, harness.verdict(value, bar))
                for what, pre, value, bar in found
            ],
        )
    )
    return [
        {"figure": what, "preload": pre, "value": value, "bar": bar, "met": value <= bar}
        for what, pre, value, bar in found
    ]


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="fleet sizes (%(default)s)")
    parser.add_argument(
        "--preload", nargs="+", default=["weights", "imports"], choices=["weights", "imports"]
    )
    parser.add_argument(
        "--requests", type=int, default=20, help="of each worker before memory is read (%(default)s)"
    )
    parser.add_argument(
        "--tutorial-threads", type=int, default=0, help="torch threads of the tutorial; 0: torch's choice"
    )
    args = parser.parse_args()
    random, record = Random(args.seed), Record("boot", args)
    harness.warm_page_cache()
    for number in range(args.rounds):
        for system in order(random, args):
            sample = measure(system, args, random)
            record.add(round=number, system=system.name, **system._asdict(), **sample)
            respawns = [round(one["seconds"], 2) for one in sample.get("respawns", ())]
            harness.progress(
                f"round {number + 1}: {system.name}: ready {sample['ready_s']:.2f} s, first embedding "
                f"{sample['first_embedding_s']:.2f} s, PSS {pss_mb(sample):.0f} MB, respawns {respawns}, "
                f"others {sample['boot']['others_cores']:.2f} cores"
            )
        record.save()
    record.finish(summarise(record, args))


if __name__ == "__main__":
    main()
