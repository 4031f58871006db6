# SPDX-License-Identifier: Apache-2.0
"""Memory: what a further worker costs, whether a real limit holds under the worst load, how true the sum is.

Two parts, each interleaved in rounds. Copies: the PSS of fleets of one and of several workers, with weights
preloaded, with imports preloaded, and of the tutorial server under as many plain Gunicorn workers, after the
same traffic. Limits: a fleet in a cgroup whose memory is limited, under minutes of the worst load that its
own limits admit: `auto`, a number that is clamped, and the same number with the budget's advice ignored.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Self

import harness
import load
import uvloop
from harness import Meter, Record, Server, median, spread, table
from load import Call, Load

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

RATIO_BAR = 0.5
"""Of the naive copy's PSS: what a further worker may cost."""
MIB = 1 << 20
COPIES = ("weights", "imports", "naive")
LIMITED: dict[str, dict[str, str]] = {
    "auto": {"workers": "auto"},
    "clamp": {"budget_policy": "clamp"},
    "naive count": {"budget_policy": "warn"},
}
BODY_BYTES, MOST_TEXTS = 2_000_000, 32
"""The defaults of max_body_bytes and max_client_batch_size."""
LOOK_S = 0.25
BUSY_S = 0.5
"""CPU seconds that a naive worker must have used: it has served its part."""


# ---------------------------------------------------------------------------------------------
# A real limit


