# SPDX-License-Identifier: Apache-2.0
"""Which CPUs the service has, how many threads compute on them, and where each worker runs. Both processes.

Theory of operation. A container has no more cores than its affinity mask allows, and no more time than the
smallest quota on its way up the cgroup tree; the mask does not show the quota. Threads that share a core
wait for each other at the end of every operation, so by default they are never more than the cores. A
worker is bound to a whole NUMA node at most: on a core of its own it would wait for whoever else came there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from service import cgroups, logging
from service.cgroups import cgroup_folders, read_text

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

LOG = logging.get()
ROOT: Final = cgroups.ROOT
MOST_THREADS = 1
"""Beside a busy neighbour two threads on two cores were slower than one (docs/decisions/0015)."""


@dataclass(frozen=True)
class Cpus:
    """What this container has of the machine.

    Attributes:
        allowed: the CPUs that its processes may run on.
        quota: cores' worth of time it may use, if that is limited.
        nodes: the allowed CPUs of each NUMA node that has any.
    """

    allowed: frozenset[int]
    quota: float | None = None
    nodes: Mapping[int, frozenset[int]] = field(default_factory=dict)

    @property
    def cores(self) -> int:
        """How many threads can run all the time."""
        most = len(self.allowed)
        return most if self.quota is None else max(1, min(most, int(self.quota)))

    @property
    def rationed(self) -> bool:
        """Whether time is shorter than the allowed CPUs have it, so that none of them is ours alone."""
        return self.quota is not None and self.quota < len(self.allowed)

    def near(self, node: int | None, workers: int) -> frozenset[int] | None:
        """Return the CPUs of a GPU's node; None where they are unknown, all there are, or too few for all."""
        local = self.nodes.get(node, frozenset()) if node is not None else frozenset()
        return local if workers <= len(local) < len(self.allowed) else None

    def spread(self, slot: int, workers: int, threads: int) -> frozenset[int] | None:
        """Return the CPUs of one node for a slot, in turns by size; None where that gains nothing or costs.

        A node's nth worker fills nth/room of it, and slots take these places in rising order: however
        many slots there are, the nodes are filled as evenly as can be.
        """
        room = {node: len(cpus) // threads for node, cpus in self.nodes.items()}
        if self.rationed or len(self.nodes) < 2 or workers > sum(room.values()):  # noqa: PLR2004 - to choose from
            return None
        order = sorted((nth / room[node], node) for node in room for nth in range(1, room[node] + 1))
        return self.nodes[order[slot % len(order)][1]]

    def describe(self, threads: int) -> str:
        """Say what there is and what a worker takes of it."""
        quota = "" if self.quota is None else f" (quota {self.quota:g})"
        return f"{_count(self.cores, 'core')}{quota}, {_count(threads, 'thread')} a worker"

    def complaint(self, workers: int, threads: int) -> str:
        """Say what is wrong if the threads are more than the cores; else nothing."""
        if workers * threads <= self.cores:
            return ""
        computing = "" if threads == 1 else f" of {threads} threads, {workers * threads} in all,"
        return (
            f"{_count(workers, 'worker')}{computing} on {_count(self.cores, 'core')} slow each other down; "
            f"lower WARMFLEET_{'WORKERS' if threads == 1 else 'THREADS'}"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def threads_for(workers: int, cores: int, asked: int | None) -> int:
    """Return the compute threads of each worker: as asked, else what is good and fits."""
    return asked or max(1, min(MOST_THREADS, cores // workers))


def bind(cpus: frozenset[int] | None) -> None:
    """Worker: run on these CPUs, with every thread that is yet to come; None: stay as the container is."""
    if cpus is None:
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:  # a filter forbids it, or the container's CPUs have changed
        LOG.warning("not bound to the %d CPUs of a NUMA node: %s", len(cpus), error.strerror)
    else:
        LOG.info("bound to the %d CPUs of a NUMA node", len(cpus))


def available(root: Path = ROOT, allowed: Collection[int] | None = None) -> Cpus:
    """Arbiter: read what this container has, from the kernel's files below `root`."""
    mine = frozenset(os.sched_getaffinity(0) if allowed is None else allowed)
    nodes = {node: cpus & mine for node, cpus in numa_nodes(root).items()}
    return Cpus(mine, cpu_quota(root), {node: cpus for node, cpus in nodes.items() if cpus})


def numa_nodes(root: Path = ROOT) -> dict[int, frozenset[int]]:
    """Return the CPUs of each NUMA node; none where the kernel knows none."""
    lists = (root / "sys/devices/system/node").glob("node[0-9]*/cpulist")
    return {
        int(path.parent.name.removeprefix("node")): parse_cpulist(read_text(path)) for path in sorted(lists)
    }


def gpu_node(address: str, root: Path = ROOT) -> int | None:
    """Return the NUMA node of a PCI address, or None where the machine does not say (-1)."""
    text = read_text(root / "sys/bus/pci/devices" / address / "numa_node")
    return int(text) if text.isdecimal() else None


def parse_cpulist(text: str) -> frozenset[int]:
    """Read the kernel's `0-3,8`."""
    ranges = [part.partition("-") for part in text.split(",") if part]
    return frozenset(cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the cores' worth of time that every cgroup around us grants, or None without a limit."""
    quotas = [quota for folder in cgroup_folders(root, "cpu") if (quota := folder_quota(folder)) is not None]
    return min(quotas, default=None)


def folder_quota(folder: Path) -> float | None:
    """Return what one cgroup grants: `cpu.max` of version 2, two files in version 1."""
    limit = read_text(folder / "cpu.max") or " ".join(
        read_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")
    )
    quota, _, period = limit.partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None
