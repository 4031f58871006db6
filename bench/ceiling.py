# SPDX-License-Identifier: Apache-2.0
"""`model.encode` in a process of its own, without any server: what throughput.py holds servers against.

Run by it as `python ceiling.py MODEL SEED SECONDS SIZE...`; begins at SIGUSR1, so that two can begin at
once, and prints one line of JSON. 256 texts a call, which encode() sorts by length and cuts into batches of
each size; and one text a call. Threads are the caller's affair (OMP_NUM_THREADS).
"""

from __future__ import annotations

import json
import signal
import sys
import time
from random import Random
from typing import TYPE_CHECKING, Any

from harness import short_text
from load import latency_ms, mixed_texts

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW = 256


def timed(step: Callable[[int], Any], texts: int, seconds: float) -> dict[str, Any]:
    """Repeat a step for so long; return texts, wall and CPU seconds, and the quantiles of a step."""
    steps: list[float] = []
    began, cpu = time.perf_counter(), time.process_time()
    while not steps or time.perf_counter() - began < seconds:
        at = time.perf_counter()
        step(len(steps))
        steps.append(time.perf_counter() - at)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return {
        "texts": texts * len(steps),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "latency_ms": latency_ms(steps),
    }


def main() -> None:
    """Load, wait for the signal, measure, print."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    folder, seed, seconds, *sizes = sys.argv[1:]
    import torch
    from sentence_transformers import SentenceTransformer

    random, model = Random(int(seed)), SentenceTransformer(folder, device="cpu")
    sets = {
        "short": [short_text(random) for _ in range(WINDOW)],
        "mixed": mixed_texts(random, WINDOW),
    }

    def encode(texts: list[str], size: int = 32) -> None:
        model.encode(texts, batch_size=size, show_progress_bar=False)

    for texts in sets.values():
        encode(texts, 8)
    print(f"ready: {torch.get_num_threads()} torch threads", flush=True)
    signal.sigwait({signal.SIGUSR1})
    plan: list[tuple[str, int]] = [(name, int(size)) for name in sets for size in [1, *sizes]]
    found: dict[str, dict[int, Any]] = {name: {} for name in sets}
    for name, size in random.sample(plan, len(plan)):
        texts = sets[name]
        if size == 1:
            found[name][1] = timed(lambda n, texts=texts: encode(texts[n % WINDOW :][:1]), 1, float(seconds))
        else:
            found[name][size] = timed(
                lambda _, texts=texts, size=size: encode(texts, size), WINDOW, float(seconds)
            )
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