class Group:
    """A cgroup with a memory limit, of version 1 or 2, below our own or one around it."""

    def __init__(self, limit_bytes: int) -> None:
        """Make it in the first place that lets us put a process into it."""
        problems = []
        for parent in memory_folders():
            self.folder = parent / f"warmfleet-bench-{os.getpid()}"
            self._version_1 = (parent / "memory.limit_in_bytes").exists()
            if not self._version_1 and "memory" not in read(parent / "cgroup.subtree_control").split():
                continue
            try:
                self.folder.mkdir()
                self._limit(limit_bytes)
                subprocess.run([*self.entering, "true"], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                problems.append(f"{parent}: {error}")
                with suppress(OSError):
                    self.folder.rmdir()
            else:
                return
        raise SystemExit(f"this machine lets us set no memory limit: {problems or 'no cgroups'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it, once the kernel has let go of the last process."""
        until = time.monotonic() + 10
        while self.folder.exists() and time.monotonic() < until:
            with suppress(OSError):
                self.folder.rmdir()
            time.sleep(harness.POLL_S)

    @property
    def entering(self) -> tuple[str, ...]:
        """A command that becomes the one that follows it, in this group."""
        return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"))

    @property
    def used_mb(self) -> float:
        """What it has now, less the file pages that the kernel would give up first."""
        used = int(read(self.folder / ("memory.usage_in_bytes" if self._version_1 else "memory.current")))
        stat = dict(line.split() for line in read(self.folder / "memory.stat").splitlines())
        return (used - int(stat.get("total_inactive_file", stat["inactive_file"]))) / harness.MB

    def verdict(self) -> dict[str, float]:
        """Return its peak, file pages included, and how many processes were killed for want of memory."""
        events = read(self.folder / ("memory.oom_control" if self._version_1 else "memory.events"))
        peak = read(self.folder / ("memory.max_usage_in_bytes" if self._version_1 else "memory.peak"))
        found = re.search(r"^oom_kill (\d+)", events, re.MULTILINE)
        return {"kills": int(found[1]) if found else 0, "peak_mb": int(peak or 0) / harness.MB}

    def _limit(self, limit_bytes: int) -> None:
        first, second, none = "memory.max", "memory.swap.max", 0
        if self._version_1:
            first, second, none = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit_bytes
        (self.folder / first).write_text(str(limit_bytes))
        with suppress(FileNotFoundError):
            (self.folder / second).write_text(str(none))


def memory_folders() -> Iterator[Path]:
    """Yield the folder of our cgroup, then all around it; of either version."""
    for line in read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        kind = "cgroup" if controllers else "cgroup2"
        for mount in read(Path("/proc/mounts")).splitlines():
            _, place, found, options, *_ = mount.split()
            if found == kind and (not controllers or "memory" in options.split(",")):
                folder = Path(place) / name.lstrip("/")
                yield from (one for one in (folder, *folder.parents) if one.is_relative_to(place))


def read(path: Path) -> str:
    """Return a small file."""
    with suppress(OSError):
        return path.read_text().strip()
    return ""


# ---------------------------------------------------------------------------------------------
# What a copy costs


def measure_copies(system: str, workers: int, args: argparse.Namespace, random: Random) -> dict[str, Any]:
    """Boot a fleet, let every worker serve, and read the memory of the tree."""
    if system == "naive":
        server = harness.naive_copies(workers)
    else:
        server = harness.warmfleet(workers=workers, preload=system)
    meter = Meter(server)
    with server:
        if system == "naive":
            server.wait(lambda: len(server.pids()) == workers + 1, "all workers")
            server.wait_ok(server.port, "/health")
            serve_naive(server, workers, args.requests, random)
        else:
            server.wait_ok(server.ops_port, "/ready")
            harness.serve_evenly(server, workers=workers, each=args.requests, random=random)
        time.sleep(0.5)
        return {"memory_mb": server.memory(), "meter": meter.read()}


def serve_naive(server: Server, workers: int, each: int, random: Random) -> None:
    """Send mixed texts until each worker has computed; it counts no requests, so its CPU time tells."""
    before = {pid: found.cpu_s for pid in server.pids()[1:] if (found := harness.stat(pid))}
    calls = cycle([load.post_texts("/embed", load.mixed_texts(random, 1)) for _ in range(256)])
    while True:
        run = Load(server.port)
        uvloop.run(run.closed_loop(calls, clients=2 * workers, seconds=1, least=workers * each))
        after = {pid: found.cpu_s for pid in before if (found := harness.stat(pid))}
        if min(after[pid] - before[pid] for pid in before) >= BUSY_S:
            return


def pss_mb(sample: dict[str, Any]) -> float:
    return float(sum(process["pss"] for process in sample["memory_mb"]))


# ---------------------------------------------------------------------------------------------
# What a limit holds


def worst_calls(random: Random) -> Iterator[Call]:
    """Return requests as large as the service's own limits admit, of all lengths, without end."""
    lengths = [n for n in range(1, 300) for _ in range(3)]
    random.shuffle(lengths)
    texts = [" ".join(random.choices(harness.WORDS, k=n)) for n in lengths]
    texts += [text for _ in range(64) for text in load.mixed_texts(random, MOST_TEXTS)]
    random.shuffle(texts)
    calls = [load.post_texts("/embed", texts[i : i + MOST_TEXTS]) for i in range(0, len(texts), MOST_TEXTS)]
    calls += [load.post_texts("/embed", [text]) for text in texts[: len(calls)]]
    longest = " ".join(random.choices(harness.WORDS, k=300))
    calls += [load.post_texts("/embed", [longest] * MOST_TEXTS)] * (len(calls) // 8)
    calls += [large_body(count) for count in (1, MOST_TEXTS) for _ in range(len(calls) // 60)]
    random.shuffle(calls)
    return cycle(calls)


def large_body(count: int) -> Call:
    """Return a request whose body is just below the limit."""
    return load.post_texts("/embed", ["river " * ((BODY_BYTES - 1000) // 6 // count)] * count)


def peak_private_mb(pid: int) -> float:
    """Return the most pages a process had alone: what is private now, and what its RSS came down."""
    sizes = {
        name: int(kb) * 1024
        for file in ("smaps_rollup", "status")
        for name, kb in re.findall(r"^(\w+):\s+(\d+) kB", read(Path(f"/proc/{pid}/{file}")), re.MULTILINE)
    }
    if "VmHWM" not in sizes:
        return 0.0
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return (private + sizes["VmHWM"] - sizes["VmRSS"]) / harness.MB


def measure_limit(system: str, args: argparse.Namespace, random: Random) -> dict[str, Any]:
    """Boot a fleet within the limit, load it as badly as can be, and see what became of it."""
    settings: dict[str, Any] = {"workers": args.count} | LIMITED[system] | harness.chosen_settings(args)
    limit = args.limit_mib * MIB
    with Group(limit) as group, harness.warmfleet(prefix=group.entering, **settings) as server:
        try:
            server.wait_ok(server.ops_port, "/ready")
            planned = settle(server)
        except RuntimeError:  # it ended
            if not group.verdict()["kills"]:
                raise
            return {"died": "in its boot", "limit_mb": limit / harness.MB} | group.verdict()
        before = group.used_mb
        run, points = Load(server.port), load.Trend(lambda: group.used_mb, LOOK_S)
        meter = Meter(server)
        loop = run.closed_loop(
            worst_calls(random),
            clients=args.clients,
            seconds=args.seconds,
            deadline_s=args.seconds + 60,
        )
        uvloop.run(load.beside(loop, points.run()))
        seen = {
            "planned": planned,
            "statuses": run.statuses(),
            "lost": sum(one.status == load.LOST for one in run.done),
            "cut_off": len(run.pending),
            "texts": run.texts,
            "latency_ms": run.latency_ms(),
            "used_before_mb": before,
            "limit_mb": limit / harness.MB,
            "used_mb": [value for _, value in points.points],
            "meter": meter.read(),
        } | group.verdict()
        if server.process.poll() is not None:
            return seen | {"died": "under load"}
        page = harness.request(server.ops_port, "/workers").json()
        live = [row for row in page["workers"] if row["state"] == "ready"]
        budget = page["budget"]
        host = next(line for line in budget["constraints"] if line["name"] == "host")
        return seen | {
            "running": len(live),
            "restarts": sum(row["generation"] - 1 for row in page["workers"]),
            "budget": budget,
            "price_mb": host["price"] / harness.MB,
            "private_mb": host["terms"]["private"] / harness.MB,
            "shared_mb": host["terms"]["shared"] / harness.MB,
            "peaks_mb": [peak_private_mb(row["pid"]) for row in live if row["generation"] == 1],
            "memory_mb": server.memory(),
        }


def settle(server: Server) -> int:
    """Wait until as many workers are ready as are planned; return their number."""

    def look() -> int:
        reply = harness.try_request(server.ops_port, "/ready")
        page = reply.json() if reply else {}
        states = [row["state"] for row in page.get("workers", ()) if row["state"] != "empty"]
        whole = states == ["ready"] * len(states) and len(states) == page["planned_workers"]
        return len(states) if whole else 0

    found: int = server.wait(look, "all planned workers")
    return found


# ---------------------------------------------------------------------------------------------


def summarise(record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables; return what they say."""
    return {"copies": summarise_copies(record, args), "limits": summarise_limits(record, args)}


def summarise_copies(record: Record, args: argparse.Namespace) -> dict[str, Any]:
    """Print what a further worker costs, and its ratio to the naive copy of the same round."""
    extra: dict[str, dict[int, float]] = {}
    for system in COPIES:
        one, many = (
            {sample["round"]: pss_mb(sample) for sample in record.of(system=system, workers=workers)}
            for workers in (1, args.workers)
        )
        extra[system] = {n: (many[n] - one[n]) / (args.workers - 1) for n in many if n in one}
    rows, found = [], {}
    for system in COPIES:
        ratios = [extra[system][n] / extra["naive"][n] for n in extra[system] if n in extra["naive"]]
        whole = [pss_mb(sample) for sample in record.of(system=system, workers=args.workers)]
        passed = "-" if system == "naive" or not ratios else harness.verdict(median(ratios), RATIO_BAR)
        rows.append([system, spread(whole, 0), spread(extra[system].values(), 0), spread(ratios), passed])
        found[system] = {
            "pss_per_extra_worker_mb": median(extra[system].values()),
            "to_naive": median(ratios),
        }
    print(f"\nPSS of {args.workers} workers, of each beyond the first, and its ratio to the naive copy.\n")
    head = ["system", "PSS MB", "per extra worker, MB", "to the naive copy", f"bar {RATIO_BAR:g}"]
    print(table(head, rows))
    return found


def summarise_limits(record: Record, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print what became of each fleet within the limit, and how true its sum was."""
    rows, sums, found = [], [], []
    died = {"planned": args.count, "statuses": {}, "cut_off": 0, "peaks_mb": ()}
    for sample in [died | one if "died" in one else one for one in record.of(kind="limit")]:
        where = [sample["round"] + 1, sample["system"]]
        other = {status: n for status, n in sample["statuses"].items() if status not in ("200", "429")}
        rows.append(
            [
                *where,
                sample["planned"],
                f"{sample['peak_mb']:.0f} / {sample['limit_mb']:.0f}",
                f"{sample['kills']}; the service died {sample['died']}"
                if "died" in sample
                else sample["kills"],
                sample["statuses"].get("200", 0),
                sample["statuses"].get("429", 0),
                sum(other.values()) + sample["cut_off"],
                f"{sample['meter']['others_cores']:.2f}" if "meter" in sample else "-",
            ]
        )
        peaks = sample["peaks_mb"]
        most = max(peaks, default=float("nan"))
        if not sample["kills"] and "died" not in sample:
            foretold = sample["shared_mb"] + sample["planned"] * sample["price_mb"]
            sums.append(
                [
                    *where,
                    f"{sample['private_mb']:.0f}",
                    f"{sample['price_mb']:.0f}",
                    spread(peaks, 0),
                    f"{100 * (sample['price_mb'] / most - 1):+.0f} %",
                    f"{foretold:.0f} / {sample['peak_mb']:.0f}",
                ]
            )
        held = not sample["kills"] and not other and not sample["cut_off"]
        found.append(
            {
                "round": sample["round"],
                "system": sample["system"],
                "workers": sample["planned"],
                "peak_mb": sample["peak_mb"],
                "kills": sample["kills"],
                "lost": sum(other.values()) + sample["cut_off"],
                "died": sample.get("died"),
                "price_to_worst_worker": sample.get("price_mb", float("nan")) / most,
                "held": held,
            }
        )
    print(
        f"\n{args.limit_mib} MiB, {args.count} workers wanted, {args.clients} clients, the worst load for "
        f"{args.seconds:g} s.\n"
    )
    head = ["round", "system", "workers", "peak / limit, MB", "OOM kills", "200", "429", "lost or other"]
    print(table([*head, "others' cores"], rows))
    print("\nA worker: measured at boot, its price, and the most that one had under that load.\n")
    head = ["round", "system", "at boot, MB", "price, MB", "peak under load, MB", "price to the worst"]
    print(table([*head, "fleet: foretold / peak, MB"], sums))
    return found


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--workers", type=int, default=4, help="of a fleet of copies (%(default)s)")
    parser.add_argument(
        "--requests", type=int, default=20, help="of each worker before memory is read (%(default)s)"
    )
    parser.add_argument("--limit-mib", type=int, default=1024, help="of the cgroup (%(default)s)")
    parser.add_argument("--count", type=int, default=12, help="workers wanted within it (%(default)s)")
    parser.add_argument("--clients", type=int, default=64, help="of the closed loop (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="of the worst load (%(default)s)")
    parser.add_argument("--systems", nargs="+", default=[*LIMITED], choices=[*LIMITED])
    parser.add_argument("--skip", nargs="*", default=[], choices=["copies", "limits"])
    harness.settings_option(parser)
    args = parser.parse_args()
    random, record = Random(args.seed), Record("memory", args)
    copies = [(system, n) for system in COPIES for n in (1, args.workers) if "copies" not in args.skip]
    limited = [system for system in args.systems if "limits" not in args.skip]
    minutes = args.rounds * (len(copies) * 15 + len(limited) * (args.seconds + 20)) / 60
    harness.progress(f"{args.rounds} round(s): about {minutes:.1f} min")
    harness.warm_page_cache()
    for number in range(args.rounds):
        for system, workers in random.sample(copies, len(copies)):
            sample = measure_copies(system, workers, args, random)
            record.add(kind="copies", round=number, system=system, workers=workers, **sample)
            harness.progress(f"round {number + 1}: {system}, {workers} workers: PSS {pss_mb(sample):.0f} MB")
        for system in random.sample(limited, len(limited)):
            found = measure_limit(system, args, random)
            record.add(kind="limit", round=number, system=system, **found)
            harness.progress(
                f"round {number + 1}: {system}: {found.get('planned')} workers, peak {found['peak_mb']:.0f} "
                f"of {found['limit_mb']:.0f} MB, {found['kills']} kills, {found.get('statuses')}"
            )
        record.save()
    record.finish(summarise(record, args))


if __name__ == "__main__":
    main()
