# SPDX-License-Identifier: Apache-2.0
"""For the tests of the budget: a machine that says what a test wants, and fleets that run on it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from service import budget, planner, rooms
from service.budget import GIB, MIB, WorkerCost
from service.cgroups import HostReading
from service.cpus import Cpus
from service.fleet import Fleet
from service.gpu_memory import DeviceReading
from service.lifecycle import State
from service.memory import HostMemory
from service.settings import Settings
from service.slots import CPU

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

    from service.backends.base import DeviceMemory
    from service.recall import Recall

ARBITER = 77
GONE = 78
BUSY = 64 * MIB
TEN_GIB = HostReading(10 * GIB, "RAM", 2 * GIB)
WALK = (State.PINNED, State.WAITING, State.LOADING, State.WARMING, State.READY, State.DRAINING)


def fleet_of(
    workers: int | str,
    devices: tuple[str, ...] = (CPU,),
    cores: int = 16,
    recall: Recall | None = None,
    readings: Mapping[str, DeviceReading] | None = None,
    **settings: Any,
) -> Fleet:
    """Return a fleet on a machine of so many cores."""
    values = Settings(backend="stub", workers=workers, **settings)
    fleet = Fleet.make(values, devices, values.first_workers, recall=recall, readings=readings)
    return replace(fleet, cpus=Cpus(frozenset(range(cores))), threads=1)


def put(fleet: Fleet, slot: int, state: State, device: str = "") -> None:
    """Have a worker in a slot, with a process of its own; READY is what it then was once, for all."""
    board = fleet.board
    if not board.record(slot).live:
        board.spawn(slot, device or fleet.devices[slot % len(fleet.devices)], 1.0)
        board.rows[slot].pid = 1000 + slot
    for step in WALK[: WALK.index(state) + 1] if state in WALK else ():
        if step > board.record(slot).state:
            board.enter(slot, step, 2.0)
    if state is State.READY:
        board.header.ever_ready = 1


def cpu_cost(private: int) -> WorkerCost:
    """Return the cost of a worker on a CPU, by its private bytes."""
    return WorkerCost(context=0, weights=0, batch=0, host=private)


@dataclass
class Machine:
    """What the readings say.

    Attributes:
        host: the memory limit and what is used of it.
        rss: of the arbiter, shared by all.
        uss: of each worker.
        gpus: by token; a missing one is one that the driver does not tell of.
        asked: the tokens of each reading.
    """

    host: HostReading = TEN_GIB
    rss: int = GIB
    uss: int = 100 * MIB
    gpus: dict[str, DeviceReading] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)
    peak: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Machine:
        """Let the planner read this machine, where a busy worker costs `BUSY`."""
        monkeypatch.setattr(budget, "HOST_BUSY", BUSY)
        monkeypatch.setattr(planner.os, "getppid", lambda: ARBITER)
        monkeypatch.setattr(rooms, "read_host", lambda: self.host)
        monkeypatch.setattr(rooms, "read_host_memory", self.process)
        monkeypatch.setattr(rooms, "read_devices", self.read_devices)
        monkeypatch.setattr(rooms, "peak_private_bytes", lambda: self.peak)
        return self

    def process(self, pid: int) -> HostMemory | None:
        if pid == GONE:
            return None
        own = 0 if pid in (ARBITER, os.getpid()) else self.uss
        return HostMemory(self.rss + own, 0, own)

    def read_devices(self, tokens: Sequence[str], _timeout_s: float = 0.0) -> dict[str, DeviceReading]:
        self.asked.append(list(tokens))
        return {token: self.gpus[token] for token in tokens if token in self.gpus}


def reading(total: int, used: int) -> DeviceReading:
    """Return a reading of a GPU."""
    return DeviceReading("GPU-x", "NVIDIA H100 80GB HBM3", total, used, {})


@dataclass
class Device:
    """As much of a backend as the planner asks.

    Attributes:
        memory_: what it says of its device; None: it has none.
        fences: what it was told to allocate at most.
    """

    memory_: DeviceMemory | None = None
    fences: list[int] = field(default_factory=list)

    def memory(self) -> DeviceMemory | None:
        return self.memory_

    def fence(self, limit_bytes: int) -> None:
        self.fences.append(limit_bytes)
