# SPDX-License-Identifier: Apache-2.0
"""A boot that failed: another try where that may help, else the reason, for as long as someone asks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn

import pytest
from households import fleet_of, put

from service import failing
from service.errors import BudgetError, ModelError, WarmupError
from service.failing import BOOT_ERROR, TRY_AGAIN, Failing
from service.lifecycle import Failure, State

if TYPE_CHECKING:
    from service.fleet import Fleet


class Left(Exception):  # noqa: N818 - no error: the end of the process
    """The process has ended with this code."""


class Waited(Exception):  # noqa: N818 - likewise
    """It is parked, and would wait."""


def leave(code: int) -> NoReturn:
    raise Left(code)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(_: float) -> None:
        raise Waited

    monkeypatch.setattr(failing.asyncio, "sleep", sleep)


def outcome(fleet: Fleet, error: Exception) -> int | str:
    """Return with which code the worker of slot 0 ends, or that it stays."""
    try:
        asyncio.run(Failing(fleet, 0, leave).explain(error))
    except Left as left:
        code: int = left.args[0]
        return code
    except Waited:
        return "parked"


@pytest.fixture
def fleet() -> Fleet:
    """Return a fleet of two that warm up for the first time."""
    fleet = fleet_of(2)
    for slot in (0, 1):
        put(fleet, slot, State.WARMING)
    return fleet


REASONS = [
    pytest.param(ModelError("no such file"), State.LOADING, Failure.LOAD, id="load"),
    pytest.param(WarmupError("not finite"), State.WARMING, Failure.WARMUP, id="warm-up"),
]


@pytest.mark.parametrize(("error", "state", "reason"), REASONS)
def test_a_failed_boot_is_tried_again_with_its_reason_on_the_scoreboard(
    error: Exception, state: State, reason: Failure
) -> None:
    """It may have been an accident; the arbiter counts the failure when it buries the worker."""
    fleet = fleet_of(2)
    put(fleet, 0, state)
    assert outcome(fleet, error) == TRY_AGAIN
    row, record = fleet.board.rows[0], fleet.board.record(0)
    assert list(Failure)[row.exit_reason - 1] is reason
    assert (record.error, record.error_state, row.failures) == (str(error), state.label, 0)


def test_the_last_try_ends_in_the_slot(fleet: Fleet) -> None:
    """After `boot_attempts` tries the worker stays, to tell why; the failure is counted at once."""
    fleet.board.rows[0].failures = fleet.settings.boot_attempts - 1
    assert outcome(fleet, WarmupError("not finite")) == "parked"
    record = fleet.board.record(0)
    assert (record.state, record.failures) == (State.FAILED, fleet.settings.boot_attempts)


def test_what_does_not_fit_is_not_tried_again(fleet: Fleet) -> None:
    """The next worker would measure the same: at the first failure the sum is on /ready, under its reason."""
    assert outcome(fleet, BudgetError("2 workers are wanted, 1 fit")) == "parked"
    record = fleet.board.record(0)
    assert (record.state, record.failures, record.error) == (State.FAILED, 1, "2 workers are wanted, 1 fit")
    assert {reason: count for reason, count in record.failures_by_reason.items() if count} == {"budget": 1}


def test_when_all_are_refused_the_service_ends_with_the_sum(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    """The last of them halts the arbiter, and only that one; nobody tries three times first."""
    fleet.board.enter(1, State.FAILED, 3.0)
    assert outcome(fleet, BudgetError("2 workers are wanted, 1 fit")) == BOOT_ERROR
    assert caplog.records[-1].getMessage() == (
        "no worker can become ready; stopping: 2 workers are wanted, 1 fit"
    )
    assert fleet.board.header.halting == 1


def test_a_service_that_was_ready_goes_on_trying(fleet: Fleet) -> None:
    """What did fit once may fit again when others have left: never is a service given up that has served."""
    put(fleet, 1, State.READY)
    assert outcome(fleet, BudgetError("1 worker is wanted, 0 fit")) == TRY_AGAIN


def test_a_bug_is_told_with_its_type(fleet: Fleet) -> None:
    """What nobody expected is named as Python names it."""
    assert outcome(fleet, KeyError("x")) == TRY_AGAIN
    assert fleet.board.record(0).error == "KeyError: 'x'"
