# SPDX-License-Identifier: Apache-2.0
"""The token budget after the device ran out of memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.token_budget import MANY, RECOVER_S, SHRINK, STEP, TokenBudget

TIME = 1000.0


def test_it_begins_with_what_warm_up_found() -> None:
    """Nothing is held back, and nothing has to be recovered."""
    budget = TokenBudget(8192, 512)
    assert (budget.now, budget.floor, budget.events) == (8192, 512, 0)
    assert not budget.recover(TIME)


def test_the_floor_is_within_what_was_declared() -> None:
    """A declared budget below the longest text is its own floor."""
    assert TokenBudget(256, 512).floor == 256


def test_it_shrinks_to_three_quarters_of_what_did_not_fit() -> None:
    """What counts is the size that failed, not the budget; a small failure after a big one shrinks again."""
    budget = TokenBudget(8192, 512)
    sizes = []
    for tokens in (8000, 4000, 6000):
        assert not budget.shrink(tokens, TIME)
        sizes.append(budget.now)
    assert (sizes, budget.events) == ([int(SHRINK * 8000), int(SHRINK * 4000), int(SHRINK * 4000)], 3)


def test_it_never_shrinks_below_the_longest_text() -> None:
    """Below the floor texts would be computed otherwise than elsewhere."""
    budget = TokenBudget(8192, 512)
    budget.shrink(3, TIME)
    assert budget.now == 512


def test_it_recovers_a_step_a_minute() -> None:
    """Not before a minute without trouble, then a step, then another minute; at last it has all of it."""
    budget = TokenBudget(1000, 100)
    budget.shrink(1200, TIME)
    assert not budget.recover(TIME + RECOVER_S - 1)
    assert budget.now == 900
    assert budget.recover(TIME + RECOVER_S)
    assert budget.now == 900 + STEP * 1000
    assert not budget.recover(TIME + RECOVER_S + 1)
    assert budget.recover(TIME + 2 * RECOVER_S)
    assert budget.now == 1000
    assert not budget.recover(TIME + 9 * RECOVER_S)


def test_a_step_is_at_least_one_token() -> None:
    """Even a tiny budget comes back."""
    budget = TokenBudget(10, 1)
    budget.shrink(2, TIME)
    assert budget.recover(TIME + RECOVER_S)
    assert budget.now == 2


@pytest.mark.parametrize("gap_s", [0.0, RECOVER_S - 1])
def test_trouble_at_the_floor_again_and_again_asks_for_a_fresh_process(gap_s: float) -> None:
    """The third time, each within a minute of the one before, says so; the way down does not count."""
    budget = TokenBudget(1000, 100)
    assert not budget.shrink(100, TIME)
    said = [budget.shrink(100, TIME + number * gap_s) for number in range(1, MANY + 1)]
    assert said == [False] * (MANY - 1) + [True]


def test_trouble_at_the_floor_now_and_then_does_not() -> None:
    """A neighbour that takes the memory every few minutes is no reason to leave."""
    budget = TokenBudget(100, 100)
    assert not any(budget.shrink(100, TIME + number * RECOVER_S) for number in range(10))


def test_a_step_up_forgets_the_trouble_at_the_floor() -> None:
    """It was a minute ago or more, and does not count with what comes now."""
    budget = TokenBudget(1000, 100)
    for _ in range(MANY):
        assert not budget.shrink(100, TIME)
    assert budget.recover(TIME + RECOVER_S)
    assert not budget.shrink(100, TIME + RECOVER_S + 1)  # from above the floor
    assert not budget.shrink(100, TIME + RECOVER_S + 2)


@given(
    st.integers(1, 20_000),
    st.integers(1, 1024),
    st.lists(st.tuples(st.integers(1, 30_000) | st.none(), st.floats(0, 200)), max_size=40),
)
def test_it_stays_between_the_floor_and_what_was_declared(
    declared: int, floor: int, steps: list[tuple[int | None, float]]
) -> None:
    """Whatever happens, and down at once but up by a step at most."""
    budget, time = TokenBudget(declared, floor), TIME
    for tokens, seconds in steps:
        time, before = time + seconds, budget.now
        if tokens is not None:
            budget.shrink(tokens, time)
            assert budget.now <= before
        else:
            assert budget.recover(time) == (budget.now > before)
            assert budget.now - before <= max(1, STEP * declared)
        assert min(floor, declared) <= budget.now <= declared
