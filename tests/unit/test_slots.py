# SPDX-License-Identifier: Apache-2.0
"""Decisions about slots: which one, on which device, after how long a pause, and who leaves first."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.lifecycle import State
from service.slots import (
    CPU,
    DEVICE_ATTEMPTS,
    YOUNG_S,
    SlotRecord,
    after_death,
    backoff_s,
    choose_device,
    device_is_dead,
    halt_is_due,
    leaving_order,
    lowest_free,
    may_leave,
    spread,
)

READY, FAILED, DRAINING, LOADING, EMPTY, BACKOFF = (
    State.READY,
    State.FAILED,
    State.DRAINING,
    State.LOADING,
    State.EMPTY,
    State.BACKOFF,
)


def worker(
    slot: int = 0, state: State = READY, since: float = 0.0, device: str = CPU, **others: Any
) -> SlotRecord:
    return SlotRecord(slot, pid=100 + slot, state=state, since=since, beat=0.0, device=device, **others)


def fleet(*states: State, **others: Any) -> list[SlotRecord]:
    return [worker(slot, state, **others) for slot, state in enumerate(states)]


@pytest.mark.parametrize(
    ("held", "capacity", "expected"),
    [
        (set(), 3, 0),
        ({0, 1}, 3, 2),
        ({0, 2}, 3, 1),
        ({1, 2}, 3, 0),
        ({0, 1, 2}, 3, None),
        ({-1}, 1, 0),
        (set(), 0, None),
    ],
)
def test_the_lowest_free_slot_is_taken(held: set[int], capacity: int, expected: int | None) -> None:
    """A new worker takes the lowest slot that nobody holds; a full table gives None and never raises."""
    assert lowest_free(held, capacity) == expected


@given(devices=st.integers(1, 8), each=st.integers(1, 6), previous=st.data())
def test_workers_are_spread_evenly_over_devices(devices: int, each: int, previous: st.DataObject) -> None:
    """Over n devices, k x n workers are exactly k on each, and never differ by more than one on the way."""
    names = [f"GPU-{number}" for number in range(devices)]
    taken: list[str] = []
    for _ in range(devices * each):
        taken.append(choose_device(names, taken, previous.draw(st.sampled_from(["", *names, "GPU-gone"]))))
        counts = [taken.count(name) for name in names]
        assert max(counts) - min(counts) <= 1
    assert Counter(taken) == dict.fromkeys(names, each)


@given(devices=st.integers(1, 8), each=st.integers(1, 6), dead=st.data())
def test_a_respawn_returns_to_its_device(devices: int, each: int, dead: st.DataObject) -> None:
    """In an even fleet whoever dies is born again on the same device, so that no device is ever overfull."""
    names = [f"GPU-{number}" for number in range(devices)]
    taken = names * each
    gone = taken.pop(dead.draw(st.integers(0, len(taken) - 1)))
    assert choose_device(names, taken, gone) == gone


@pytest.mark.parametrize(
    ("taken", "previous", "expected"),
    [
        ([], "", "a"),
        ([], "b", "b"),
        (["a"], "", "b"),
        (["a"], "a", "b"),
        (["a", "b", "c"], "c", "c"),
        (["a", "b"], "b", "c"),
        (["a", "b", "c", "a"], "a", "b"),
        (["x", "x"], "x", "a"),
    ],
)
def test_a_tie_goes_to_the_previous_device_then_to_the_first(
    taken: list[str], previous: str, expected: str
) -> None:
    """Fewest workers first; among equals the slot's last device, else the first; never a foreign one."""
    assert choose_device(["a", "b", "c"], taken, previous) == expected


def test_the_pause_doubles_up_to_a_minute() -> None:
    """No pause without a failure, then 1, 2, 4 and so on, and a minute at most however many there were."""
    pauses = [backoff_s(failures) for failures in (-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1000)]
    assert pauses == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize(
    ("failures", "ready_at", "failed", "expected"),
    [
        pytest.param(3, 90.0, False, (0, 0.0), id="asked to go"),
        pytest.param(0, 0.0, True, (1, 101.0), id="first failed boot"),
        pytest.param(2, 0.0, True, (3, 104.0), id="third failed boot in a row"),
        pytest.param(9, 0.0, True, (10, 160.0), id="tenth failed boot in a row"),
        pytest.param(0, 90.0, True, (1, 100.0), id="died young once: an accident"),
        pytest.param(1, 90.0, True, (2, 101.0), id="died young again"),
        pytest.param(7, 100.0 - YOUNG_S, True, (1, 100.0), id="served for a minute"),
        pytest.param(7, 100.5 - YOUNG_S, True, (8, 160.0), id="served for just less"),
    ],
)
def test_death_leaves_failures_and_a_pause(
    failures: int, ready_at: float, *, failed: bool, expected: tuple[int, float]
) -> None:
    """A failed boot counts, an early death counts, a long service or a request to go clears the sheet."""
    record = worker(state=READY if ready_at else LOADING, failures=failures, ready_at=ready_at)
    assert after_death(record, 100.0, failed=failed) == expected


