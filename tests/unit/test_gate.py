# SPDX-License-Identifier: Apache-2.0
"""Which worker takes a connection: the rules of docs/decisions/0001, one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import gate
from service.gate import FRESH_S, LOOKS, Gate, Situation, Verdict, decide, should_shed
from service.lifecycle import State
from service.scoreboard import Peer, Scoreboard

if TYPE_CHECKING:
    from collections.abc import Iterable

NOW = 1000.0
ACCEPT, LOOK_AGAIN, LEAVE = Verdict.ACCEPT, Verdict.LOOK_AGAIN, Verdict.LEAVE
READY, WARMING, DRAINING, FAILED, BACKOFF = (
    State.READY,
    State.WARMING,
    State.DRAINING,
    State.FAILED,
    State.BACKOFF,
)
COLD = sorted(set(State) - {READY, DRAINING, State.EMPTY})
HELD = {"ever_ready": True, "cold_s": 1.0, "cold_hold_s": 10.0}


def peer(load: int, state: State = READY, age: float = 0.0, mean: float | None = None) -> Peer:
    return Peer(state, NOW - age, load, load if mean is None else mean)


def me(state: State = READY, load: int = 0, siblings: Iterable[Peer] = (), **others: object) -> Situation:
    return replace(Situation(state, load, list(siblings), mean_load=load), **others)


STALE = peer(0, age=FRESH_S + 0.01)


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        # READY and nobody is less loaded: accept.
        pytest.param(me(), ACCEPT, id="alone"),
        pytest.param(me(load=99), ACCEPT, id="alone and loaded"),
        pytest.param(me(load=2, siblings=[peer(3), peer(9)]), ACCEPT, id="least loaded"),
        pytest.param(me(load=3, siblings=[peer(3), peer(9)]), ACCEPT, id="least loaded with another"),
        # READY but not the least loaded: look again, and after a few looks accept anyway.
        pytest.param(me(load=4, siblings=[peer(3), peer(9)]), LOOK_AGAIN, id="a sibling has less"),
        pytest.param(me(load=4, siblings=[peer(3)], looks=LOOKS - 1), LOOK_AGAIN, id="the last look"),
        pytest.param(me(load=4, siblings=[peer(3)], looks=LOOKS), ACCEPT, id="looked long enough"),
        # Rows that do not count.
        pytest.param(me(load=4, siblings=[STALE]), ACCEPT, id="a sibling that is stopped or killed"),
        pytest.param(me(load=4, siblings=[peer(0, age=FRESH_S)]), LOOK_AGAIN, id="a beat just fresh enough"),
        pytest.param(me(load=4, siblings=[STALE, peer(3)]), LOOK_AGAIN, id="one stale, one with less"),
        *(
            pytest.param(
                me(load=4, siblings=[peer(0, state)]), ACCEPT, id=f"an idle sibling that is {state.label}"
            )
            for state in (*COLD, DRAINING)
        ),
        # Not READY while a sibling is: never accept.
        *(
            pytest.param(
                me(state, siblings=[peer(99)], ever_ready=ever, cold_s=cold),
                LEAVE,
                id=f"{state.label}, a sibling is ready, ever_ready {ever}, cold {cold}",
            )
            for state in COLD
            for ever, cold in ((True, 0.0), (True, 1e6), (False, 0.0))
        ),
        # No slot READY and none ever was: accept, to say 503.
        *(
            pytest.param(
                me(state, siblings=[peer(0, WARMING)], ever_ready=False),
                ACCEPT,
                id=f"first boot, {state.label}",
            )
            for state in COLD
        ),
        # No slot READY but one was: hold for a while, then accept to say 503.
        pytest.param(me(WARMING, **HELD), LEAVE, id="cold for a second"),
        pytest.param(
            me(WARMING, siblings=[STALE], **HELD), LEAVE, id="the last warm one has just been killed"
        ),
        pytest.param(me(WARMING, **HELD | {"cold_s": 9.99}), LEAVE, id="cold for almost ten seconds"),
        pytest.param(me(WARMING, **HELD | {"cold_s": 10.0}), ACCEPT, id="cold for ten seconds"),
        pytest.param(me(FAILED, **HELD | {"cold_s": 60.0}), ACCEPT, id="failed for good, cold for a minute"),
        pytest.param(me(WARMING, **HELD | {"cold_s": 0.0, "cold_hold_s": 0.0}), ACCEPT, id="nothing is held"),
        # DRAINING: never, its siblings or its successor will.
        pytest.param(me(DRAINING), LEAVE, id="drains alone"),
        pytest.param(me(DRAINING, siblings=[peer(9)]), LEAVE, id="drains beside others"),
        pytest.param(me(DRAINING, looks=LOOKS, cold_s=1e6), LEAVE, id="drains, however long"),
        # The service stops: accept to the last, as what stays queued would be reset; a cold worker cannot.
        pytest.param(me(DRAINING, load=9, siblings=[peer(0)], stopping=True), ACCEPT, id="stops, draining"),
        pytest.param(me(READY, load=9, siblings=[peer(0)], stopping=True), ACCEPT, id="stops, still ready"),
        *(pytest.param(me(state, stopping=True), LEAVE, id=f"stops, {state.label}") for state in COLD),
        pytest.param(me(WARMING, ever_ready=False, stopping=True), LEAVE, id="stops during its first boot"),
    ],
)
def test_the_rules_are_applied_in_their_order(situation: Situation, expected: Verdict) -> None:
    """Each rule of accepting, at its edges."""
    assert decide(situation, NOW) is expected


PEERS = st.lists(st.builds(peer, st.integers(0, 9), st.sampled_from(State), st.floats(0, 2)), max_size=6)


SITUATIONS = st.builds(
    Situation,
    state=st.sampled_from(COLD),
    load=st.integers(0, 9),
    siblings=PEERS,
    looks=st.integers(0, 99),
    ever_ready=st.booleans(),
    cold_s=st.floats(0, 20),
    stopping=st.booleans(),
)


@given(SITUATIONS)
def test_no_cold_worker_ever_accepts_while_a_warm_one_is_there(situation: Situation) -> None:
    """Whatever else is the case: a READY sibling with a fresh beat means that a cold worker takes nothing."""
    assert decide(replace(situation, siblings=[*situation.siblings, peer(9)]), NOW) is LEAVE


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_somebody_always_accepts(loads: list[int]) -> None:
    """Among READY workers with fresh rows at least one takes the connection at once: the least loaded."""
    verdicts = [
        decide(me(load=load, siblings=[peer(x) for j, x in enumerate(loads) if j != i]), NOW)
        for i, load in enumerate(loads)
    ]
    assert verdicts == [ACCEPT if load == min(loads) else LOOK_AGAIN for load in loads]


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        pytest.param(me(load=99), False, id="alone"),
        pytest.param(me(load=1, siblings=[peer(0)]), False, id="one above nothing"),
        pytest.param(me(load=2, siblings=[peer(0)]), True, id="two above nothing"),
        pytest.param(me(load=13, siblings=[peer(10), peer(99)]), False, id="13 beside 10"),
        pytest.param(me(load=14, siblings=[peer(10), peer(99)]), True, id="14 beside 10"),
        pytest.param(me(load=9, siblings=[peer(0, mean=9)]), False, id="the lesser one is idle for a moment"),
        pytest.param(me(load=1, mean_load=9, siblings=[peer(0)]), False, id="has shed enough already"),
        pytest.param(me(load=99, siblings=[STALE]), False, id="the lesser one is not heard of"),
        pytest.param(me(load=99, siblings=[peer(0, WARMING)]), False, id="the lesser one is cold"),
        pytest.param(me(DRAINING), True, id="drains"),
        pytest.param(me(WARMING), True, id="cold"),
        pytest.param(me(stopping=True), True, id="stops"),
    ],
)
def test_connections_are_sent_elsewhere_when_that_helps(situation: Situation, *, expected: bool) -> None:
    """`Connection: close` from a worker that is well above the least loaded one, or that is going away."""
    assert should_shed(situation, NOW) is expected


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Scoreboard:
    """Return a table at time 1000: slot 0 is READY, slot 1 too, and a little loaded; slot 2 warms."""
    monkeypatch.setattr(gate.time, "monotonic", lambda: NOW)
    board = Scoreboard(3)
    for slot, (state, load) in enumerate([(READY, 0), (READY, 2), (WARMING, 0)]):
        board.spawn(slot, "cpu", NOW)
        board.rows[slot].state, board.rows[slot].load = state, load
        board.rows[slot].mean_load = load
    board.header.ever_ready, board.header.last_ready = 1, NOW - 3
    return board


def test_the_gate_reads_its_situation_off_the_table(board: Scoreboard) -> None:
    """All that the rules look at is on the scoreboard; asking also shows the siblings this worker's load."""
    board.header.stopping = 1
    assert Gate(board, 0, 7.0).situation(5, looks=4) == Situation(
        READY,
        load=5,
        siblings=[Peer(READY, NOW, 2, 2), Peer(WARMING, NOW, 0, 0)],
        looks=4,
        ever_ready=True,
        cold_s=3.0,
        cold_hold_s=7.0,
        stopping=True,
    )
    assert board.rows[0].load == 5


def test_the_gate_gives_each_slot_its_verdict(board: Scoreboard) -> None:
    """The same table looks different from each slot."""
    gates = [Gate(board, slot, 7.0) for slot in range(3)]
    board.rows[0].mean_load = 9
    assert [one.verdict(load, 0) for one, load in zip(gates, (3, 2, 0), strict=True)] == [
        LOOK_AGAIN,
        ACCEPT,
        LEAVE,
    ]
    assert [one.sheds(load) for one, load in zip(gates, (9, 2, 0), strict=True)] == [True, False, True]
    assert [one.siblings_serve for one in gates] == [True, True, True]


def test_a_warm_worker_alone_has_no_sibling_that_serves(board: Scoreboard) -> None:
    """Stale and cold rows do not serve."""
    board.rows[1].beat = NOW - FRESH_S - 0.01
    assert [Gate(board, slot, 7.0).siblings_serve for slot in range(3)] == [False, True, True]
