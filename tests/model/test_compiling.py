# SPDX-License-Identifier: Apache-2.0
"""Compiled models give the same vectors, compile once for all sizes, and share what was compiled."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tiny

from service import backends
from service.backends import compiling
from service.backends.base import Encoding, forward
from service.errors import ModelError
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
WORKER = """
import json, random, sys, time
from pathlib import Path
from torch._dynamo.utils import counters
from service import backends
from service.backends.base import Encoding, forward
from service.settings import Settings

folder, cache, packing, out = sys.argv[1:]
settings = Settings(compile="on", compile_cache=cache, packing=packing)
backend = backends.create(settings, Path(folder), cuda=False)
backend.load()
assert "torch._inductor.codecache" not in sys.modules, "the arbiter would have compiled"
began = time.monotonic()
backend.place(threads=1)
seconds = time.monotonic() - began
graphs = counters["stats"]["unique_graphs"]
dice = random.Random(1)
batches = [[Encoding([2, *dice.choices(range(5, 300), k=dice.randint(1, 50)), 3]) for _ in range(size)]
           for size in range(1, 21)]
rows = [forward(backend, backend.collate(batch)).tolist() for batch in batches]
hits = counters["inductor"]["fxgraph_cache_hit"]
Path(out).write_text(json.dumps({
    "packing": backend.packing, "seconds": seconds,
    "hits": hits, "misses": counters["inductor"]["fxgraph_cache_miss"],
    "graphs": graphs, "later": counters["stats"]["unique_graphs"] - graphs, "rows": rows}))
"""


def start(folder: Path, cache: Path, packing: str, out: Path) -> subprocess.Popen[bytes]:
    """Start a worker of its own process: compiled code and its counters belong to one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, folder, cache, packing, out]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("packing", "used", "siblings"), [("auto", "attention", 1), ("off", "padded", 0)])
def test_vectors_stay_and_the_kernels_are_shared(
    packing: str, used: str, siblings: int, need: Callable[[str], str], tmp_path: Path
) -> None:
    """Of workers that start at once one compiles, a later one finds it all; 20 sizes compile nothing more."""
    need("g++")
    folder = tiny.embedding(tmp_path / "bert", "bert")
    cache = tmp_path / "compiled"
    outs = [tmp_path / f"{number}.json" for number in range(2 + siblings)]
    codes = [worker.wait(280) for worker in [start(folder, cache, packing, out) for out in outs[:-1]]]
    codes.append(start(folder, cache, packing, outs[-1]).wait(280))
    assert codes == [0] * len(outs)
    reports = [json.loads(out.read_text(encoding="utf-8")) for out in outs]
    print([{key: report[key] for key in report if key != "rows"} for report in reports])
    first, *others = sorted(reports, key=lambda report: bool(report["hits"]))
    assert {report["packing"] for report in reports} == {used}
    assert first["misses"] > 0
    assert [report["misses"] for report in others] == [0] * (1 + siblings)
    assert [report["hits"] for report in others] == [first["misses"]] * (1 + siblings)
    assert reports[-1]["seconds"] < first["seconds"]
    assert [report["later"] for report in reports] == [0] * len(reports)
    plain = backends.create(Settings(packing=packing), folder, cuda=False)
    plain.load()
    plain.place(threads=1)
    dice = random.Random(1)
    for size in range(1, 21):
        batch = [Encoding([2, *dice.choices(range(5, 300), k=dice.randint(1, 50)), 3]) for _ in range(size)]
        expected = forward(plain, plain.collate(batch))
        for report in reports:
            assert abs(expected - report["rows"][size - 1]).max() <= 1e-5


def test_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a C++ compiler the boot ends with one sentence that says what to do."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    settings = Settings(compile="on", compile_cache=str(tmp_path / "compiled"))
    backend = backends.create(settings, tiny.embedding(tmp_path / "bert", "bert"), cuda=False)
    backend.load()
    monkeypatch.setattr(shutil, "which", lambda program: None)
    sentence = r"no C\+\+ compiler \(g\+\+\).*install g\+\+, name one by CXX, or set compile to off$"
    with pytest.raises(ModelError, match=sentence):
        backend.place(threads=1)


def test_environment_of_the_compiler() -> None:
    """The folder is for inductor and Triton; one process compiles; what is set otherwise is kept."""
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "XDG_CACHE_HOME": "/caches"}
    compiling.prepare_environment(Settings(compile_cache="/k"), environment)
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/k"
    assert environment["TRITON_CACHE_DIR"] == "/k/triton"
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == "4"
