# SPDX-License-Identifier: Apache-2.0
"""Start each peer in turn, and hold its vectors against `SentenceTransformer.encode`: no benchmark.

Makes the environments that are missing. Run by the project's own Python; NAMEs as in catalogue.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import environments
from catalogue import BY_NAME, Peer, harness

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TOLERANCE = 1e-4
REFERENCE = """
import json, sys, sentence_transformers
model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
json.dump([model.encode(text).tolist() for text in json.load(sys.stdin)], sys.stdout)
"""


def reference(texts: Sequence[str]) -> list[list[float]]:
    """Embed each text alone, in the tutorial server's environment."""
    command = [environments.FOLDER / "tutorial/bin/python", "-c", REFERENCE, harness.model_folder()]
    done = subprocess.run(command, input=json.dumps(texts), check=True, capture_output=True, text=True)
    found: list[list[float]] = json.loads(done.stdout)
    return found


def furthest(found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> float:
    """Return the largest difference of any number; the shapes must be the same."""
    pairs = zip(found, wanted, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


def thread_limits(server: harness.Server) -> set[str]:
    """Return what OMP_NUM_THREADS is in the processes of a server."""
    environs = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in server.pids()]
    return {pair.decode() for environ in environs for pair in environ if pair.startswith(b"OMP_NUM_THREADS")}


def command(pid: int) -> str:
    """Return how a process names itself, shortened."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return " ".join(Path(word).name[:40] for word in words[:4]).strip()


def try_peer(
    peer: Peer, texts: Sequence[str], wanted: Sequence[Sequence[float]], seconds: float
) -> dict[str, str]:
    """Start a peer, check it, keep it busy with 32 texts a request for a moment; return a row by heads."""
    with peer.server() as server:
        server.wait_ok(server.port, peer.ready)
        up_s, first_s = server.since_exec(), peer.wait_embedding(server)
        one, all_ = peer.embed(server.port, texts[:1]), peer.embed(server.port, texts)
        apart = furthest(peer.vectors(one.body) + peer.vectors(all_.body), [wanted[0], *wanted])
        assert apart <= TOLERANCE, f"{peer.name} is {apart:g} away from encode()"
        assert thread_limits(server) == {"OMP_NUM_THREADS=1"}
        busy = cores(server, lambda: peer.embed(server.port, texts), seconds)
        idle = cores(server, lambda: time.sleep(seconds), seconds)
        memory = server.memory()
        server.process.terminate()
        began = time.perf_counter()
        server.process.wait(20)
        end_s, left = time.perf_counter() - began, [command(pid) for pid in server.pids()]
    return {
        "peer": peer.name,
        "up, s": f"{up_s:.1f}",
        "first embedding, s": f"{first_s:.1f}",
        "furthest from encode()": f"{apart:.0e}",
        "reply of 1 / 32, bytes": f"{len(one.body)} / {len(all_.body)}",
        "cores, one client": f"{busy:.2f}",
        "cores, idle": f"{idle:.2f}",
        "PSS, MB": f"{sum(process['pss'] for process in memory):.0f}",
        "processes": str(len(memory)),
        "end after SIGTERM, s": f"{end_s:.1f}",
        "left then": f"{len(left)} {sorted(set(left))}" if left else "0",
    }


def cores(server: harness.Server, once: Callable[[], object], seconds: float) -> float:
    """Return the cores that a server uses while something is done again and again."""
    began, cpu_s = time.perf_counter(), server.cpu_s()
    while time.perf_counter() < began + seconds:
        once()
    return (server.cpu_s() - cpu_s) / (time.perf_counter() - began)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BY_NAME)} (all)")
    parser.add_argument("--seconds", type=float, default=1, help="to keep each busy (%(default)s)")
    args = parser.parse_args()
    peers = [BY_NAME[name] for name in args.names or BY_NAME]
    for name in sorted({"tutorial"} | {peer.environment for peer in peers}):
        environments.make(name)
    random = Random(7)
    texts = [harness.mixed_text(random) for _ in range(32)]
    wanted = reference(texts)
    rows: list[dict[str, str]] = []
    for peer in peers:
        rows.append(try_peer(peer, texts, wanted, args.seconds))
        harness.progress(str(rows[-1]))
    print(harness.table(list(rows[0]), [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
