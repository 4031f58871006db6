# SPDX-License-Identifier: Apache-2.0
"""The budget that all processes share: what a worker costs, what room there is, how many shall run.

An anonymous mapping, made by the arbiter before the first fork. The sum is a text under a version that is odd
while it is written, so no reader takes half of one; it has one writer at a time, the holder of the plan
permit. The numbers are single aligned stores.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from dataclasses import asdict, dataclass, replace
from typing import Any

from service.budget import Plan, Room, WorkerCost, plan

SIZE = 64 * 1024
RAISE = 1.1
"""What an OOM kill proves: that the measured cost was too low. By how much nobody says."""
TRIES = 100


class Numbers(ctypes.Structure):
    """What others ask for many times a second."""

    _fields_ = (
        ("version", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("planned", ctypes.c_int64),  # workers that shall run; 0: nothing was measured yet
        ("fits", ctypes.c_int64),  # workers that fit, one at least; 0: unknown
        ("surge", ctypes.c_int64),  # 1 + the slot whose replacement runs beside it; 0: none
        ("foreseen", ctypes.c_int64),  # whether the cost is the last boot's
        ("grown", ctypes.c_int64),  # workers added and taken away
        ("shrunk", ctypes.c_int64),
        ("oom_kills", ctypes.c_int64),  # arbiter; each makes a worker's host part dearer
        ("kept", ctypes.c_int64),  # whether this boot's manifest is written
        ("asked_at", ctypes.c_double),  # when the arbiter was last asked for a worker more or fewer,
        ("asked_of", ctypes.c_int64),  # and how many it kept then
    )


@dataclass(frozen=True)
class Sum:
    """All that the number of workers follows from.

    Attributes:
        cost: of one worker, the dearest that was measured.
        host: its memory.
        devices: the GPUs; empty on a CPU.
        cores: for computing on the CPU; None: no constraint.
        threads: that a worker computes with.
        max_workers: cap by setting; None: none.
    """

    cost: WorkerCost
    host: Room
    devices: tuple[Room, ...] = ()
    cores: int | None = None
    threads: int = 1
    max_workers: int | None = None

    def plan(self) -> Plan:
        """Do the sum."""
        return plan(
            self.cost,
            host=self.host,
            devices=self.devices,
            cores=self.cores,
            threads=self.threads,
            max_workers=self.max_workers,
        )


class Ledger:
    """The mapping."""

    def __init__(self) -> None:
        """Map an empty one."""
        self._memory = mmap.mmap(-1, SIZE)
        self.numbers = Numbers.from_buffer(self._memory)

    def write(self, entry: Sum) -> None:
        """Publish a sum; one writer at a time.

        Raises:
            ValueError: it is longer than the mapping, which keeps the one before.
        """
        text = json.dumps(asdict(entry)).encode()
        begin = ctypes.sizeof(Numbers)
        if begin + len(text) > SIZE:
            raise ValueError(f"the sum over {len(entry.devices)} devices is longer than {SIZE} bytes")
        numbers = self.numbers
        numbers.version += 1 + numbers.version % 2  # it is odd already if a writer died amid its write
        self._memory[begin : begin + len(text)] = text
        numbers.length = len(text)
        numbers.version += 1

    def read(self) -> Sum | None:
        """Return the newest sum; None before the first, or if a writer died amid its write."""
        begin, numbers = ctypes.sizeof(Numbers), self.numbers
        for _ in range(TRIES):
            version = numbers.version
            text = self._memory[begin : begin + numbers.length]
            if version % 2 == 0 and version == numbers.version:
                return self._raised(parse(json.loads(text))) if text else None
        return None

    def _raised(self, entry: Sum) -> Sum:
        """Return a sum with the cost that OOM kills since have proved to be too low."""
        return replace(entry, cost=replace(entry.cost, raised=RAISE**self.numbers.oom_kills))


def parse(fields: dict[str, Any]) -> Sum:
    """Return a sum from what `asdict` made of it."""
    fields = dict(fields)
    fields["cost"] = WorkerCost(**fields["cost"])
    fields["host"] = Room(**fields["host"])
    fields["devices"] = tuple(Room(**row) for row in fields["devices"])
    return Sum(**fields)
