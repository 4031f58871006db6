# SPDX-License-Identifier: Apache-2.0
"""Soak: minutes of mixed load while workers are killed at random; what is lost, miscounted, leaked or untrue.

Sixteen clients in a closed loop send short, mixed and 32-text requests to `/embed` and, where it exists,
to `/v1/embeddings`; nothing is retried. Every 20 seconds or so a random READY worker is stopped, the sockets
it holds are read from /proc, and it is killed: so each lost request can be told from its local port to have
been in that worker's hands. At the end counters are held against what the clients counted, within bounds
that follow from the kills: a worker counts a text before it replies, and a request after that.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import harness
import load
import uvloop
from harness import Meter, Record, Server, table
from load import Call, Load, Outcome, Probe, Reply, fetch

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

MIXTURE = {"short": 4, "mixed": 4, "batch": 2}
"""How many of ten requests are one short text, one mixed text, 32 mixed texts."""
NEAR_S = 1.0
"""Within this time of a kill its victims must have noticed."""
UNCOUNTED_S = 0.1
"""A reply so shortly before a kill may not have been counted yet."""
READY_BAR_S = 0.25
"""A heartbeat (0.1 s), the time between two polls (0.05 s), and the scheduler's part on full cores."""
TREND_BAR_PERCENT = 0.5
READY_EVERY_S, MEMORY_EVERY_S = 0.05, 5.0
POOL = 2048


# ---------------------------------------------------------------------------------------------
# Requests


def endpoints(server: Server) -> list[tuple[str, str | None]]:
    """Return the paths, and the key of the texts in the body, that this server has."""
    found: list[tuple[str, str | None]] = [("/embed", None), ("/embed", "inputs")]
    call = load.post_texts("/v1/embeddings", ["is there OpenAI's API?"], "input")

    async def ask() -> int:
        connection = await load.Connection.open(server.port)
        return (await connection.exchange(call.wire)).status

    status = uvloop.run(ask())
    if status == 200:
        found.append(("/v1/embeddings", "input"))
    else:
        harness.progress(f"/v1/embeddings answers {status}: left out")
    return found


def requests(random: Random, paths: list[tuple[str, str | None]]) -> Iterator[Call]:
    """Return requests of all kinds to all endpoints, without end."""
    kinds = random.choices([*MIXTURE], weights=[*MIXTURE.values()], k=POOL)
    pool = []
    for kind in kinds:
        path, key = random.choice(paths)
        texts = [harness.short_text(random)] if kind == "short" else []
        texts = texts or [harness.mixed_text(random) for _ in range(32 if kind == "batch" else 1)]
        pool.append(load.post_texts(path, texts, key, kind=f"{path} {key or 'array'} {kind}"))
    while True:
        yield random.choice(pool)


# ---------------------------------------------------------------------------------------------
# Kills


def ports_of(pid: int, port: int) -> set[int]:
    """Return the clients' ports of all connections to a port that a process holds."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.update(re.findall(r"socket:\[(\d+)\]", str(entry.readlink())))
    found = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, *rest = line.split()
        if int(local.rpartition(":")[2], 16) == port and rest[6] in inodes:
            found.add(int(remote.rpartition(":")[2], 16))
    return found - {0}


class Killer:
    """Kills a random READY worker again and again, unless it is the last one."""

    def __init__(self, server: Server, run: Load, random: Random, every_s: float) -> None:
        """Prepare."""
        self.kills: list[dict[str, Any]] = []
        self._server, self._run, self._random, self._every_s = server, run, random, every_s

    async def run(self, seconds: float) -> None:
        """Kill at random intervals around the mean, for so long; leave the last one time to be replaced."""
        until = time.perf_counter() + seconds - self._every_s / 2
        while True:
            await asyncio.sleep(self._every_s * self._random.uniform(0.5, 1.5))
            if time.perf_counter() > until:
                return
            reply = await fetch(self._server.ops_port, "/workers")
            rows = [row for row in reply.json()["workers"] if row["state"] == "ready"] if reply else []
            if len(rows) > 1:
                self._kill(self._random.choice(rows), len(rows))

    def _kill(self, row: dict[str, Any], ready: int) -> None:
        """Stop it, see whose requests it holds, and kill it."""
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(row["pid"], signal.SIGSTOP)
            stopped_at = time.perf_counter()
            ports = ports_of(row["pid"], self._server.port)
            os.kill(row["pid"], signal.SIGKILL)
            held = [one for one in self._run.pending.values() if one.local_port in ports]
            self.kills.append(
                {
                    "slot": row["slot"],
                    "pid": row["pid"],
                    "at": stopped_at,
                    "held_ms": 1e3 * (time.perf_counter() - stopped_at),
                    "ready": ready,
                    "said_in_flight": row["requests_in_flight"],
                    "ports": ports,
                    "in_flight": len(held),
                    "in_flight_texts": sum(one.call.texts for one in held),
                }
            )
            kill = self.kills[-1]
            harness.progress(
                f"kill {len(self.kills)}: slot {kill['slot']}, {kill['in_flight']} requests in flight"
            )


def killer_of(outcome: Outcome, kills: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the kill that took a request: the connection was that worker's, and it ended right then."""
    for kill in kills:
        near = kill["at"] <= outcome.done_at <= kill["at"] + NEAR_S
        if outcome.local_port in kill["ports"] and near:
            return kill
    return None


