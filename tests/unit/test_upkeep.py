# SPDX-License-Identifier: Apache-2.0
"""What a READY worker does beside serving; signals go into a list, threads are run at once or later."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
from households import ARBITER, Machine, cpu_cost, fleet_of, put

from service import upkeep
from service.budget import MIB
from service.lifecycle import Failure, State
from service.planner import settle
from service.recall import Recall
from service.slots import may_leave
from service.upkeep import ASK_S, LEARN_S, MEASURE_S, Upkeep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from service.fleet import Fleet
    from service.learned import ShapeHistogram

BEGAN = 1000.0
MORE, FEWER = (ARBITER, signal.SIGTTIN), (ARBITER, signal.SIGTTOU)
READY, WARMING, DRAINING, FAILED = State.READY, State.WARMING, State.DRAINING, State.FAILED
BACKEND: Any = "the backend"


@dataclass(frozen=True)
class Noted(Recall):
    """A recall that writes down what it is given."""

    kept: list[tuple[list[int], Any, float]] = field(default_factory=list)
    learnt: list[ShapeHistogram] = field(default_factory=list)

    def keep(self, rows: Sequence[Any], cost: Any, *, boot_seconds: float) -> None:
        self.kept.append(([row.slot for row in rows], cost, boot_seconds))

    def learn(self, seen: ShapeHistogram) -> None:
        self.learnt.append(seen)


@dataclass
class House:
    """A worker's upkeep, and all that it does.

    Attributes:
        signals: sent to whom.
        jobs: given to a thread, and not yet run.
        worn: of what it is worn out.
        measured: backends measured; each reading puts `uss` on the scoreboard.
    """

    fleet: Fleet
    slot: int = 0
    uss: int = 100 * MIB
    signals: list[tuple[int, int]] = field(default_factory=list)
    jobs: list[Callable[[], None]] = field(default_factory=list)
    worn: list[tuple[str, Failure]] = field(default_factory=list)
    measured: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.upkeep = Upkeep(
            self.fleet,
            self.slot,
            in_thread=self.jobs.append,
            worn_out=lambda text, reason: self.worn.append((text, reason)),
            time=BEGAN,
        )

    def measure(self, fleet: Fleet, slot: int, backend: object) -> None:
        assert (fleet, slot) == (self.fleet, self.slot)
        self.measured.append(backend)
        fleet.board.note_memory(slot, uss=self.uss)

    def tick(self, after: float) -> int:
        """Tick so many seconds after the start; return the number of new jobs."""
        before = len(self.jobs)
        self.upkeep.tick(BEGAN + after, BACKEND)
        return len(self.jobs) - before

    def work(self) -> None:
        """Let the threads run."""
        while self.jobs:
            self.jobs.pop(0)()

    def plan(self, planned: int, target: int, fits: int = 9) -> None:
        numbers = self.fleet.ledger.numbers
        numbers.planned, numbers.fits, self.fleet.board.header.target = planned, fits, target


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., House]:
    """Return a maker of houses with some workers READY; the last one made gets the signals."""
    Machine().install(monkeypatch)

    def start(ready: int = 1, slot: int = 0, **settings: Any) -> House:
        fleet = replace(
            fleet_of(**{"workers": "auto", "cores": 64, "concurrent_loads": 1} | settings), recall=Noted()
        )
        for number in range(ready):
            put(fleet, number, READY)
        house = House(fleet, slot)
        monkeypatch.setattr(upkeep, "measure", house.measure)
        monkeypatch.setattr(os, "kill", lambda *call: house.signals.append(call))
        return house

    return start


# ---------------------------------------------------------------------------------------------
# Timers


def test_memory_is_measured_every_quarter_of_a_minute(make: Callable[..., House]) -> None:
    """Not at the start, which has just measured; then on time, also when a beat was late, in a thread."""
    house = make()
    at = [0.0, 0.1, MEASURE_S - 0.1, MEASURE_S, MEASURE_S + 0.1, 2 * MEASURE_S + 5, 3 * MEASURE_S + 4]
    assert [house.tick(after) for after in at] == [0, 0, 0, 1, 0, 1, 0]
    assert house.measured == []
    house.work()
    assert house.measured == [BACKEND, BACKEND]


@pytest.mark.parametrize("learns", [True, False])
def test_shapes_are_handed_in_every_ten_minutes_if_they_are_learned(
    make: Callable[..., House], *, learns: bool
) -> None:
    """The worker's own table goes to the manifest; with `learn_shapes` off nothing does."""
    house = make(learn_shapes=learns)
    house.upkeep._measured = BEGAN + 10 * LEARN_S
    assert [house.tick(after) for after in (LEARN_S - 1, LEARN_S, LEARN_S + 1, 2 * LEARN_S)] == [0, 1, 0, 1]
    house.work()
    recall: Any = house.fleet.recall
    assert recall.learnt == ([house.upkeep.shapes] * 2 if learns else [])


