# SPDX-License-Identifier: Apache-2.0
"""Embeddings per server CPU-second and per second: warmfleet, its peers and bare `encode`, interleaved.

Workloads: i, one short text a request; ii, one mixed text; iii, 32 mixed texts; each in a closed loop of
1, 8, 32 and 128 clients (`i/1` to `iii/128`). In each round every system is started, warmed and measured in
every cell, with the same requests in the same order; so is `model.encode` in a process of its own. All
compute with one torch thread a process. Nothing is refused: `max_concurrent_requests` of warmfleet is above
what is ever in flight. Systems whose environment is missing are left out (`bench/peers/environments.py`).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import harness
import load
import uvloop
from harness import Meter, Record, Server, median, spread, table
from load import Call, Load

sys.path.insert(0, str(harness.BENCH / "peers"))

import catalogue
import environments

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Sequence

WORKLOADS = {"i": 1, "ii": 1, "iii": 32}
"""Texts a request."""
CLIENTS = (1, 8, 32, 128)
BACKENDS = ("torch", "onnx", "openvino")
SETTINGS = {"max_client_batch_size": 32, "max_concurrent_requests": 8192, "request_timeout": 900}
"""So that no cell is refused or timed out: 128 clients have 4,096 texts in flight."""
POOL = {"i": 4096, "ii": 4096, "iii": 256}
"""Requests until they repeat."""
GUESS = {"i": 120.0, "ii": 40.0, "iii": 30.0}
"""Texts a second of one process, for the estimate of how long all will take."""
BOOT_S, SETTLE_S, LOOK_S = 10.0, 0.3, 0.25
BARE = {"bare-1": 1, "bare-2": 2}
"""Processes of bare encode() at once: on all cores at once a CPU-second may be worth less."""
SATURATED = ("i/32", "i/128", "ii/32", "ii/128", "iii/8", "iii/32", "iii/128")
CEILING_BARS = {"i": 1.0, "ii": 1.25, "iii": 1.25}
TWICE = ("ii/32", "ii/128", "iii/32", "iii/128")
STAGE = "warmfleet_request_stage_seconds_sum"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A workload at a concurrency."""

    workload: str
    clients: int

    @property
    def name(self) -> str:
        """Return its name in the tables."""
        return f"{self.workload}/{self.clients}"

    @property
    def texts(self) -> int:
        """Return what is in flight."""
        return self.clients * WORKLOADS[self.workload]

    @property
    def words(self) -> str:
        """Return the set of texts, as ceiling.py names it."""
        return "short" if self.workload == "i" else "mixed"


CELLS = tuple(Cell(workload=name, clients=clients) for name in WORKLOADS for clients in CLIENTS)


@dataclass(frozen=True, kw_only=True)
class System:
    """A server that is measured.

    Attributes:
        name: as the tables show it.
        processes: with a model, one torch thread each.
        ours: warmfleet.
        start: make the server; it is not started yet.
        wait: until it embeds on all workers.
        call: the request for texts.
        vectors: what a reply holds.
    """

    name: str
    processes: int
    ours: bool
    start: Callable[[], Server]
    wait: Callable[[Server], Any]
    call: Callable[[Sequence[str]], Call]
    vectors: Callable[[bytes], list[list[float]]]


def fleet(workers: int, backend: str, args: argparse.Namespace) -> System:
    """Return warmfleet."""
    settings = SETTINGS | {"backend": backend, "threads": 1} | harness.chosen_settings(args)
    suffix = "" if backend == "torch" else f"-{backend}"
    return System(
        name=f"warmfleet-{workers}w{suffix}",
        processes=workers,
        ours=True,
        start=lambda: harness.warmfleet(workers=workers, **settings),
        wait=lambda server: server.wait_ok(server.ops_port, "/ready"),
        call=lambda texts: load.post_texts("/embed", texts),
        vectors=catalogue.embeddings,
    )


