# SPDX-License-Identifier: Apache-2.0
"""The watchdog: armed for as long as the block runs, and the deadline on the row for the arbiter to see."""

from __future__ import annotations

from typing import Any

import pytest

from service import watchdog
from service.scoreboard import Scoreboard
from service.watchdog import Watchdog

Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Keep the calls to faulthandler's timer, which would end the tests; the clock stands at 1000."""
    made: Calls = []
    faulthandler = watchdog.faulthandler
    arm = lambda seconds, **others: made.append(("arm", seconds, others))  # noqa: E731 - a stand-in
    monkeypatch.setattr(faulthandler, "dump_traceback_later", arm)
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: made.append(("cancel",)))
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: 1000.0)
    return made


ARMED = ("arm", 7.5, {"exit": True})


def test_a_block_has_a_deadline_while_it_runs(calls: Calls) -> None:
    """The timer that ends the process is armed and cancelled; the row shows the deadline in between."""
    row = Scoreboard(1).rows[0]
    with Watchdog(row).stage(7.5):
        during = (row.deadline, calls.copy())
    assert (during, row.deadline, calls) == ((1007.5, [ARMED]), 0.0, [ARMED, ("cancel",)])


def test_a_block_that_raises_leaves_nothing_armed(calls: Calls) -> None:
    """An error passes through, and no timer stays behind to end a healthy process later."""
    row = Scoreboard(1).rows[0]
    with pytest.raises(KeyError), Watchdog(row).stage(7.5):
        raise KeyError
    assert (row.deadline, calls) == (0.0, [ARMED, ("cancel",)])


def test_blocks_follow_one_another(calls: Calls) -> None:
    """Each block arms the one timer anew, with a limit of its own."""
    row = Scoreboard(1).rows[0]
    guard = Watchdog(row)
    deadlines = []
    for seconds in (1.0, 2.0):
        with guard.stage(seconds):
            deadlines.append(row.deadline)
    assert (deadlines, [call[:2] for call in calls]) == (
        [1001.0, 1002.0],
        [("arm", 1.0), ("cancel",), ("arm", 2.0), ("cancel",)],
    )


def test_a_forward_pass_only_notes_its_deadline(calls: Calls) -> None:
    """Arming the timer would cost a thread a pass."""
    row = Scoreboard(1).rows[0]
    with Watchdog(row).forward(7.5):
        during = row.deadline
    assert (during, row.deadline, calls) == (1007.5, 0.0, [])


def test_a_late_pass_ends_the_process_with_all_stacks(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tick after the deadline, not before, and with an exit code that lets the slot be filled again."""
    row = Scoreboard(1).rows[0]
    ended: list[object] = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **how: ended.append(how))
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    guard = Watchdog(row)
    with guard.forward(7.5):
        guard.tick(1007.4, 60.0)
        assert ended == []
        guard.tick(1007.5, 60.0)
    assert ended == [{"all_threads": True}, 1]


def test_ticks_postpone_the_timer_that_guards_them(calls: Calls) -> None:
    """Once a second, and by more than a pass may take: what holds the GIL so long ends the process."""
    guard = Watchdog(Scoreboard(1).rows[0])
    for moment in (1000.0, 1000.5, 1001.0):
        guard.tick(moment, 60.0)
    assert calls == [("arm", 62.0, {"exit": True})] * 2
