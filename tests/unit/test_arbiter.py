# SPDX-License-Identifier: Apache-2.0
"""What the arbiter counts when a worker is gone, and when the number of workers changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from households import Machine, cpu_cost, fleet_of, put

from service import arbiter
from service.arbiter import bury, place, resize
from service.budget import MIB
from service.cgroups import HostReading
from service.lifecycle import Failure, State
from service.planner import settle

if TYPE_CHECKING:
    from service.fleet import Fleet

READY, DRAINING = State.READY, State.DRAINING


@dataclass
class Worker:
    """As much of a worker as the arbiter asks."""

    slot: int
    age: int = 1
    pid: int = 0
    booted: bool = False
    fleet: Fleet | None = None


@dataclass
class Server:
    """As much of Gunicorn's arbiter as ours asks.

    Attributes:
        how: the way in which every worker ended.
    """

    fleet: Fleet
    WORKERS: dict[int, Worker] = field(default_factory=dict)
    how: str = ""
    oom_kills: int = 0
    _num_workers: int = 0

    def __post_init__(self) -> None:
        self.exits = SimpleNamespace(pop=lambda _: self.how)

    @property
    def num_workers(self) -> int:
        return self._num_workers


class Kernel:
    """Says how many it has killed."""

    kills = 0

    def read_host(self) -> HostReading:
        return HostReading(1 << 40, "RAM", 0, oom_kills=self.kills)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    Machine().install(monkeypatch)
    kernel = Kernel()
    monkeypatch.setattr(arbiter, "read_host", kernel.read_host)
    return kernel


def serving(workers: int, how: str = "", **settings: Any) -> Any:
    """Return a server whose workers are all READY, and of which one was measured."""
    fleet = fleet_of(workers, cores=64, **settings)
    for slot in range(workers):
        put(fleet, slot, READY)
    settle(fleet, 0, cpu_cost(300 * MIB), None, 0)
    held = {1000 + slot: Worker(slot, age=slot + 1) for slot in range(workers)}
    return Server(fleet, held, how=how, _num_workers=workers)


def end(server: Any, slot: int) -> None:
    bury(server, server.WORKERS.pop(1000 + slot))


def signalled(server: Any, change: int) -> None:
    """Do what Gunicorn does at TTIN and TTOU."""
    old = server.num_workers
    server._num_workers += change
    resize(server, old + change, old)


# ---------------------------------------------------------------------------------------------
# Burying


@pytest.mark.parametrize("how", ["", "SIGKILL", "SIGSEGV"])
def test_the_surge_for_a_worker_ends_with_it(kernel: Kernel, how: str) -> None:
    """However it ended; that for another worker stays."""
    server = serving(3, how)
    numbers = server.fleet.ledger.numbers
    numbers.surge = 2
    end(server, 0)
    assert numbers.surge == 2
    end(server, 1)
    assert numbers.surge == 0
    assert server.fleet.board.record(1).state is State.EMPTY


def test_the_surge_ends_though_nobody_saw_the_worker_die(kernel: Kernel) -> None:
    """Gunicorn has forgotten it without a word to us: its slot goes to the next worker, without a surge."""
    server = serving(3)
    numbers = server.fleet.ledger.numbers
    numbers.surge = 2
    del server.WORKERS[1001]
    worker: Any = Worker(-1)
    place(server, worker)
    assert (worker.slot, numbers.surge) == (1, 0)


def test_of_the_kernels_kills_those_since_the_last_death_count(kernel: Kernel) -> None:
    """Two at once count when the first of them is buried; the second has nothing to add."""
    server = serving(4, "SIGKILL")
    numbers = server.fleet.ledger.numbers
    kernel.kills = 2
    end(server, 3)
    end(server, 2)
    assert numbers.oom_kills == 2
    kernel.kills = 3
    end(server, 1)
    assert (numbers.oom_kills, server.oom_kills) == (3, 3)
    record = server.fleet.board.record(1)
    assert record.failures_by_reason[Failure.KILLED] == 1


def test_a_kill_that_hit_another_process_teaches_nothing(kernel: Kernel) -> None:
    """A worker that ended otherwise was not killed, and one that an operator killed not by the kernel."""
    server = serving(3, "SIGSEGV")
    kernel.kills = 1
    end(server, 2)
    server.how = "SIGKILL"
    end(server, 1)
    assert (server.fleet.ledger.numbers.oom_kills, server.oom_kills) == (0, 1)


# ---------------------------------------------------------------------------------------------
# Resizing


def test_every_step_is_counted_whoever_asked(kernel: Kernel) -> None:
    """By as much as the number really changed: what is clamped is not."""
    server = serving(3)
    numbers = server.fleet.ledger.numbers
    for change in (1, 1, -1, 40):
        signalled(server, change)
    assert (numbers.grown, numbers.shrunk) == (2 + numbers.fits - 4, 1)
    assert server.num_workers == server.fleet.board.header.target == numbers.fits


def test_what_is_clamped_is_told_with_the_reason(kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    """The budget's sum, or that the table is full."""
    server = serving(3)
    fits = server.fleet.ledger.numbers.fits
    signalled(server, 40)
    assert f"43 workers are wanted, {fits} is the most: host: 10.00 GiB * 0.9" in caplog.text
    caplog.clear()
    server = serving(3, budget_policy="warn")
    signalled(server, 70)
    assert caplog.text.rstrip().endswith("the table has no more rows")


def test_a_replacement_comes_and_goes_and_the_plan_stays(kernel: Kernel) -> None:
    """The surge adds one; once it is over the fleet shrinks again, and who leaves already is asked to go."""
    server = serving(3)
    numbers = server.fleet.ledger.numbers
    numbers.surge = 2
    signalled(server, 1)
    assert (numbers.planned, server.fleet.board.header.target) == (3, 4)
    put(server.fleet, 3, READY)
    server.WORKERS[1003] = Worker(3, age=4)
    server.fleet.board.enter(1, DRAINING, 9.0)
    numbers.surge = 0
    signalled(server, -1)
    assert (numbers.planned, server.fleet.board.header.target) == (3, 3)
    assert min(server.WORKERS.values(), key=lambda worker: worker.age).slot == 1
    assert (numbers.grown, numbers.shrunk) == (1, 1)