@pytest.mark.parametrize(
    ("devices", "workers", "room", "expected"),
    [
        (("a", "b"), 5, None, "ababa"),
        (("a", "b"), 5, {"a": 1, "b": 4}, "abbbb"),
        (("a", "b"), 4, {"a": 1, "b": 1}, "abab"),
        (("a",), 2, None, "aa"),
        (("a", "b"), 0, None, ""),
    ],
    ids=["in turns", "a full one is left out", "unless all are", "one device", "nobody"],
)
def test_workers_are_spread_as_the_arbiter_forks_them(
    devices: tuple[str, ...], workers: int, room: dict[str, int] | None, expected: str
) -> None:
    """One after the other: the device with the fewest workers and room, the first on a tie."""
    assert spread(devices, workers, room) == list(expected)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        pytest.param([], [], id="nobody"),
        pytest.param(fleet(EMPTY, EMPTY), [], id="empty slots"),
        pytest.param(
            [worker(0, since=1), worker(1, since=3), worker(2, since=2)], [1, 2, 0], id="newest first"
        ),
        pytest.param(fleet(READY, READY, READY), [2, 1, 0], id="equally new: highest slot first"),
        pytest.param(
            [
                worker(0, since=9),
                worker(1, DRAINING),
                worker(2, LOADING, since=1),
                worker(3, FAILED, since=2),
            ],
            [1, 3, 2, 0],
            id="those that leave already, those that serve nobody, the newest warm one",
        ),
        pytest.param(
            [
                worker(0, since=1, device="a"),
                worker(1, since=2, device="a"),
                worker(2, since=3, device="a"),
                worker(3, since=9, device="b"),
            ],
            [2, 1, 3, 0],
            id="fullest device first, until it is as full as the other",
        ),
        pytest.param(
            [worker(0, DRAINING, since=1), worker(1, LOADING, since=9), worker(2, BACKOFF, since=9)],
            [0, 2, 1],
            id="one that leaves already, however long it has, spares one that boots",
        ),
        pytest.param(
            [worker(0, since=5, device="a"), worker(1, since=6, device="b"), worker(2, LOADING, device="b")],
            [2, 1, 0],
            id="a cold one makes its device less full by leaving",
        ),
    ],
)
def test_a_shrinking_fleet_gives_up_the_cheapest_first(
    records: list[SlotRecord], expected: list[int]
) -> None:
    """Draining workers, then cold ones, as they serve nobody; then the newest on the fullest device."""
    assert leaving_order(records) == expected


@given(st.lists(st.tuples(st.sampled_from(State), st.integers(0, 5), st.sampled_from("abc")), max_size=12))
def test_the_leaving_order_names_every_live_slot_once(rows: list[tuple[State, int, str]]) -> None:
    """Whatever the fleet, each live slot is named once, and no warm one before one that is not."""
    records = [worker(slot, state, float(since), device) for slot, (state, since, device) in enumerate(rows)]
    order = leaving_order(records)
    assert sorted(order) == [record.slot for record in records if record.live]
    warm = [records[slot].state is READY for slot in order]
    assert warm == sorted(warm)


