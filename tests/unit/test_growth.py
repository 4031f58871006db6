# SPDX-License-Identifier: Apache-2.0
"""Who asks for one worker more or fewer, and what becomes of a new number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.growth import Resize, resized, step
from service.lifecycle import State
from service.slots import SlotRecord, leaving_order

if TYPE_CHECKING:
    from collections.abc import Sequence

READY, DRAINING, FAILED, LOADING, EMPTY, BACKOFF, SPAWNED = (
    State.READY,
    State.DRAINING,
    State.FAILED,
    State.LOADING,
    State.EMPTY,
    State.BACKOFF,
    State.SPAWNED,
)


def fleet(*states: State) -> list[SlotRecord]:
    return [SlotRecord(slot, 100 + slot, state, 0.0, 0.0) for slot, state in enumerate(states)]


def asks(records: Sequence[SlotRecord], **numbers: int) -> dict[int, int]:
    """Return what each slot asks for that asks."""
    found = {row.slot: step(records, row.slot, **numbers) for row in records}
    return {slot: change for slot, change in found.items() if change}


# ---------------------------------------------------------------------------------------------
# Who asks


@pytest.mark.parametrize(
    ("states", "target", "planned", "loads", "expected"),
    [
        pytest.param([READY], 1, 3, 1, {0: 1}, id="the scout asks for a second worker"),
        pytest.param([READY, READY], 2, 3, 1, {0: 1}, id="of two only the lowest"),
        pytest.param([EMPTY, LOADING, READY, READY], 3, 5, 2, {2: 1}, id="the lowest that is ready"),
        pytest.param([READY, LOADING], 2, 5, 1, {}, id="one loads, and one may"),
        pytest.param([READY, LOADING], 2, 5, 2, {0: 1}, id="one loads, and two may"),
        pytest.param([READY, LOADING, SPAWNED], 3, 5, 2, {}, id="whatever they do on their way"),
        pytest.param([READY, BACKOFF], 2, 5, 1, {0: 1}, id="one that waits out a failure does not load"),
        pytest.param([READY, FAILED], 2, 5, 1, {0: 1}, id="nor does one that gave up"),
        pytest.param([READY, BACKOFF, LOADING], 3, 5, 1, {}, id="but one beside it does"),
        pytest.param([READY], 2, 5, 2, {}, id="one is yet to be forked"),
        pytest.param([READY, EMPTY], 2, 5, 2, {}, id="one has just died"),
        pytest.param([READY, DRAINING], 1, 3, 1, {0: 1}, id="one that leaves is neither cold nor there"),
        pytest.param([READY, DRAINING], 2, 3, 1, {}, id="its place is to be filled first"),
        pytest.param([READY, READY, READY], 3, 3, 1, {}, id="all that are planned"),
        pytest.param([READY, READY, READY], 3, 2, 1, {0: -1}, id="one too many"),
        pytest.param([READY, LOADING, LOADING], 3, 1, 1, {0: -1}, id="too many, though they still load"),
        pytest.param([DRAINING, READY], 2, 1, 1, {1: -1}, id="one that leaves does not ask"),
        pytest.param([LOADING, LOADING], 2, 1, 1, {}, id="nobody is ready"),
        pytest.param([], 1, 3, 1, {}, id="nobody is there"),
        pytest.param([READY], 1, 0, 1, {}, id="nothing is planned"),
        pytest.param([READY, READY], 2, 0, 1, {}, id="nothing is planned, so nothing is too much"),
    ],
)
def test_one_worker_asks_for_one_step(
    states: list[State], target: int, planned: int, loads: int, expected: dict[int, int]
) -> None:
    """The lowest READY slot asks, towards the plan, while fewer workers than load permits are cold."""
    assert asks(fleet(*states), target=target, planned=planned, loads=loads) == expected


@given(
    states=st.lists(st.sampled_from(State), max_size=8),
    target=st.integers(1, 8),
    planned=st.integers(0, 8),
    loads=st.integers(1, 4),
)
def test_never_do_two_ask(states: list[State], target: int, planned: int, loads: int) -> None:
    """Whatever the table says, at most one slot asks: one that is READY, and for what is planned."""
    found = asks(fleet(*states), target=target, planned=planned, loads=loads)
    assert len(found) <= 1
    for slot, change in found.items():
        assert states[slot] is READY
        assert (planned - target) * change > 0


# ---------------------------------------------------------------------------------------------
# What becomes of it


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        pytest.param((4, 3, 3, 5), Resize(4, 4, clamped=False), id="TTIN: more than planned is a wish"),
        pytest.param((6, 5, 5, 5), Resize(5, 5, clamped=True), id="TTIN: no more than fit"),
        pytest.param((9, 2, 2, 5), Resize(5, 5, clamped=True), id="a jump ends at what fits"),
        pytest.param((3, 2, 5, 5), Resize(3, 5, clamped=False), id="growth: a step does not change the plan"),
        pytest.param((5, 4, 5, 5), Resize(5, 5, clamped=False), id="growth: the last step"),
        pytest.param((7, 6, 6, 4), Resize(6, 6, clamped=True), id="more runs than fits: no more, no fewer"),
        pytest.param((2, 3, 3, 5), Resize(2, 2, clamped=False), id="TTOU: fewer from now on"),
        pytest.param((2, 3, 5, 5), Resize(2, 2, clamped=False), id="TTOU amid the growth ends it"),
        pytest.param((3, 4, 2, 2), Resize(3, 2, clamped=False), id="shrinking: a step keeps the plan"),
        pytest.param((2, 3, 2, 2), Resize(2, 2, clamped=False), id="shrinking: the last step"),
        pytest.param((1, 3, 2, 2), Resize(1, 1, clamped=False), id="TTOU amid the shrinking: fewer still"),
        pytest.param((3, 2, 0, 0), Resize(3, 0, clamped=False), id="nothing is measured yet: as asked"),
        pytest.param((1, 2, 0, 0), Resize(1, 0, clamped=False), id="and down, too"),
        pytest.param((3, 2, 2, 0), Resize(3, 3, clamped=False), id="none fits, or nobody knows: as asked"),
        pytest.param((9, 8, 8, 20), Resize(8, 8, clamped=True), id="the table is full"),
        pytest.param((9, 8, 0, 0), Resize(8, 0, clamped=True), id="the table is full before the first sum"),
    ],
)
def test_a_new_number_is_held_against_what_fits(numbers: tuple[int, ...], expected: Resize) -> None:
    """New, old, planned, fits; the table has eight rows."""
    new, old, planned, fits = numbers
    assert resized(new, old, planned=planned, surge=0, fits=fits, most=8, binding=True) == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        pytest.param((6, 5, 5, 5), Resize(6, 6, clamped=False), id="more than fit"),
        pytest.param((9, 8, 8, 5), Resize(8, 8, clamped=True), id="but no more than the table has rows"),
    ],
)
def test_a_budget_that_only_warns_clamps_nobody(numbers: tuple[int, ...], expected: Resize) -> None:
    """With `budget_policy=warn` a person has the last word."""
    new, old, planned, fits = numbers
    assert resized(new, old, planned=planned, surge=0, fits=fits, most=8, binding=False) == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        pytest.param((4, 3, 3, 5), Resize(4, 3, clamped=False), id="the replacement changes no plan"),
        pytest.param((5, 4, 3, 5), Resize(5, 4, clamped=False), id="TTIN beside it is a wish for one more"),
        pytest.param((6, 5, 4, 5), Resize(5, 4, clamped=True), id="of which no more fit"),
        pytest.param((3, 2, 3, 5), Resize(3, 3, clamped=False), id="it comes when the growth is over"),
        pytest.param((3, 4, 3, 5), Resize(3, 3, clamped=False), id="one fewer: as before it"),
        pytest.param((2, 4, 3, 5), Resize(2, 2, clamped=False), id="fewer than before it"),
        pytest.param((3, 2, 0, 0), Resize(3, 0, clamped=False), id="nothing is measured yet"),
    ],
)
def test_a_replacement_that_runs_beside_is_no_wish(numbers: tuple[int, ...], expected: Resize) -> None:
    """While a worker's replacement runs beside it, one more than planned is not a person's."""
    new, old, planned, fits = numbers
    assert resized(new, old, planned=planned, surge=1, fits=fits, most=8, binding=True) == expected


@given(
    new=st.integers(1, 20),
    old=st.integers(1, 20),
    planned=st.integers(0, 20),
    surge=st.integers(0, 1),
    fits=st.integers(0, 20),
    most=st.integers(1, 20),
    binding=st.booleans(),
)
def test_nobody_who_runs_is_ended_by_a_wish_for_more(
    new: int, old: int, planned: int, surge: int, fits: int, most: int, *, binding: bool
) -> None:
    """A number only rises by a wish for more and only falls by one for fewer; what is clamped is said."""
    found = resized(new, old, planned=planned, surge=surge, fits=fits, most=most, binding=binding)
    assert min(new, old) <= found.target <= max(new, old)
    assert found.clamped is (found.target < new)
    if found.target > old:
        assert found.target <= most
        assert not (binding and fits) or found.target <= fits
    assert (found.planned == 0) is (planned == 0)


# ---------------------------------------------------------------------------------------------
# Many steps


@dataclass
class Service:
    """An arbiter and its workers, as far as numbers go; whoever is cold becomes READY when a test says so."""

    target: int
    planned: int
    fits: int
    loads: int
    surge: int = 0
    states: list[State] = field(default_factory=list)

    @property
    def records(self) -> list[SlotRecord]:
        return fleet(*self.states)

    @property
    def kept(self) -> int:
        """Workers that were not asked to go."""
        return sum(state not in (EMPTY, DRAINING) for state in self.states)

    def resize(self, new: int, *, binding: bool = True) -> Resize:
        """Do what the arbiter does for a signal."""
        found = resized(
            new,
            self.target,
            planned=self.planned,
            surge=self.surge,
            fits=self.fits,
            most=len(self.states),
            binding=binding,
        )
        self.target, self.planned = found.target, found.planned
        return found

    def fork(self) -> None:
        """Fork what is missing, and ask those to go that are too many."""
        while self.kept < self.target and EMPTY in self.states:
            self.states[self.states.index(EMPTY)] = SPAWNED
        for slot in leaving_order([row for row in self.records if row.state is not DRAINING]):
            if self.kept > self.target:
                self.states[slot] = DRAINING

    def ask(self) -> bool:
        """Let every worker ask who would; return whether one did."""
        found = asks(self.records, target=self.target, planned=self.planned + self.surge, loads=self.loads)
        for change in found.values():
            planned = self.planned
            self.resize(self.target + change)
            assert self.planned == planned
            self.fork()
        return bool(found)

    def progress(self, slot: int) -> None:
        """One worker gets to where it is going."""
        self.states[slot] = EMPTY if self.states[slot] is DRAINING else READY


@st.composite
def services(draw: st.DrawFn) -> Service:
    """Return a service in any state from which it can go on: nobody has failed for good."""
    fits = draw(st.integers(1, 10))
    usual = st.sampled_from([SPAWNED, LOADING, State.WARMING, READY, DRAINING])
    states = draw(st.lists(usual, min_size=1, max_size=14))
    target = max(1, sum(state is not DRAINING for state in states))
    service = Service(target, draw(st.integers(1, fits)), fits, draw(st.integers(1, 4)))
    service.states = [*states, *[EMPTY] * 16]
    service.fork()
    return service


@given(service=services(), choice=st.data())
def test_step_by_step_exactly_what_is_planned_runs(service: Service, choice: st.DataObject) -> None:
    """From any start, in whatever order workers become ready: the plan is reached and never passed."""
    began = service.kept
    low, high = sorted((began, service.planned))
    for _ in range(200):
        moving = [slot for slot, state in enumerate(service.states) if state not in (EMPTY, READY)]
        if choice.draw(st.booleans()) or not moving:
            if not service.ask() and not moving:
                break
        else:
            service.progress(choice.draw(st.sampled_from(moving)))
            service.fork()
        assert low <= service.kept <= high <= max(began, service.fits)
    else:
        pytest.fail("it never comes to rest")
    assert (service.target, service.kept, service.states.count(READY)) == (service.planned,) * 3


@given(service=services())
def test_a_fleet_grows_no_faster_than_it_measures(service: Service) -> None:
    """Growth alone never has more workers cold than there are load permits."""
    service.states = [READY, *[EMPTY] * 16]
    service.target = 1
    while service.ask():
        assert 1 <= service.states.count(SPAWNED) <= service.loads
    assert service.kept == min(service.planned, 1 + service.loads)


@given(service=services(), choice=st.data())
def test_a_replacement_comes_and_goes_and_the_plan_stays(service: Service, choice: st.DataObject) -> None:
    """A fleet at rest surges by one, and one worker leaves: as many run as before, never fewer meanwhile."""
    service.fits = service.planned + 1
    service.target = planned = service.planned
    service.states = [READY] * planned + [EMPTY] * 16
    service.surge = 1
    while service.ask() or SPAWNED in service.states:
        for slot, state in enumerate(service.states):
            if state is SPAWNED:
                service.progress(slot)
    assert (service.target, service.planned, service.states.count(READY)) == (
        planned + 1,
        planned,
        planned + 1,
    )
    leaves = choice.draw(st.integers(0, planned - 1))
    service.states[leaves], service.surge = DRAINING, 0
    service.target -= 1  # which is what the lowest READY slot asks for; its arbiter ends the draining one
    assert not service.ask()
    assert (service.target, service.planned, service.kept) == (planned, planned, planned)


@given(service=services(), wishes=st.lists(st.integers(-3, 3), max_size=10))
def test_a_person_and_the_fleet_do_not_fight(service: Service, wishes: list[int]) -> None:
    """After any signals, at any moment, the service rests at one number, within what fits."""
    service.fits = max(service.fits, service.target)
    for wish in wishes:
        service.resize(max(1, service.target + wish))
        service.fork()
        service.ask()
    while service.ask() or any(state not in (EMPTY, READY) for state in service.states):
        for slot, state in enumerate(service.states):
            if state not in (EMPTY, READY):
                service.progress(slot)
        service.fork()
    assert service.kept == service.target == service.planned <= service.fits


def test_a_wish_that_is_not_granted_is_not_asked_for_again() -> None:
    """A person's TTIN beyond what fits leaves target and plan as they are, so nobody asks again."""
    found = resized(4, 3, planned=3, surge=0, fits=3, most=8, binding=True)
    assert found == Resize(3, 3, clamped=True)
    assert asks(fleet(READY, READY, READY), target=found.target, planned=found.planned, loads=1) == {}
