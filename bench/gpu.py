# SPDX-License-Identifier: Apache-2.0
"""Texts and tokens a second on one GPU: warmfleet with 1 to 8 workers, the tutorial server, bare ceilings.

Models: MiniLM (the demo model, its limit of 256 tokens raised to 512), and one of bge-base's size with random
weights, as fast as trained ones; both made in a temporary folder. Workloads: 32 short texts, 32 mixed texts
or 8 texts of 512 tokens a request, in a closed loop. Ceilings, each in a process of its own: `encode` by
batch size and precision, and warmfleet's packed forward without server and tokenising. Each is measured once
a round, in random order. `--device cpu` is no measurement: a tiny model in one cell, to see that all works.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import threading
from collections import deque
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import harness
import load
import throughput
import uvloop
from ceiling import timed
from harness import Record, Server, median, spread, table
from load import Call, Load
from throughput import Cell, System
from tokenizers import Tokenizer

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

WORKLOADS = {"short": 32, "mixed": 32, "long": 8}
throughput.WORKLOADS |= WORKLOADS  # texts a request, which its cells look up
POOL = {"short": 256, "mixed": 256, "long": 64}
"""Requests until they repeat; their texts are also what a ceiling computes in one go: several batches."""
MODELS = {"minilm": (), "bge-base": (12, 768, 12, 3072), "tiny": (2, 64, 4, 128)}
BERT = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
MAX_TOKENS, BATCH_SIZES = 512, (32, 128, 512)
UTILISATION_S, DEADLINE_S, CHILD_S = 0.2, 60, 500
BUSY = 0.9
"""Of the time, or of a core: from here on that is what binds."""
BARS = (("short/128", "/ tutorial", 10.0), ("long/128", "/ packed", 0.6))
FIGURES = {  # by heading: the key in a sample, and digits
    "texts/s": ("per_wall_s", 0),
    "tokens/s": ("tokens_per_s", 0),
    "/ tutorial": ("of_tutorial", 1),
    "/ encode": ("of_encode", 2),
    "/ packed": ("of_packed", 2),
    "CPU, us a text": ("cpu_us", 0),
    "GPU busy": ("gpu_busy", 2),
    "server's cores": ("server_cores", 2),
    "client's": ("client_cores", 2),
    "others'": ("others_cores", 2),
    "texts a pass": ("batch_texts", 0),
    "tokens a pass": ("batch_tokens", 0),
}


def request_texts(random: Random, workload: str) -> list[str]:
    """Return the texts of a request; a word is a token or more, so that long texts are cut at the limit."""
    if workload == "mixed":
        return load.mixed_texts(random, WORKLOADS[workload])
    words = 6 if workload == "short" else MAX_TOKENS - 2
    return [" ".join(random.choices(harness.WORDS, k=words)) for _ in range(WORKLOADS[workload])]


# ---------------------------------------------------------------------------------------------
# In children. `gpu.py --child NAME ...` prints texts a second by workload and way as JSON.


def make(folder: str, *names: str) -> None:
    """Save the models."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    for name in names:
        model = SentenceTransformer(harness.model_folder(), device="cpu")
        if MODELS[name]:
            sizes = dict(zip(BERT, MODELS[name], strict=True))
            raw = str(Path(folder, f"{name}-weights"))
            BertModel(BertConfig(vocab_size=len(model.tokenizer), **sizes)).save_pretrained(raw)
            model.tokenizer.save_pretrained(raw)
            modules = [Transformer(raw), Pooling(sizes["hidden_size"], "cls"), Normalize()]
            model = SentenceTransformer(modules=modules, device="cpu")
        model.max_seq_length = MAX_TOKENS
        model.save(str(Path(folder, name)))
    print("null")


def encode(folder: str, device: str, seconds: str, pool: str) -> None:
    """Measure `encode`, which sorts by length."""
    import torch
    from sentence_transformers import SentenceTransformer

    old = device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    sets = json.loads(Path(pool).read_text())
    found: dict[str, dict[str, float]] = {workload: {} for workload in sets}
    for dtype in ("float32", "float16" if old else "bfloat16"):  # the latter is what warmfleet takes
        model = SentenceTransformer(folder, device=device, model_kwargs={"dtype": dtype})
        for workload, texts in sets.items():
            for size in BATCH_SIZES:
                run = lambda _, t=texts, s=size, m=model: m.encode(t, batch_size=s, show_progress_bar=False)  # noqa: E731
                found[workload][f"{dtype} by {size}"] = rate(run, texts, seconds)
    print(json.dumps(found))