@pytest.mark.parametrize(
    ("records", "target", "floor", "expected"),
    [
        pytest.param(fleet(READY, READY, READY), 3, 1, True, id="all others are ready"),
        pytest.param(fleet(READY, READY, LOADING), 3, 1, False, id="another is still booting"),
        pytest.param(fleet(READY, READY, DRAINING), 3, 1, False, id="another is leaving"),
        pytest.param(fleet(READY, READY), 3, 1, False, id="another has not been forked yet"),
        pytest.param(fleet(READY, READY, EMPTY), 3, 1, False, id="another has just died"),
        pytest.param(fleet(READY), 1, 1, True, id="a single worker rolls all the same"),
        pytest.param(fleet(READY, READY), 2, 2, True, id="a fleet no larger than its floor rolls"),
        pytest.param(fleet(READY, LOADING), 2, 2, False, id="but only one worker at a time"),
        pytest.param(fleet(READY, READY, FAILED), 3, 1, True, id="a sibling has failed for good"),
        pytest.param(fleet(READY, READY, FAILED), 3, 2, False, id="then the floor would not hold"),
        pytest.param(fleet(READY, FAILED, FAILED), 3, 1, False, id="the last one of three stays"),
        pytest.param(
            [*fleet(READY, READY), worker(2, BACKOFF, failures=2)], 3, 1, True, id="a sibling backs off"
        ),
        pytest.param(
            [*fleet(READY, READY), worker(2, LOADING, failures=2)], 3, 1, False, id="a sibling tries again"
        ),
        pytest.param(
            [*fleet(READY, READY), worker(2, State.BACKOFF, failures=2)], 3, 1, True, id="a sibling backs off"
        ),
        pytest.param(
            [*fleet(READY, READY), worker(2, READY, failures=1)], 3, 1, True, id="a sibling did fail once"
        ),
        pytest.param(fleet(READY, READY, READY, LOADING), 3, 1, True, id="one more than wanted is booting"),
    ],
)
def test_a_worker_leaves_for_a_roll_only_if_it_can_be_spared(
    records: list[SlotRecord], target: int, floor: int, *, expected: bool
) -> None:
    """Slot 0 may go when all others that can be READY are, and as many as the floor wants remain."""
    assert may_leave(records, 0, target=target, floor=floor) is expected


N = DEVICE_ATTEMPTS


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        pytest.param([], False, id="no worker"),
        pytest.param([worker(0, LOADING, device="a", failures=N)], True, id="its only slot failed so often"),
        pytest.param([worker(0, LOADING, device="a", failures=N - 1)], False, id="once less"),
        pytest.param(
            [worker(0, LOADING, device="a", failures=N), worker(1, device="a")],
            False,
            id="another slot of it does well",
        ),
        pytest.param(
            [worker(0, LOADING, device="a", failures=N), worker(1, LOADING, device="a", failures=N + 1)],
            True,
            id="all its slots",
        ),
        pytest.param(
            [worker(0, LOADING, device="a", failures=N), worker(1, device="b")],
            True,
            id="another device does well",
        ),
        pytest.param([worker(0, READY, device="a", failures=N)], False, id="it is ready after all"),
        pytest.param([worker(0, EMPTY, device="a", failures=N)], False, id="nobody is on it now"),
    ],
)
def test_a_device_is_dead_when_all_its_slots_keep_failing(
    records: list[SlotRecord], *, expected: bool
) -> None:
    """A GPU is to blame when every worker on it has failed five times in a row."""
    assert device_is_dead(records, "a") is expected


def test_the_cpu_is_never_dead() -> None:
    """However often workers fail on a CPU, it is not the CPU."""
    assert not device_is_dead([worker(failures=1000)], CPU)


def test_other_attempts_may_be_asked_for() -> None:
    """The number of failures is the caller's to choose."""
    records = [worker(0, LOADING, device="a", failures=2)]
    assert [device_is_dead(records, "a", attempts) for attempts in (1, 2, 3)] == [True, True, False]


BAD, GOOD = {"device": "a", "failures": N}, {"device": "b", "failures": 1}


@pytest.mark.parametrize(
    ("records", "ever_ready", "expected"),
    [
        pytest.param([], False, False, id="nobody has been forked"),
        pytest.param(fleet(FAILED, FAILED), False, True, id="all have given up"),
        pytest.param(fleet(FAILED, LOADING), False, False, id="one is still trying"),
        pytest.param(fleet(FAILED), False, False, id="one is to be forked again"),
        pytest.param(fleet(FAILED, EMPTY), False, False, id="one has just died"),
        pytest.param(fleet(FAILED, READY), True, False, id="one serves"),
        pytest.param(fleet(FAILED, FAILED), True, False, id="once ready: on the CPU never"),
        pytest.param(fleet(FAILED, FAILED, **BAD), True, True, id="once ready: every device is dead"),
        pytest.param(
            [worker(0, FAILED, **BAD), worker(1, FAILED, **GOOD)],
            True,
            False,
            id="once ready: one GPU is left",
        ),
    ],
)
def test_the_service_halts_when_nobody_tries_any_more(
    records: list[SlotRecord], *, ever_ready: bool, expected: bool
) -> None:
    """Before anyone was ready: all slots have given up. Later: every device is dead."""
    assert halt_is_due(records, target=2, ever_ready=ever_ready) is expected
