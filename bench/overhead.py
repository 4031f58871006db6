# SPDX-License-Identifier: Apache-2.0
"""What warmfleet's own path costs a request: one stub worker with no forward, beside bare FastAPI on uvicorn.

Both answer the same bytes to the same keep-alive clients in a closed loop, one after the other, in
rounds. Client and server share the machine: judge by the server's CPU a request, not by the rate.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import harness
from harness import KeepAlive, Meter, Record, Server, median, spread, table

if TYPE_CHECKING:
    import argparse

TEXTS = ["what does a request cost"]
SETTLE_S = 0.5


async def load(port: int, clients: int, seconds: float) -> int:
    """Keep so many clients busy; return the requests answered."""
    until = time.perf_counter() + seconds

    async def client() -> int:
        connection, count = KeepAlive(port, TEXTS), 0
        while time.perf_counter() < until:
            assert await connection.send() == 200
            count += 1
        connection.close()
        return count

    return sum(await asyncio.gather(*(client() for _ in range(clients))))


def measure(server: Server, args: argparse.Namespace) -> dict[str, float]:
    """Load one server; return its rate and its CPU a request."""
    asyncio.run(load(server.port, args.clients, SETTLE_S))
    meter = Meter(server)
    requests = asyncio.run(load(server.port, args.clients, args.seconds))
    read = meter.read()
    return {
        "requests": requests,
        "per_second": requests / read["wall_s"],
        "cpu_us": 1e6 * read["server_cpu_s"] / requests,
        "others_cores": read["others_cores"],
    }


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--clients", type=int, default=8, help="with keep-alive (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="of load on each, each round (%(default)s)")
    args = parser.parse_args()
    random, record = Random(args.seed), Record("overhead", args)
    settings = {"backend": "stub", "stub_forward_ms": 0, "warmup_shapes": "1x8"}
    with tempfile.NamedTemporaryFile() as reply, harness.warmfleet(workers=1, **settings) as fleet:
        fleet.wait_ok(fleet.ops_port, "/ready")
        Path(reply.name).write_bytes(harness.embed(fleet.port, TEXTS).body)
        (port,) = harness.free_ports(1)
        command = harness.uvicorn_command("bare_app:app", port)
        with Server(command, port=port, env={"REPLY": reply.name}) as bare:
            bare.wait(lambda: harness.try_request(bare.port, "/openapi.json"), "an answer")
            servers = {"warmfleet": fleet, "bare": bare}
            for number in range(args.rounds):
                for name in random.sample(sorted(servers), len(servers)):
                    record.add(round=number, system=name, **measure(servers[name], args))
    rows, summary = [], {}
    bare_cpu = {sample["round"]: sample["cpu_us"] for sample in record.of(system="bare")}
    for name in servers:
        samples = record.of(system=name)
        ratios = [sample["cpu_us"] / bare_cpu[sample["round"]] for sample in samples]
        rows.append(
            (
                name,
                spread((s["per_second"] for s in samples), 0),
                spread((s["cpu_us"] for s in samples), 0),
                spread(ratios),
                f"{median(s['others_cores'] for s in samples):.2f}",
            )
        )
        summary[name] = {"cpu_us": median(s["cpu_us"] for s in samples), "cpu_ratio": median(ratios)}
    print(f"\n{args.clients} keep-alive clients, one text a request, no forward; median (least-most).\n")
    print(table(["system", "requests/s", "server CPU, us a request", "CPU ratio", "others' cores"], rows))
    record.finish(summary)


if __name__ == "__main__":
    main()