def packed(folder: str, device: str, seconds: str, pool: str) -> None:
    """Measure warmfleet's forward as its model thread runs it, two batches under way."""
    sys.path.insert(0, str(harness.ROOT))
    from service import backends
    from service.backends.base import Cut
    from service.device import prepare_environment
    from service.settings import Settings

    prepare_environment()  # the parent has set CUDA_VISIBLE_DEVICES, as a worker's pin does
    backend = backends.create(Settings(model_id=folder), Path(folder), cuda=device != "cpu")
    backend.load()
    backend.place(threads=1)
    assert backend.max_tokens == MAX_TOKENS
    most = 512 if device == "cpu" else 16384  # max_batch_tokens, by default
    found = {}
    for workload, texts in json.loads(Path(pool).read_text()).items():
        batches: list[list[Any]] = [[]]
        for encoding in backend.tokenize(texts, cut=Cut.RIGHT):
            if sum(map(len, batches[-1])) + len(encoding) > most:
                batches.append([])
            batches[-1].append(encoding)

        def run(_: int, batches: list[list[Any]] = batches) -> None:
            flights: deque[Any] = deque()
            for batch in batches:
                flights.append(backend.launch(backend.collate(batch)))
                if len(flights) == 2:
                    flights.popleft().rows()
            flights.pop().rows()

        found[workload] = {backend.packing: rate(run, texts, seconds)}
    print(json.dumps(found))


def rate(run: Any, texts: list[str], seconds: str) -> float:  # noqa: ANN401 - a function
    """Return texts a second, after a run that is not counted."""
    run(0)
    timing = timed(run, len(texts), float(seconds))
    return timing["texts"] / timing["wall_s"]


def tutorial() -> Any:  # noqa: ANN401 - an app
    """Return the app of the tutorial server, its model put where such a machine computes."""
    import tutorial as written

    written.model.to(os.environ["TUTORIAL_DEVICE"])
    return written.app


# ---------------------------------------------------------------------------------------------
# In the parent


def first_gpu() -> str:
    """Return the UUID of the first GPU that is visible; of none, nothing."""
    sys.path.insert(0, str(harness.ROOT))
    from service import device, gpus
    from service.settings import Settings
    from service.slots import CPU

    listed = gpus.list_gpus() or []
    token = device.discover(Settings(), list_gpus=lambda: listed)[0]
    return device.identity(token, listed) if listed and token != CPU else ""