# ---------------------------------------------------------------------------------------------
# Resizing


def test_the_scout_asks_the_arbiter_for_the_next_worker(make: Callable[..., House]) -> None:
    """One signal for one step; the arbiter is told and nobody else, and counts."""
    house = make()
    house.plan(planned=3, target=1)
    house.tick(1)
    numbers = house.fleet.ledger.numbers
    assert (house.signals, numbers.grown, numbers.shrunk) == ([MORE], 0, 0)


def test_one_too_many_is_given_up(make: Callable[..., House]) -> None:
    """The other direction."""
    house = make(3)
    house.plan(planned=2, target=3)
    house.tick(1)
    assert house.signals == [FEWER]


def test_a_busy_arbiter_is_asked_once(make: Callable[..., House]) -> None:
    """A second signal for the same step would be a person's wish; a lost one is repeated after a while."""
    house = make()
    house.plan(planned=3, target=1)
    for after in (1.0, 1.1, ASK_S, ASK_S + 0.9):
        house.tick(after)
    assert house.signals == [MORE]
    house.tick(ASK_S + 1)
    assert house.signals == [MORE, MORE]


def test_the_next_step_is_asked_for_at_once(make: Callable[..., House]) -> None:
    """As soon as the arbiter keeps another number, and the new worker is ready."""
    house = make(2)
    house.plan(planned=3, target=1)
    house.tick(1)
    house.plan(planned=3, target=2)
    house.tick(1.1)
    assert house.signals == [MORE, MORE]


