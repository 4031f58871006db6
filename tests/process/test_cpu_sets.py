# SPDX-License-Identifier: Apache-2.0
"""CPUs of real workers: what they may run on, how many threads they have, and where their GPUs are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL

import fakecuda
import pytest
from harness import ROOT, Service, assert_invariants

from service.cpus import parse_cpulist

fake_libraries, fake_driver = fakecuda.fake_libraries, fakecuda.fake_driver  # fixtures

ALLOWED = sorted(os.sched_getaffinity(0))
MOST_THREADS = 10
"""Event loop, model, tokeniser, deadline and the pool's few: nothing here is sized by the cores."""

# A machine with two NUMA nodes, each of which is left one CPU.
CONF = """
from dataclasses import replace
from gunicorn_conf import *
import gunicorn_conf
from service.cpus import Cpus

def on_starting(server):
    gunicorn_conf.on_starting(server)
    split = {node: frozenset({cpu}) for node, cpu in enumerate(CPUS)}
    server.fleet = replace(server.fleet, cpus=Cpus(frozenset(CPUS), None, split))
"""

ADDRESSES = """
import json
from service import gpus

addresses = {}
gpus.list_gpus(addresses=addresses)
print(json.dumps(addresses))
"""


def cpu_sets(pid: int) -> list[frozenset[int]]:
    """Return the CPUs that each thread of a process may run on."""
    found = []
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        found.append(parse_cpulist(lines["Cpus_allowed_list"].strip()))
    return found


def test_workers_use_what_the_container_has() -> None:
    """Without NUMA nodes to choose from every thread may run on all CPUs, and there are few of them."""
    with Service(workers=2) as service:
        service.wait_ready()
        assert service.embed().ok
        for pid in service.pids().values():
            threads = cpu_sets(pid)
            assert all(threads)
            assert all(cpus <= set(ALLOWED) for cpus in threads)
            assert len(threads) <= MOST_THREADS
        assert " thread a worker" in service.log
        assert_invariants(service)


@pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two CPUs")
def test_workers_are_spread_over_numa_nodes(tmp_path: Path) -> None:
    """Each worker, and its successor, is bound to its node with all its threads; the arbiter is not."""
    conf = tmp_path / "conf.py"
    conf.write_text(CONF.replace("CPUS", repr(ALLOWED[:2])))
    prefix = ("sh", "-c", f'"$0" -m gunicorn -c {conf}; exit $?')
    with Service(prefix=prefix, workers=2) as service:
        service.wait_ready()
        service.kill(1, SIGKILL)
        service.wait_state(1, "ready", 2)
        bound = {slot: set(cpu_sets(pid)) for slot, pid in service.pids().items()}
        assert bound == {slot: {frozenset({cpu})} for slot, cpu in enumerate(ALLOWED[:2])}
        assert set(cpu_sets(service.arbiter)) == {frozenset(ALLOWED)}
        assert_invariants(service)


def test_more_than_fits_is_honoured_with_one_warning() -> None:
    """The log names the sum and the cores, once, whatever happens to the workers."""
    many = len(ALLOWED) + 1
    with Service(workers=2, threads=many) as service:
        service.wait_ready()
        service.kill(0, SIGKILL)
        service.wait_state(0, "ready", 2)
        assert f", {many} threads a worker" in service.log
        warning = f"2 workers of {many} threads, {2 * many} in all, on "
        assert [warning in line for line in service.log.splitlines() if "WARNING" in line].count(True) == 1


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"GPU-00000001": "0000:10:00.0", "GPU-00000002": "0000:20:00.0"}),
        (
            {"FAKECUDA_MIG": "2"},
            {
                "MIG-00000001": "0000:10:00.0",
                "MIG-00000002": "0000:10:00.0",
                "GPU-00000002": "0000:20:00.0",
            },
        ),
        ({"FAKENVML_FAIL": "1"}, {"GPU-00000001": "", "GPU-00000002": ""}),
    ],
    ids=["GPUs", "MIG", "no NVML"],
)
def test_gpus_have_their_pci_address(
    fake_driver: dict[str, str], environ: dict[str, str], expected: dict[str, str]
) -> None:
    """NVML says where each GPU is, and an instance is where its GPU is; CUDA alone does not say."""
    done = subprocess.run(
        [sys.executable, "-c", ADDRESSES],
        cwd=ROOT,
        env=os.environ | fake_driver | environ,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    found = {uuid[: len("GPU-00000001")]: address for uuid, address in json.loads(done.stdout).items()}
    assert found == expected