# ---------------------------------------------------------------------------------------------
# Counters


def counters(server: Server) -> dict[str, dict[str, float]]:
    """Return texts, and requests by endpoint and status, summed over the slots."""
    requests_by: dict[str, float] = {}
    for labels, value in server.metric("warmfleet_requests_total"):
        key = f"{labels['endpoint']} {labels['status']}"
        requests_by[key] = requests_by.get(key, 0.0) + value
    texts = sum(value for _, value in server.metric("warmfleet_texts_total"))
    return {"texts": {"all": texts}, "requests": requests_by}


def settled_counters(server: Server) -> dict[str, dict[str, float]]:
    """Return the counters once they stand still: a request is counted a moment after its reply."""
    before = counters(server)
    while True:
        time.sleep(0.5)
        after = counters(server)
        if after == before:
            return after
        before = after


def bounds(
    run: Load, kills: list[dict[str, Any]], before: dict[str, Any], after: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return what the workers counted, and within what it must lie by the clients' count.

    A lost request may have been computed, and counted, or not. A request that a killed worker answered
    in its last moment may not have been counted: the count follows the reply.
    """
    texts = sum(one.call.texts for one in run.of(200))
    lost = [one for one in run.done if one.status == load.LOST]
    rows = [
        {
            "figure": "texts",
            "workers": after["texts"]["all"] - before["texts"]["all"],
            "least": texts,
            "clients": texts,
            "most": texts + sum(one.call.texts for one in lost),
        }
    ]
    seen = Counter(f"{path_of(one)} {one.status}" for one in run.done if one.status != load.LOST)
    paths = {path_of(one) for one in run.done}
    counted = {key for key in after["requests"] if key.split()[0] in paths}
    for key in sorted({*seen, *counted}):
        path, status = key.split()
        late = [
            one
            for one in run.done
            if path_of(one) == path and str(one.status) == status and answered_last(one, kills)
        ]
        rows.append(
            {
                "figure": f"requests {key}",
                "workers": after["requests"].get(key, 0.0) - before["requests"].get(key, 0.0),
                "least": seen[key] - len(late),
                "clients": seen[key],
                "most": seen[key] + sum(path_of(one) == path for one in lost),
            }
        )
    return rows


def path_of(outcome: Outcome) -> str:
    """Return the endpoint of a request."""
    return outcome.call.kind.split()[0]


def answered_last(outcome: Outcome, kills: list[dict[str, Any]]) -> bool:
    """Tell whether a killed worker answered this in its last moment."""
    return any(
        outcome.local_port in kill["ports"] and -UNCOUNTED_S <= outcome.done_at - kill["at"] <= NEAR_S
        for kill in kills
    )


# ---------------------------------------------------------------------------------------------
# /ready and memory


def ready_note(reply: Reply) -> dict[str, Any]:
    """Keep of /ready what can be wrong."""
    payload = reply.json()
    ready = [row["pid"] for row in payload["workers"] if row["state"] == "ready"]
    return {"ready": ready, "said": payload["ready_workers"], "detail": payload["detail"]}


def judge_ready(probe: Probe, kills: list[dict[str, Any]], floor: int) -> dict[str, Any]:
    """Return how long a dead worker was still told to be ready, and how often the status was wrong."""
    stale = []
    for kill in kills:
        told = [
            look.at - kill["at"] for look in probe.looks if look.note and kill["pid"] in look.note["ready"]
        ]
        stale.append(max(0.0, *told) if told else 0.0)
    wrong = [
        {"at": look.at, "status": look.status} | look.note
        for look in probe.looks
        if look.note and (look.status == 200) != (len(look.note["ready"]) >= floor)
    ]
    unanswered = [look.at for look in probe.looks if look.status is None]
    strays = [
        at for at in unanswered if not any(0 <= at + NEAR_S - kill["at"] <= 2 * NEAR_S for kill in kills)
    ]
    return {
        "stale_s": stale,
        "wrong_status": wrong,
        "unanswered": len(unanswered),
        "unanswered_strays": len(strays),
        "least_ready": min((len(look.note["ready"]) for look in probe.looks if look.note), default=0),
    } | probe.summary()


async def watch_memory(server: Server, workers: int, points: list[tuple[float, float, bool]]) -> None:
    """Read the PSS of the tree every few seconds, and whether all workers were ready by then."""
    while True:
        reply = await fetch(server.ops_port, "/ready")
        whole = reply is not None and reply.json()["ready_workers"] == workers
        pss = await asyncio.to_thread(lambda: sum(one["pss"] for one in server.memory()))
        points.append((time.perf_counter(), pss, whole))
        await asyncio.sleep(MEMORY_EVERY_S)


# ---------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, record: Record) -> dict[str, Any]:
    """Boot, load and kill for so long, then look at everything."""
    random, seconds = Random(args.seed), 60 * args.minutes
    settings = {"backend": args.backend} | harness.chosen_settings(args)
    with harness.warmfleet(workers=args.workers, **settings) as server:
        server.wait_ok(server.ops_port, "/ready")
        paths = endpoints(server)
        before = settled_counters(server)
        run = Load(server.port)
        killer = Killer(server, run, random, args.kill_every)
        ready = Probe(server.ops_port, "/ready", READY_EVERY_S, ready_note)
        points: list[tuple[float, float, bool]] = []
        meter, own_s = Meter(server), harness.own_s()

        async def everything() -> None:
            loop = run.closed_loop(
                requests(random, paths), clients=args.clients, seconds=seconds, deadline_s=seconds + 120
            )
            await load.beside(
                loop, killer.run(seconds), ready.run(), watch_memory(server, args.workers, points)
            )

        uvloop.run(everything())
        read = meter.read()
        after = settled_counters(server)
        rows = server.workers()
    kills = killer.kills
    lost = [one for one in run.done if one.status == load.LOST]
    found = {
        "paths": [f"{path} {key or 'array'}" for path, key in paths],
        "statuses": run.statuses(),
        "texts": run.texts,
        "latency_ms": run.latency_ms(),
        "kinds": dict(Counter(one.call.kind for one in run.of(200))),
        "kills": [kill | {"at": kill["at"] - run.began_at, "ports": len(kill["ports"])} for kill in kills],
        "lost": [
            {
                "at": one.done_at - run.began_at,
                "kind": one.call.kind,
                "error": one.error,
                "kill": kills.index(kill) + 1 if (kill := killer_of(one, kills)) else None,
                "sent_after_the_kill": bool(kill and one.due_at > kill["at"]),
            }
            for one in lost
        ],
        "bounds": bounds(run, kills, before, after),
        "ready": judge_ready(ready, kills, 1),
        "pss": [(at - run.began_at, pss, whole) for at, pss, whole in points],
        "generations": {slot: row["generation"] for slot, row in rows.items()},
        "others_cores": read["others_cores"],
        "client_cores": (harness.own_s() - own_s) / read["wall_s"],
    }
    record.add(**found)
    return found


def summarise(found: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Print what happened, and the bars."""
    kills, lost, ready = found["kills"], found["lost"], found["ready"]
    latency = found["latency_ms"]
    print(
        f"\n{args.workers} workers, {args.clients} clients, {args.minutes:g} min, {len(kills)} kills; "
        f"{found['texts']} texts answered, p50 {latency['p50']:.0f} ms, p99 {latency['p99']:.0f} ms of "
        f"{latency['n']}; others' cores {found['others_cores']:.2f}.\n"
    )
    print(table(["status", "requests"], sorted(found["statuses"].items())))
    print("\nRequests lost by kill: those in flight on the killed worker are the most that may be.\n")
    rows = [
        [
            number,
            f"{kill['at']:.1f}",
            kill["slot"],
            kill["ready"],
            kill["in_flight"],
            kill["said_in_flight"],
            sum(one["kill"] == number for one in lost),
            sum(one["kill"] == number and one["sent_after_the_kill"] for one in lost),
            f"{1e3 * stale:.0f}",
        ]
        for number, (kill, stale) in enumerate(zip(kills, ready["stale_s"], strict=True), 1)
    ]
    head = ["kill", "at, s", "slot", "ready then", "in flight", "/workers said", "lost", "sent after it"]
    print(table([*head, "/ready knew after, ms"], rows))
    print("\nCounters of all slots against the clients' count.\n")
    rows = [
        [row[key] for key in ("figure", "workers", "least", "clients", "most")] for row in found["bounds"]
    ]
    print(table(["figure", "workers counted", "at least", "clients counted", "at most"], rows))
    return bars(found, args)


def bars(found: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Print the bars."""
    kills, lost, ready = found["kills"], found["lost"], found["ready"]
    over = sum(
        max(
            0,
            sum(one["kill"] == number and not one["sent_after_the_kill"] for one in lost) - kill["in_flight"],
        )
        for number, kill in enumerate(kills, 1)
    )
    stray = sum(one["kill"] is None for one in lost)
    wrong = sum(n for status, n in found["statuses"].items() if status.isdecimal() and status != "200")
    outside = [row["figure"] for row in found["bounds"] if not row["least"] <= row["workers"] <= row["most"]]
    start_s = min(120.0, 60 * args.minutes / 3)
    points = [(at, pss) for at, pss, whole in found["pss"] if at >= start_s and whole]
    slope, error = load.slope_per_minute(points)
    pss = harness.median(value for _, value in points)
    percent = 100 * slope / pss
    stale = max(ready["stale_s"], default=0.0)
    unexplained_polls = ready["unanswered_strays"] + len(ready["wrong_status"])
    rows = [
        ["lost, not in flight on a killed worker", stray, "0", harness.verdict(stray, 0)],
        ["lost beyond what a killed worker held", over, "0", harness.verdict(over, 0)],
        ["replies other than 200", wrong, "0", harness.verdict(wrong, 0)],
        ["counters out of bounds", ", ".join(outside) or 0, "0", harness.verdict(len(outside), 0)],
        [
            f"PSS, % a minute ({len(points)} looks with all workers, {pss:.0f} MB)",
            f"{percent:+.2f} +- {100 * error / pss:.2f}",
            f"{TREND_BAR_PERCENT:g}",
            harness.verdict(percent - 2 * 100 * error / pss, TREND_BAR_PERCENT) if len(points) > 2 else "-",
        ],
        [
            "/ready told of a dead worker, s",
            f"{stale:.2f}",
            f"{READY_BAR_S:g}",
            harness.verdict(stale, READY_BAR_S),
        ],
        [
            f"/ready wrong or silent away from a kill, of {ready['n']}",
            unexplained_polls,
            "0",
            harness.verdict(unexplained_polls, 0),
        ],
    ]
    print("\nBars.\n")
    print(table(["figure", "value", "bar", ""], rows))
    return {
        "kills": len(kills),
        "texts": found["texts"],
        "lost": len(lost),
        "bars": [dict(zip(("figure", "value", "bar", "verdict"), row, strict=True)) for row in rows],
    }


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=1)
    parser.add_argument("--minutes", type=float, default=10, help="of load (%(default)s)")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop (%(default)s)")
    parser.add_argument("--kill-every", type=float, default=20, help="seconds, on average (%(default)s)")
    harness.settings_option(parser)
    args = parser.parse_args()
    harness.progress(f"{args.rounds} round(s) of about {args.minutes + 0.5:.1f} min")
    record = Record("soak", args)
    summaries = []
    for _ in range(args.rounds):
        summaries.append(summarise(measure(args, record), args))
        record.save()
    record.finish(summaries)


if __name__ == "__main__":
    main()