def test_another_worker_does_not_ask_for_the_same_step(
    make: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lower slot that becomes READY meanwhile sees that the arbiter was asked."""
    house = make()
    other = House(house.fleet, 1)
    put(house.fleet, 1, READY)
    house.fleet.board.vacate(0, BEGAN)
    house.plan(planned=5, target=1)
    other.tick(1)
    assert house.signals == [MORE]
    put(house.fleet, 0, READY)
    house.tick(1.1)
    assert house.signals == [MORE]


@pytest.mark.parametrize(
    ("planned", "target", "slot", "stopping"),
    [
        pytest.param(2, 2, 0, 0, id="all that are planned"),
        pytest.param(0, 2, 0, 0, id="nothing is planned"),
        pytest.param(4, 2, 1, 0, id="another asks"),
        pytest.param(4, 2, 0, 1, id="the service stops"),
        pytest.param(4, 3, 0, 0, id="one is yet to be forked"),
    ],
)
def test_otherwise_nobody_is_asked(
    make: Callable[..., House], planned: int, target: int, slot: int, stopping: int
) -> None:
    """No signal."""
    house = make(2, slot)
    house.plan(planned, target)
    house.fleet.board.header.stopping = stopping
    house.tick(1)
    assert house.signals == []


def test_whoever_adopts_an_orphan_is_told_nothing(
    make: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the arbiter is dead the parent is another process, perhaps PID 1: it gets no signal."""
    house = make()
    house.plan(planned=3, target=1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    house.tick(1)
    assert house.signals == []


# ---------------------------------------------------------------------------------------------
# Keeping what the boot measured


def test_a_full_boot_is_kept_once(make: Callable[..., House]) -> None:
    """When all that are planned are READY: their rows, the cost, and the seconds since the start."""
    house = make(2, max_workers=2)
    settle(house.fleet, 0, cpu_cost(300 * MIB), None, 0)
    house.fleet.board.header.started = BEGAN - 5
    house.fleet.board.header.target = 2
    assert [house.tick(after) for after in (1, 2)] == [1, 0]
    assert house.fleet.ledger.numbers.kept == 1
    house.work()
    recall: Any = house.fleet.recall
    assert recall.kept == [([0, 1], cpu_cost(300 * MIB), 6.0)]


def not_measured(house: House) -> None:
    """There is no cost to keep."""
    house.plan(2, 2)


def still_growing(house: House) -> None:
    settle(house.fleet, 0, cpu_cost(300 * MIB), None, 0)
    house.fleet.board.header.target = 1


def one_is_warming(house: House) -> None:
    settle(house.fleet, 0, cpu_cost(300 * MIB), None, 0)
    house.plan(3, 3)
    put(house.fleet, 2, WARMING)


def one_is_missing(house: House) -> None:
    settle(house.fleet, 0, cpu_cost(300 * MIB), None, 0)
    house.plan(3, 3)


def one_leaves(house: House) -> None:
    settle(house.fleet, 0, cpu_cost(300 * MIB), None, 0)
    house.plan(2, 2)
    put(house.fleet, 1, DRAINING)


@pytest.mark.parametrize(
    "case",
    [not_measured, still_growing, one_is_warming, one_is_missing, one_leaves],
    ids=lambda x: x.__name__,
)
def test_half_a_boot_is_not_kept(make: Callable[..., House], case: Callable[[House], None]) -> None:
    """Until every planned worker is READY, and none beside them, there is nothing to keep."""
    house = make(2)
    case(house)
    assert (house.tick(1), house.fleet.ledger.numbers.kept) == (0, 0)


# ---------------------------------------------------------------------------------------------
# Growing beyond its share


def grown(house: House, uss: int) -> None:
    house.uss = uss
    house.upkeep._measure(BACKEND)


def test_a_worker_that_outgrows_its_share_is_worn_out_once(make: Callable[..., House]) -> None:
    """7368 MiB for two are 3684 each; the other has its own: one byte more is one too many, and said once."""
    house = make(2, max_workers=2)
    settle(house.fleet, 0, cpu_cost(300 * MIB), None, 0)
    house.fleet.board.note_memory(1, uss=3684 * MIB)
    grown(house, 3684 * MIB)
    assert house.worn == []
    for _ in range(3):
        grown(house, 3684 * MIB + 1)
    text = (
        "it has grown to 3.60 GiB of private memory, its part is 3.60 GiB, "
        "and all workers together have more than the 7.20 GiB there are for them"
    )
    assert house.worn == [(text, Failure.GREW)]


def test_a_worker_that_grows_where_there_is_room_goes_on(make: Callable[..., House]) -> None:
    """It has most of what is there for two, and hurts nobody."""
    house = make(2, max_workers=2)
    settle(house.fleet, 0, cpu_cost(300 * MIB), None, 0)
    house.fleet.board.note_memory(1, uss=100 * MIB)
    grown(house, 7268 * MIB)
    assert house.worn == []


def test_before_the_first_sum_nobody_is_worn_out(make: Callable[..., House]) -> None:
    """There is no share to exceed."""
    house = make()
    grown(house, 1 << 40)
    assert house.worn == []


# ---------------------------------------------------------------------------------------------
# A replacement first


def leaves(house: House) -> bool:
    """Return whether a worn-out worker would leave now, by the worker's own rule."""
    if house.upkeep.waits_for_replacement():
        return False
    header, floor = house.fleet.board.header, house.fleet.settings.ready_floor
    return may_leave(house.fleet.board.records(), house.slot, target=header.target, floor=floor)


def surge(house: House) -> int:
    return house.fleet.ledger.numbers.surge


def hold_roll_permit(house: House, answer: int | None = 0) -> list[int]:
    """Answer so whoever wants to roll; return the list of those who asked."""
    taken: list[int] = []
    permit: Any = house.fleet.roll_permit
    permit.try_acquire = lambda: taken.append(1) or answer
    return taken


def test_a_replacement_comes_first_where_there_is_room(make: Callable[..., House]) -> None:
    """Three of nine run: the fleet surges, under the roll permit; the lowest READY slot asks, as ever."""
    house = make(3, slot=1)
    house.plan(3, 3)
    taken = hold_roll_permit(house)
    assert [house.upkeep.waits_for_replacement(), house.upkeep.waits_for_replacement()] == [True, True]
    assert (surge(house), taken, house.signals) == (2, [1], [])
    house.tick(1)
    assert house.signals == []
    House(house.fleet, 0, signals=house.signals).tick(1)
    assert house.signals == [MORE]
    assert house.fleet.ledger.numbers.planned == 3


@pytest.mark.parametrize(
    ("planned", "target", "fits"),
    [
        pytest.param(3, 3, 3, id="no room"),
        pytest.param(0, 3, 0, id="nothing is planned"),
        pytest.param(4, 3, 9, id="the fleet grows"),
        pytest.param(2, 3, 9, id="the fleet shrinks"),
        pytest.param(3, 3, 0, id="none fits"),
    ],
)
def test_else_it_leaves_as_for_a_roll(
    make: Callable[..., House], planned: int, target: int, fits: int
) -> None:
    """No surge, and the roll permit stays for whoever may leave next."""
    house = make(3)
    house.plan(planned, target, fits)
    taken = hold_roll_permit(house)
    assert (leaves(house), surge(house), taken) == (True, 0, [])
    house.upkeep.take_leave()
    assert surge(house) == 0


def test_one_is_replaced_at_a_time(make: Callable[..., House]) -> None:
    """While another holds the roll permit, or is being replaced, this one asks for nobody."""
    house = make(3)
    house.plan(3, 3)
    hold_roll_permit(house, None)
    assert (house.upkeep.waits_for_replacement(), surge(house)) == (False, 0)
    hold_roll_permit(house, 0)
    house.fleet.ledger.numbers.surge = 3
    assert (house.upkeep.waits_for_replacement(), surge(house)) == (False, 3)
    house.upkeep.take_leave()
    assert surge(house) == 3


def test_it_leaves_when_its_replacement_is_ready(make: Callable[..., House]) -> None:
    """It waits for the fork, the load and the warm-up; then as many others are READY as ran before."""
    house = make(3)
    house.plan(3, 3)
    board = house.fleet.board
    answers = [leaves(house)]
    house.plan(3, 4)  # the arbiter has heard, and forks
    answers.append(leaves(house))
    for state in (State.SPAWNED, State.LOADING, WARMING, READY):
        put(house.fleet, 3, state)
        answers.append(leaves(house))
    board.enter(1, DRAINING, BEGAN)
    answers.append(leaves(house))
    assert answers == [False, False, False, False, False, True, False]


def test_a_sibling_in_back_off_is_not_the_replacement(make: Callable[..., House]) -> None:
    """Of three one waits out a failure: the worker stays until its own replacement is READY beside it."""
    house = make(2)
    put(house.fleet, 2, State.PINNED)
    house.fleet.board.enter(2, State.BACKOFF, BEGAN)
    house.plan(3, 3)
    answers = [leaves(house), leaves(house)]
    house.tick(1)
    assert house.signals == [MORE]
    house.plan(3, 4)
    answers.append(leaves(house))
    for state in (State.SPAWNED, WARMING, READY):
        put(house.fleet, 3, state)
        answers.append(leaves(house))
    assert answers == [False, False, False, False, False, True]


def test_it_leaves_though_its_replacement_failed(make: Callable[..., House]) -> None:
    """A worker that has outgrown its share must go in the end, replaced or not."""
    house = make(3)
    house.plan(3, 3)
    assert not leaves(house)
    house.plan(3, 4)
    put(house.fleet, 3, State.PINNED)
    assert not leaves(house)
    house.fleet.board.enter(3, State.BACKOFF, BEGAN)
    assert leaves(house)


@pytest.mark.parametrize("target", [3, 4])
def test_a_surge_is_given_up_when_the_room_is_gone(make: Callable[..., House], target: int) -> None:
    """A dearer worker, or an OOM kill: only three fit now, and it leaves as for a roll."""
    house = make(3)
    house.plan(3, 3)
    assert (house.upkeep.waits_for_replacement(), surge(house)) == (True, 1)
    house.plan(3, target, fits=3)
    assert (house.upkeep.waits_for_replacement(), surge(house)) == (False, 0)
    house.tick(1)
    assert house.signals == [FEWER] * (target - 3)
    house.plan(3, 3, fits=3)
    assert leaves(house)


def test_with_it_the_replacements_place_goes(make: Callable[..., House]) -> None:
    """Draining, it lets the fleet be as large as before: another asks for one worker fewer."""
    house = make(4, slot=1)
    house.plan(3, 3)
    house.upkeep.waits_for_replacement()
    house.plan(3, 4)
    lowest = House(house.fleet, 0, signals=house.signals)
    lowest.tick(1)
    assert house.signals == []
    house.upkeep.take_leave()
    assert surge(house) == 0
    house.fleet.board.enter(1, DRAINING, BEGAN)
    lowest.tick(2)
    assert (house.signals, house.fleet.ledger.numbers.planned) == ([FEWER], 3)