@contextmanager
def busy_shares(uuid: str) -> Iterator[list[float]]:
    """Ask NVML in a thread for the share of time in which any kernel ran; it cannot tell of MIG or no GPU."""
    shares: list[float] = []
    stop = threading.Event()

    def sample() -> None:
        with suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            while not stop.wait(UTILISATION_S):
                shares.append(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield shares
    finally:
        stop.set()
        thread.join()


def child(*arguments: str, uuid: str = "") -> Any:  # noqa: ANN401 - JSON is anything
    """Run a part of this script in a process of its own; return what it printed last."""
    command = [sys.executable, __file__, "--child", *arguments]
    with Server(command, port=0, env={"CUDA_VISIBLE_DEVICES": uuid}) as server:
        assert server.process.wait(CHILD_S) == 0, arguments[0]
        return json.loads(server.log().strip().rpartition("\n")[2])


def system(workers: int, folder: str, args: argparse.Namespace) -> System:
    """Return warmfleet with so many workers; with 0 the tutorial server."""
    where = {"device": "cuda", "devices": args.uuid} if args.uuid else {}
    ours = throughput.SETTINGS | where | {"model_id": folder, "concurrent_loads": max(1, workers)}
    ours |= harness.chosen_settings(args)
    env = {"TUTORIAL_MODEL": folder, "TUTORIAL_DEVICE": args.device, "CUDA_VISIBLE_DEVICES": args.uuid}

    def start() -> Server:
        if workers:
            return harness.warmfleet(workers=workers, **ours)
        (port,) = harness.free_ports(1)
        return Server([*harness.uvicorn_command("gpu:tutorial", port), "--factory"], port=port, env=env)

    return System(
        name=f"warmfleet-{workers}w" if workers else "tutorial",
        processes=max(1, workers),
        ours=workers > 0,
        start=start,
        wait=lambda server: server.wait_ok(server.ops_port, "/ready" if workers else "/health"),
        call=lambda texts: load.post_texts("/embed", texts),
        vectors=lambda body: json.loads(body)["embeddings"],
    )


def passes(server: Server) -> list[float]:
    """Return the passes so far, their texts and their tokens."""
    names = ("batch_texts_count", "batch_texts_sum", "batch_tokens_sum")
    return [sum(value for _, value in server.metric(f"warmfleet_{name}")) for name in names]


def measure(
    system: System, calls: dict[str, list[Call]], random: Random, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Start a server, let every kind of request pass, then measure each cell."""
    cells = [Cell(workload=workload, clients=clients) for workload in calls for clients in args.clients]
    with system.start() as server:
        system.wait(server)
        for ready in calls.values():
            clients = 4 * system.processes
            uvloop.run(Load(server.port).closed_loop(cycle(ready), clients=clients, seconds=args.seconds))
        for cell in throughput.ordered(random, cells):
            throughput.settle(server, 5)
            before = passes(server) if system.ours else []
            with busy_shares(args.uuid) as shares:
                sample = throughput.measure_cell(system, server, cell, calls[cell.workload], args)
            sample["gpu_busy"] = statistics.fmean(shares) if shares else math.nan
            sample["server_cores"] = sample["cpu_s"] / (sample["wall_s"] or math.nan)
            if system.ours:
                count, texts, tokens = (now - then for now, then in zip(passes(server), before, strict=True))
                sample |= {"batch_texts": texts / count, "batch_tokens": tokens / count}
            sample["binds"] = binds(sample, system.processes)
            harness.progress(f"{system.name}, {throughput.told(cell, sample)}; binds: {sample['binds']}")
            yield {"system": system.name, "cell": cell.name, "workload": cell.workload, **sample}
            if sample["latency_ms"]["cut_off"]:
                break  # it would compute on for those that are gone


def binds(sample: dict[str, Any], processes: int) -> str:
    """Say what was used up. The GPU counts as busy with a kernel however small: see the tokens a pass."""
    server, client, others = (sample[f"{name}_cores"] for name in ("server", "client", "others"))
    limits = {
        "client": client >= BUSY,
        "all cores": server + client + others >= BUSY * len(os.sched_getaffinity(0)),
        "a core a worker": server >= BUSY * processes,
        "GPU": sample["gpu_busy"] >= BUSY,
    }
    return " and ".join(name for name, reached in limits.items() if reached) or "nothing"


def place(one: dict[str, Any]) -> tuple[Any, ...]:
    """Return what orders the rows."""
    return one["model"], one["workload"], int(one["cell"].rpartition("/")[2]), one["system"]


def summarise(record: Record) -> dict[str, Any]:
    """Print the ceilings, the cells and the bars."""
    ceilings: dict[str, list[float]] = {}
    for one in record.of(kind="bare"):
        for way, value in one["rates"].items():
            key = " | ".join((one["model"], one["workload"], one["part"], way))
            ceilings.setdefault(key, []).append(value)
    print("\nWithout a server; median (least-most) of the rounds.\n")
    rows = [[key, spread(values, 0)] for key, values in ceilings.items()]
    head = ["model | workload | of | way", "texts/s"]
    print(table(head, rows).replace("|---|", "|---|---|---|---|", 1))
    cells: dict[str, list[dict[str, Any]]] = {}
    for one in record.of(kind="cell"):
        same = {"round": one["round"], "model": one["model"]}
        for part in ("encode", "packed"):
            (bare,) = record.of(kind="bare", part=part, workload=one["workload"], **same)
            one[f"of_{part}"] = one["per_wall_s"] / max(bare["rates"].values())
        slow = record.of(kind="cell", cell=one["cell"], system="tutorial", **same)
        base = slow[0]["per_wall_s"] if slow else 0.0  # none if the deadline ended it before this cell
        one["of_tutorial"] = one["per_wall_s"] / (base or math.nan)
        one["cpu_us"] = 1e6 * one["cpu_s"] / (one["texts"] or math.nan)
        cells.setdefault(" | ".join((one["model"], one["cell"], one["system"])), []).append(one)
    rows, summary = [], {}
    for key, found in sorted(cells.items(), key=lambda item: place(item[1][0])):
        values = {
            name: [one[figure] for one in found if not math.isnan(one.get(figure, math.nan))]
            for name, (figure, _) in FIGURES.items()
        }
        summary[key] = {name: median(each) for name, each in values.items()}
        notes = dict.fromkeys(one["binds"] for one in found)
        if any({*one["statuses"]} != {"200"} or one["latency_ms"]["cut_off"] for one in found):
            notes["WRONG"] = None
        shown = [spread(values[name], digits) for name, (_, digits) in FIGURES.items()]
        rows.append([key, *shown, "; ".join(notes)])
    print("\nServers; ratios within a round.\n")
    head = ["model | cell | system", *FIGURES, "binds"]
    print(table(head, rows).replace("|---|", "|---|---|---|", 1))
    for cell, ratio, bar in BARS:
        for key in (key for key in summary if f" {cell} " in key and "tutorial" not in key):
            value = summary[key][ratio]
            said = "not measured" if math.isnan(value) else harness.verdict(-value, -bar)
            print(f"\n{key}: {value:.2f} {ratio}, bar {bar:g}: {said}")
    return {"ceilings": {key: median(values) for key, values in ceilings.items()}, "cells": summary}


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: see that it works")
    parser.add_argument("--seconds", type=float, default=3, help="that a cell sends for (%(default)s)")
    lists = {"workers": [1, 2, 4, 8], "workloads": [*WORKLOADS], "clients": [8, 32, 128]}
    for name, all_of_them in ({"models": [*MODELS][:2]} | lists).items():
        kind = type(all_of_them[0])
        made = parser.add_argument(
            f"--{name}", nargs="+", type=kind, default=all_of_them, help="(%(default)s)"
        )
        made.choices = {"models": MODELS, "workloads": WORKLOADS}.get(name)
    harness.settings_option(parser)
    parser.set_defaults(least=8, deadline=DEADLINE_S)
    if {"cpu", "--device=cpu"} & {*sys.argv}:
        parser.set_defaults(rounds=1, seconds=1, models=["tiny"])
        parser.set_defaults(workers=[1], workloads=["short"], clients=[8])
    args = parser.parse_args()
    args.uuid = first_gpu() if args.device == "cuda" else ""
    if args.device == "cuda" and not args.uuid:
        parser.exit(1, "no CUDA GPU is visible; run this where there is one, or try it with --device cpu\n")
    with suppress(Exception):  # without NVML, the record has the UUID alone
        import pynvml

        pynvml.nvmlInit()
        args.gpu = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByUUID(args.uuid))
    harness.warm_page_cache()
    random, record = Random(args.seed), Record("gpu", args)
    with tempfile.TemporaryDirectory() as folder:
        child("make", folder, *args.models)
        counter = Tokenizer.from_file(str(Path(folder, args.models[0], "tokenizer.json")))
        counter.enable_truncation(MAX_TOKENS)
        pool = Path(folder, "texts.json")
        for number in range(args.rounds):
            count = {name: POOL[name] if args.uuid else 8 for name in args.workloads}
            requests = {name: [request_texts(random, name) for _ in range(count[name])] for name in count}
            texts = {name: [text for each in requests[name] for text in each] for name in requests}
            tokens = {
                name: statistics.fmean(sum(counter.encode(text).attention_mask) for text in texts[name])
                for name in texts
            }
            calls = {name: [load.post_texts("/embed", each) for each in requests[name]] for name in requests}
            pool.write_text(json.dumps(texts))
            each = ("encode", "packed", 0, *args.workers)
            units = [(model, unit) for model in args.models for unit in each]
            for model, unit in random.sample(units, len(units)):
                harness.progress(f"round {number + 1}: {model}, {unit}")
                path, same = str(Path(folder, model)), {"round": number, "model": model}
                if isinstance(unit, str):
                    rates = child(unit, path, args.device, str(args.seconds / 3), str(pool), uuid=args.uuid)
                    for name in rates:
                        record.add(kind="bare", part=unit, workload=name, rates=rates[name], **same)
                    continue
                for sample in measure(system(unit, path, args), calls, random, args):
                    sample["tokens_per_s"] = sample["per_wall_s"] * tokens[sample["workload"]]
                    record.add(kind="cell", **same, **sample)
            record.save()
    record.finish(summarise(record))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        {"make": make, "encode": encode, "packed": packed}[sys.argv[2]](*sys.argv[3:])
    else:
        main()