def peer_system(peer: catalogue.Peer, folder: Path) -> System:
    """Return a peer."""
    return System(
        name=peer.name,
        processes=peer.workers,
        ours=False,
        start=lambda: peer.server(folder),
        wait=peer.wait_embedding,
        call=lambda texts: load.post(peer.path, peer.body(texts), len(texts)),
        vectors=peer.vectors,
    )


# ---------------------------------------------------------------------------------------------
# Texts


@cache
def requests(seed: int, number: int, cell: Cell) -> list[list[str]]:
    """Return the texts of each request of a cell in a round: the same ones for every system."""
    random, each = Random(f"{seed}/{number}/{cell.name}"), WORKLOADS[cell.workload]
    count = POOL[cell.workload]
    if cell.workload == "i":
        return [[harness.short_text(random)] for _ in range(count)]
    texts = [text for _ in range(count * each // 32) for text in load.mixed_texts(random, 32)]
    return [texts[at : at + each] for at in range(0, len(texts), each)]


# ---------------------------------------------------------------------------------------------
# Servers


async def run_cell(
    run: Load, calls: list[Call], cell: Cell, args: argparse.Namespace, look: Callable[[], None]
) -> None:
    """Run the closed loop; look four times a second where the deadline may strike."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            look()

    loop = run.closed_loop(
        cycle(calls),
        clients=cell.clients,
        seconds=args.seconds,
        least=args.least,
        deadline_s=args.deadline,
    )
    await load.beside(loop, *([watch()] if cell.texts >= 128 else []))


def measure_cell(
    system: System, server: Server, cell: Cell, calls: list[Call], args: argparse.Namespace
) -> dict[str, Any]:
    """Load a server with one cell; return its figures.

    Where the deadline cut requests off, figures are those of the last look at which there were new
    replies: CPU spent on what was never answered would make coarse batches look dear.
    """
    run, marks = Load(server.port), [(0, 0.0, 0.0)]
    stages = stage_seconds(server) if system.ours else {}
    own_s, meter = harness.own_s(), Meter(server)

    def look() -> None:
        if run.texts != marks[-1][0]:
            read = meter.read()
            marks.append((run.texts, read["wall_s"], read["server_cpu_s"]))

    uvloop.run(run_cell(run, calls, cell, args, look))
    read = meter.read()
    cut_off = bool(run.pending)
    texts, wall_s, cpu_s = (
        marks[-1] if cut_off else (run.texts, run.ended_at - run.began_at, read["server_cpu_s"])
    )
    after = stage_seconds(server) if system.ours else {}
    return {
        "texts": texts,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "per_cpu_s": texts / cpu_s if texts else 0.0,
        "per_wall_s": texts / wall_s if texts else 0.0,
        "latency_ms": run.latency_ms(),
        "statuses": run.statuses(),
        "others_cores": read["others_cores"],
        "client_cores": (harness.own_s() - own_s) / read["wall_s"],
        "stage_s": {stage: after[stage] - stages.get(stage, 0.0) for stage in after},
    }


def stage_seconds(server: Server) -> dict[str, float]:
    """Return warmfleet's seconds by stage of a request, of all workers."""
    found: dict[str, float] = {}
    for labels, value in server.metric(STAGE):
        found[labels["stage"]] = found.get(labels["stage"], 0.0) + value
    return found


def settle(server: Server, patience_s: float) -> None:
    """Wait until a server is idle, within reason: a second worker may still load, a queue may be long."""
    until = time.perf_counter() + patience_s
    while time.perf_counter() < until:
        meter = Meter(server)
        time.sleep(0.5)
        read = meter.read()
        if read["server_cpu_s"] < 0.1 * read["wall_s"]:
            return


def warm(system: System, server: Server, args: argparse.Namespace) -> None:
    """Wait until all workers embed; check a reply; let every shape of request pass."""
    system.wait(server)
    settle(server, 30)
    random = Random(args.seed)

    async def warm_up() -> None:
        connection = await load.Connection.open(server.port)
        reply = await connection.exchange(system.call(load.mixed_texts(random, 32)).wire, keep=True)
        assert reply.status == 200, f"{system.name}: {reply}"
        assert load.fits(system.vectors(bytes(reply.body or b"")), 32), system.name
        connection.close()
        for each, clients in ((1, 2 * system.processes), (1, 16), (32, system.processes)):
            calls = [system.call(load.mixed_texts(random, each)) for _ in range(64)]
            await Load(server.port).closed_loop(
                cycle(calls), clients=clients, seconds=args.warm_s / 3, deadline_s=20
            )

    uvloop.run(warm_up())
    settle(server, 5)


def measure_system(
    system: System, number: int, cells: Sequence[Cell], record: Record, args: argparse.Namespace
) -> None:
    """Start a system, and measure it in all cells; anew if the deadline left it too much work."""
    left = [*cells]
    while left:
        with system.start() as server:
            warm(system, server, args)
            idle = True
            while left and idle:
                cell = left.pop(0)
                calls = [system.call(texts) for texts in requests(args.seed, number, cell)]
                time.sleep(SETTLE_S)
                sample = measure_cell(system, server, cell, calls, args)
                record.add(kind="cell", round=number, system=system.name, cell=cell.name, **sample)
                harness.progress(f"round {number + 1}: {system.name}, {told(cell, sample)}")
                idle = not sample["latency_ms"]["cut_off"]
            if not idle:
                server.kill()  # it would compute on for those that are gone


def told(cell: Cell, sample: dict[str, Any]) -> str:
    """Say how a cell went."""
    latency = sample["latency_ms"]
    wrong = {status: n for status, n in sample["statuses"].items() if status != "200"}
    return (
        f"{cell.name}: {sample['per_cpu_s']:.0f} a CPU-second, {sample['per_wall_s']:.0f} a second, "
        f"p99 {latency.get('p99', math.nan):.0f} ms of {latency['n']}"
        f"{', cut off ' + str(latency['cut_off']) if latency['cut_off'] else ''} "
        f"[{sample['others_cores']:.2f}]{f' WRONG {wrong}' if wrong else ''}"
    )


# ---------------------------------------------------------------------------------------------
# Bare encode()


def measure_bare(name: str, number: int, record: Record, args: argparse.Namespace) -> None:
    """Run ceiling.py in so many processes at once; add up what they did."""
    command = [sys.executable, str(harness.BENCH / "ceiling.py"), harness.model_folder()]
    command += [str(args.seed + number), str(args.bare_s), *map(str, args.batch_sizes)]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(Server(command, port=0, env=catalogue.ONE_THREAD)) for _ in range(BARE[name])
        ]
        for server in servers:
            server.wait(lambda server=server: "ready: 1 torch threads" in server.log(), "one torch thread")
        began, busy_s, own_s = time.perf_counter(), harness.busy_s(), harness.own_s()
        for server in servers:
            os.kill(server.process.pid, signal.SIGUSR1)
        for server in servers:
            server.process.wait(600)
        wall_s = time.perf_counter() - began
        others_s = harness.busy_s() - busy_s - (harness.own_s() - own_s)
        children = [json.loads(server.log().strip().rpartition("\n")[2]) for server in servers]
    others_s -= sum(one["cpu_s"] for child in children for sizes in child.values() for one in sizes.values())
    sets = {
        words: {size: together([child[words][size] for child in children]) for size in sizes}
        for words, sizes in children[0].items()
    }
    others = max(0.0, others_s / wall_s)
    record.add(kind="bare", round=number, system=name, others_cores=others, sets=sets)
    shown = ", ".join(
        f"{words}/{size} {one['per_cpu_s']:.0f}" for words in sets for size, one in sets[words].items()
    )
    harness.progress(f"round {number + 1}: {name}, {shown} [{others:.2f}]")


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up what processes did at the same time."""
    return {
        "per_cpu_s": sum(run["texts"] for run in runs) / sum(run["cpu_s"] for run in runs),
        "per_wall_s": sum(run["texts"] / run["wall_s"] for run in runs),
        "latency_ms": runs[0]["latency_ms"],
    }


def ceiling(sample: dict[str, Any], words: str) -> dict[str, Any]:
    """Return the best batch size of a set of texts."""
    sizes = {size: one for size, one in sample["sets"][words].items() if size != "1"}
    best = max(sizes, key=lambda size: sizes[size]["per_cpu_s"])
    return sizes[best] | {"size": best}


# ---------------------------------------------------------------------------------------------
# Tables


class Figures:
    """What was measured, by round, system and cell."""

    def __init__(self, record: Record, systems: Sequence[System], cells: Sequence[Cell]) -> None:
        """Look the samples up."""
        cell_samples = record.of(kind="cell")
        self.rounds = sorted({sample["round"] for sample in record.samples})
        self.ours = [system for system in systems if system.ours]
        self.peers = [system for system in systems if not system.ours]
        self.cells = cells
        self._found = {(one["round"], one["system"], one["cell"]): one for one in cell_samples}
        self._bare = {(one["round"], one["system"]): one for one in record.of(kind="bare")}

    def each(self, system: System, cell: Cell) -> list[dict[str, Any]]:
        """Return the samples of a cell, one a round."""
        return [one for number in self.rounds if (one := self._found.get((number, system.name, cell.name)))]

    def values(self, system: System, cell: Cell, key: str) -> list[float]:
        """Return a figure of a cell, one a round."""
        return [value_of(one, key) for one in self.each(system, cell)]

    def best_peer(self, ours: System, cell: Cell, key: str) -> tuple[list[float], str]:
        """Return ours / the best peer's in each round, and who that was.

        By CPU-second against every peer; by wall and p99 against those with no more processes than ours.
        A p99 of ours that the deadline cut off has no ratio; with a peer's cut off it is a bound from above.
        """
        ratios, names = [], []
        for number in self.rounds:
            rivals = {
                peer.name: value_of(found, key)
                for peer in self.peers
                if (found := self._found.get((number, peer.name, cell.name)))
                and (key == "per_cpu_s" or peer.processes <= ours.processes)
            }
            rivals = {name: value for name, value in rivals.items() if value > 0}
            mine = self._found.get((number, ours.name, cell.name))
            if rivals and mine and not (key == "p99" and mine["latency_ms"]["cut_off"]):
                name = (min if key == "p99" else max)(rivals, key=lambda one: rivals[one])
                ratios.append(value_of(mine, key) / rivals[name])
                names.append(name)
        return ratios, "/".join(dict.fromkeys(names))

    def of_ceiling(self, ours: System, cell: Cell, bare: str) -> list[float]:
        """Return ours / bare encode() at its best batch size, by CPU-second, in each round."""
        return [
            self._found[number, ours.name, cell.name]["per_cpu_s"]
            / ceiling(self._bare[number, bare], cell.words)["per_cpu_s"]
            for number in self.rounds
            if (number, bare) in self._bare and (number, ours.name, cell.name) in self._found
        ]

    def of_one_encode(self, ours: System, key: str) -> list[float]:
        """Return i/1 / a bare encode() of one short text in each round: p50 or CPU a text."""
        ratios = []
        for number in self.rounds:
            mine, bare = self._found.get((number, ours.name, "i/1")), self._bare.get((number, "bare-1"))
            if mine and bare:
                one = bare["sets"]["short"]["1"]
                ratios.append(
                    value_of(mine, "p50") / one["latency_ms"]["p50"]
                    if key == "p50"
                    else one["per_cpu_s"] / mine["per_cpu_s"]
                )
        return ratios

    def encoding_percent(self, ours: System, cell: Cell) -> list[float]:
        """Return the share of a request's time that its encoding took, in each round."""
        return [
            100 * stages["encode"] / stages["total"]
            for one in self.each(ours, cell)
            if (stages := one["stage_s"]).get("total") and "encode" in stages
        ]

    def bare_samples(self, name: str) -> list[dict[str, Any]]:
        """Return the samples of bare encode(), one a round."""
        return [one for number in self.rounds if (one := self._bare.get((number, name)))]


def value_of(sample: dict[str, Any], key: str) -> float:
    """Return a figure of a cell, or a quantile in milliseconds; NaN if nothing was answered."""
    value: float = (
        sample["latency_ms"].get(key, math.nan) if key.startswith("p9") or key == "p50" else sample[key]
    )
    return value


def bar(ratios: Iterable[float], limit: float, *, most: bool = False) -> str:
    """Say whether the median reaches (or, if most, stays within) a limit."""
    value = median(ratios)
    if math.isnan(value):
        return "-"
    return harness.verdict(value, limit) if most else harness.verdict(-value, -limit)


def print_systems(figures: Figures) -> None:
    """Print a row for each system."""
    head = ["system", *(cell.name for cell in figures.cells)]
    systems = [*figures.ours, *figures.peers]
    for key, title in (
        ("per_cpu_s", "Embeddings per server CPU-second"),
        ("per_wall_s", "Embeddings per second"),
    ):
        rows = [
            [system.name, *(spread(figures.values(system, cell, key), 0) for cell in figures.cells)]
            for system in systems
        ]
        print(f"\n{title}; median (least-most) of {len(figures.rounds)} rounds.\n")
        print(table(head, rows))
    print("\nLatency, ms: p50 / p95 / p99 (replies of all rounds); > where the deadline cut requests off.\n")
    rows = [
        [system.name, *(latency(figures.each(system, cell)) for cell in figures.cells)] for system in systems
    ]
    print(table(head, rows))
    print("\nCores of others, median of the rounds; WRONG where a reply was not 200.\n")
    rows = [
        [system.name, *(noise(figures.each(system, cell)) for cell in figures.cells)] for system in systems
    ]
    print(table(head, rows))


def latency(samples: Sequence[dict[str, Any]]) -> str:
    """Return the median over rounds of three quantiles, and the number of replies."""
    if not samples:
        return "-"
    shown = "/".join(f"{median(value_of(one, key) for one in samples):.0f}" for key in ("p50", "p95", "p99"))
    cut_off = any(one["latency_ms"]["cut_off"] for one in samples)
    return f"{'>' if cut_off else ''}{shown} ({sum(one['latency_ms']['n'] for one in samples)})"


def noise(samples: Sequence[dict[str, Any]]) -> str:
    """Return the cores of others, and what went wrong."""
    wrong = sum(n for one in samples for status, n in one["statuses"].items() if status != "200")
    return f"{median(one['others_cores'] for one in samples):.2f}{f' WRONG {wrong}' if wrong else ''}"


def print_bare(figures: Figures) -> dict[str, Any]:
    """Print bare encode() by batch size."""
    rows, summary = [], {}
    for name in BARE:
        samples = figures.bare_samples(name)
        for words in ("short", "mixed") if samples else ():
            sizes = samples[0]["sets"][words]
            cells = [
                spread((one["sets"][words][size]["per_cpu_s"] for one in samples), 0)
                for size in sorted(sizes, key=int)
            ]
            best = [ceiling(one, words) for one in samples]
            rows.append([name, words, *cells, "/".join(dict.fromkeys(one["size"] for one in best))])
            summary[f"{name}, {words}"] = median(one["per_cpu_s"] for one in best)
            head = ["processes", "texts", *(f"by {size}" for size in sorted(sizes, key=int)), "best"]
    if rows:
        print(
            "\nBare encode(), texts per CPU-second: one text a call, or 256, sorted, in batches of a size.\n"
        )
        print(table(head, rows))
    return summary


def print_ratios(figures: Figures, ours: System) -> dict[str, Any]:
    """Print one of ours against the best peer and the ceiling, with the bars."""
    rows, summary = [], {}
    alone = "bare-1"
    beside = "bare-2" if ours.processes > 1 else "bare-1"
    for cell in figures.cells:
        cpu, cpu_name = figures.best_peer(ours, cell, "per_cpu_s")
        wall, wall_name = figures.best_peer(ours, cell, "per_wall_s")
        p99, p99_name = figures.best_peer(ours, cell, "p99")
        top, beside_top = figures.of_ceiling(ours, cell, alone), figures.of_ceiling(ours, cell, beside)
        limit = 2.0 if cell.name in TWICE else 1.0
        counts = sum(one["latency_ms"]["n"] for one in figures.each(ours, cell))
        ceiling_bar = bar(top, CEILING_BARS[cell.workload]) if cell.name in SATURATED else "-"
        rows.append(
            [
                cell.name,
                f"{spread(cpu)} {cpu_name}",
                f"{limit:g}: {bar(cpu, limit)}",
                f"{spread(wall)} {wall_name}",
                f"{spread(p99)} {p99_name} ({counts})",
                bar(p99, 1.0, most=True),
                spread(top),
                spread(beside_top),
                ceiling_bar,
            ]
        )
        summary[cell.name] = {
            "per_cpu_s": median(figures.values(ours, cell, "per_cpu_s")),
            "per_wall_s": median(figures.values(ours, cell, "per_wall_s")),
            "p99_ms": median(figures.values(ours, cell, "p99")),
            "replies": counts,
            "cpu_ratio": median(cpu),
            "wall_ratio": median(wall),
            "p99_ratio": median(p99),
            "ceiling_ratio": median(top),
            "ceiling_beside_ratio": median(beside_top),
        }
    print(f"\n{ours.name} / best peer of the round, and / bare encode(); median (least-most).\n")
    head = ["cell", "by CPU-second", "bar", "by second", "p99 (replies)", "bar 1"]
    print(table([*head, f"/ {alone}", f"/ {beside}", "bar"], rows))
    encoding = {
        cell.name: values
        for cell in figures.cells
        if cell.workload == "iii" and (values := figures.encoding_percent(ours, cell))
    }
    for name, values in encoding.items():
        verdict = bar(values, 2.0, most=True)
        print(f"\nEncoding of a reply in {name}: {spread(values)} % of the request, bar 2: {verdict}")
    one, one_cpu = figures.of_one_encode(ours, "p50"), figures.of_one_encode(ours, "cpu")
    verdict = bar(one, 1.0, most=True)
    print(f"\ni/1 / a bare encode() of one short text: p50 {spread(one)}, bar 1: {verdict}")
    print(f"The same by CPU: {spread(one_cpu)}")
    summary["encoding_percent"] = {name: median(values) for name, values in encoding.items()}
    summary["one_text_p50_ratio"], summary["one_text_cpu_ratio"] = median(one), median(one_cpu)
    return summary


def summarise(record: Record, systems: Sequence[System], cells: Sequence[Cell]) -> dict[str, Any]:
    """Print everything."""
    figures = Figures(record, systems, cells)
    shown = ", ".join(f"{name}={value}" for name, value in SETTINGS.items())
    print(f"\nwarmfleet with {shown}: nothing is refused. One torch thread a process everywhere.")
    print_systems(figures)
    summary: dict[str, Any] = {"bare": print_bare(figures)}
    for ours in figures.ours:
        summary[ours.name] = print_ratios(figures, ours)
    return summary


# ---------------------------------------------------------------------------------------------


def all_systems(args: argparse.Namespace) -> dict[str, System]:
    """Return every system by name; peers only where their environment is made."""
    ours = [fleet(workers, backend, args) for backend in BACKENDS for workers in (1, 2)]
    theirs = [
        peer_system(peer, args.peers_folder)
        for peer in catalogue.PEERS
        if environments.complete(peer.environment, args.peers_folder)
    ]
    return {system.name: system for system in [*ours, *theirs]}


def estimate_s(systems: Sequence[System], cells: Sequence[Cell], args: argparse.Namespace) -> float:
    """Guess how long all rounds will take."""

    def cell_s(system: System, cell: Cell) -> float:
        drain_s = cell.texts / (GUESS[cell.workload] * system.processes)
        return min(args.deadline, args.seconds + drain_s) + SETTLE_S

    sizes = 2 * (1 + len(args.batch_sizes))
    bare_s = len(args.bare) * (8 + sizes * (args.bare_s + 1))
    return sum(
        bare_s
        + sum(
            BOOT_S + args.warm_s + sum(cell_s(system, cell) for cell in cells_of(number, cells, args))
            for system in systems
        )
        for number in range(args.rounds)
    )


def cells_of(number: int, cells: Sequence[Cell], args: argparse.Namespace) -> list[Cell]:
    """Return the cells of a round."""
    return [cell for cell in cells if number == 0 or cell.name not in args.once]


def ordered(random: Random, cells: Sequence[Cell]) -> list[Cell]:
    """Shuffle the cells; those that may leave a server with work that nobody waits for come last."""
    shuffled = random.sample(cells, len(cells))
    return sorted(shuffled, key=lambda cell: cell.texts if cell.texts >= 1024 else 0)


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=2)
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="only these (all peers, torch for ours)")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="not these")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["torch"],
        choices=BACKENDS,
        help="of ours, unless --systems names them (%(default)s)",
    )
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="such as i/1 ii/32 (all)")
    parser.add_argument(
        "--once", nargs="*", default=["iii/128"], metavar="CELL", help="only in the first round (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=3, help="that a cell sends for (%(default)s)")
    parser.add_argument("--least", type=int, default=8, help="replies of a cell (%(default)s)")
    parser.add_argument("--deadline", type=float, default=20, help="seconds of a cell at most (%(default)s)")
    parser.add_argument("--warm-s", type=float, default=3, help="load before the cells (%(default)s)")
    parser.add_argument("--bare", nargs="*", default=[*BARE], choices=[*BARE], help="ceilings (%(default)s)")
    parser.add_argument("--bare-s", type=float, default=2, help="of each batch size (%(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="(%(default)s)")
    parser.add_argument(
        "--peers-folder", type=Path, default=environments.FOLDER, help="of environments (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one short round, to see that all of it works")
    harness.settings_option(parser)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.deadline, args.warm_s, args.bare_s = 1, 1.0, 4.0, 1.5, 0.3
        args.least = 1
    found = all_systems(args)
    backends = {f"warmfleet-{n}w{'' if b == 'torch' else f'-{b}'}" for b in args.backends for n in (1, 2)}
    wanted = args.systems or [name for name in found if not found[name].ours or name in backends]
    if unknown := {*wanted, *args.skip} - {*found, *BARE}:
        parser.error(f"no such system, or its environment is not made: {', '.join(sorted(unknown))}")
    systems = [found[name] for name in wanted if name in found and name not in args.skip]
    cells = [cell for cell in CELLS if not args.cells or cell.name in args.cells]
    if args.cells and len(cells) != len(set(args.cells)):
        parser.error(f"cells are {', '.join(cell.name for cell in CELLS)}")
    if missing := [peer.name for peer in catalogue.PEERS if peer.name not in found]:
        harness.progress(f"left out, no environment in {args.peers_folder}: {', '.join(missing)}")
    minutes = estimate_s(systems, cells, args) / 60
    harness.progress(
        f"{len(systems)} systems, {len(cells)} cells, {args.rounds} rounds: about {minutes:.0f} min"
    )
    harness.warm_page_cache()
    random, record = Random(args.seed), Record("throughput", args)
    began = time.perf_counter()
    for number in range(args.rounds):
        units: list[System | str] = [*systems, *args.bare]
        for unit in random.sample(units, len(units)):
            if isinstance(unit, str):
                measure_bare(unit, number, record, args)
            else:
                measure_system(unit, number, ordered(random, cells_of(number, cells, args)), record, args)
        record.save()
    harness.progress(f"took {(time.perf_counter() - began) / 60:.1f} min")
    record.finish(summarise(record, systems, cells))


if __name__ == "__main__":
    main()
