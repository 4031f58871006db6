# SPDX-License-Identifier: Apache-2.0
"""What the arbiter makes before the first fork and every worker inherits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.cpus import Cpus, available, threads_for
from service.ledger import Ledger
from service.permits import Permits
from service.readiness import Policy, Readiness, aggregate
from service.recall import Recall
from service.scoreboard import Scoreboard, now
from service.settings import MOST_WORKERS
from service.slots import CPU

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.gpu_memory import DeviceReading
    from service.settings import Settings
    from service.slots import SlotRecord

SPARE_SLOTS = 64
"""Rows beyond the configured workers: for growth, and for workers that drain while others boot."""


@dataclass(frozen=True)
class Fleet:
    """Settings, table, permits and CPUs of one service.

    Attributes:
        threads: compute threads of each worker on CPU.
        gpu_nodes: the NUMA node of each device, where the machine says.
        readings: memory of each GPU before the first fork, where the driver says.
    """

    settings: Settings
    board: Scoreboard
    devices: tuple[str, ...]
    problem: str
    cpus: Cpus
    threads: int
    gpu_nodes: Mapping[str, int]
    load_permits: dict[str, Permits]
    roll_permit: Permits
    halt_permit: Permits
    plan_permit: Permits
    ledger: Ledger
    recall: Recall
    readings: Mapping[str, DeviceReading]

    @classmethod
    def make(
        cls,
        settings: Settings,
        devices: tuple[str, ...],
        workers: int,
        problem: str = "",
        *,
        gpu_nodes: Mapping[str, int] | None = None,
        recall: Recall | None = None,
        readings: Mapping[str, DeviceReading] | None = None,
    ) -> Fleet:
        """Arbiter: make everything that forks share; `problem` is why there is no model to load, if so."""
        most = settings.max_workers or MOST_WORKERS if settings.workers == "auto" else workers
        board = Scoreboard(most + SPARE_SLOTS)
        board.header.started = now()
        cpus = available()
        fleet = cls(
            settings=settings,
            board=board,
            devices=devices,
            problem=problem,
            cpus=cpus,
            threads=threads_for(workers, cpus.cores, settings.threads),
            gpu_nodes=gpu_nodes or {},
            load_permits=_load_permits(settings, devices, cpus.cores),
            roll_permit=Permits("roll", 1),
            halt_permit=Permits("halt", 1),
            plan_permit=Permits("plan", 1),
            ledger=Ledger(),
            recall=recall or Recall(),
            readings=readings or {},
        )
        fleet.aim(workers)
        return fleet

    def aim(self, workers: int) -> None:
        """Arbiter, before the first fork: start so many workers."""
        header = self.board.header
        header.target = header.slots_used = workers
        for row in self.board.rows[:workers]:
            row.since = row.beat = header.started

    @property
    def cuda(self) -> bool:
        """Whether workers are pinned to GPUs."""
        return self.devices != (CPU,)

    @property
    def concurrent_loads(self) -> int:
        """How many workers may load at once, on all devices together."""
        return sum({id(permits): permits.count for permits in self.load_permits.values()}.values())

    def cpu_set(self, slot: int) -> frozenset[int] | None:
        """Worker: return the CPUs to be bound to: near the slot's GPU, or a share of the nodes; None: all."""
        workers = self.board.header.target
        if self.cuda:
            node = self.gpu_nodes.get(self.board.record(slot).device)
            return self.cpus.near(node, workers)
        return self.cpus.spread(slot, workers, self.threads)

    def latch(self) -> None:
        """Worker: remember that the quorum was reached; from then on only the floor counts."""
        if self.readiness().ready:
            self.board.header.was_ready = 1

    def readiness(
        self, records: list[SlotRecord] | None = None, *, was_ready: bool | None = None
    ) -> Readiness:
        """Worker: decide whether the service is ready; who reads records itself reads `was_ready` before."""
        header = self.board.header
        before = bool(header.was_ready) if was_ready is None else was_ready
        return aggregate(
            self.board.records() if records is None else records,
            self._policy,
            now(),
            was_ready=before,
            stopping=bool(header.stopping),
        )

    def wanted(self, records: list[SlotRecord], *, was_ready: bool) -> int:
        """Worker: return the ready workers that it takes: the quorum, or the floor once it `was_ready`."""
        return aggregate(records, self._policy, now(), was_ready=was_ready, stopping=False).wanted

    @property
    def boot_deadline_s(self) -> float:
        """By when a worker is ready that loads at once, else one of its stages has ended it."""
        settings = self.settings
        return settings.spawn_timeout + settings.load_timeout + settings.warmup_timeout

    @property
    def _policy(self) -> Policy:
        settings = self.settings
        return Policy(
            self.board.header.target, settings.ready_quorum, settings.ready_floor, settings.boot_attempts
        )


def _load_permits(settings: Settings, devices: tuple[str, ...], cores: int) -> dict[str, Permits]:
    """Return permits by device: one for each GPU, else one pool for all."""
    if settings.concurrent_loads or devices == (CPU,):
        pool = Permits("load", settings.concurrent_loads or cores)
        return dict.fromkeys(devices, pool)
    return {device: Permits(f"load-{device}", 1) for device in devices}
