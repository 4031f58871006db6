# SPDX-License-Identifier: Apache-2.0
"""`warmfleet scale` and `roll` against a service that exists in the test alone."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from service.commands import control
from service.commands.control import (
    ControlError,
    Scaled,
    Service,
    find,
    limit_of,
    next_signal,
    roll,
    scale,
    send,
)
from service.commands.settling import missing, unsettled, wait_rolled, wait_scaled
from service.ops_client import Address, NoServiceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HERE = Address.parse("127.0.0.1:9000")
SUM = ["host: 1.00 GiB: 4 fit", "4 workers fit; host allows no more"]


class Fleet:
    """Obeys signals as the arbiter does, one look later; time passes only while somebody sleeps."""

    def __init__(
        self, target: int, *, fits: int | None = None, policy: str = "clamp", planned: int = 0
    ) -> None:
        self.target, self.fits, self.policy, self.planned = target, fits, policy, planned
        self.epoch = 0
        self.epochs = [0] * target
        self.states = ["ready"] * target
        self.sent: list[int] = []
        self.time = 0.0
        self.deaf = self.ended = self.stopping = False
        self.silent = 0
        self.on_sleep: Callable[[], None] = lambda: None

    @property
    def service(self) -> Service:
        return Service(
            self.look, self.send, lambda: not self.ended, clock=lambda: self.time, sleep=self.sleep
        )

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.on_sleep()

    def send(self, signum: int) -> None:
        self.sent.append(signum)
        if self.deaf:
            return
        if signum == signal.SIGHUP:
            self.epoch += 1
        elif signum == signal.SIGTTIN:
            if self.policy == "warn" or self.fits is None or self.target < self.fits:
                self.target += 1
                self.planned = max(self.planned, self.target) if self.planned else 0
        elif self.target > 1:
            self.target -= 1
            self.planned = min(self.planned, self.target)

    def look(self) -> dict[str, Any] | None:
        if self.silent or self.ended:
            self.silent -= 1
            return None
        budget: dict[str, Any] = {"policy": self.policy, "planned": self.planned, "text": SUM}
        rows = [
            {"slot": slot, "state": state, "epoch": epoch}
            for slot, (state, epoch) in enumerate(zip(self.states, self.epochs, strict=True))
        ]
        if self.fits is not None:
            budget["fits"] = self.fits
        return {
            "target": self.target,
            "roll_epoch": self.epoch,
            "stopping": self.stopping,
            "budget": budget,
            "workers": rows,
        }


# scale


@pytest.mark.parametrize(("before", "wanted"), [(2, 5), (5, 2), (3, 3), (1, 2), (2, 1)])
def test_one_signal_a_worker_leads_to_the_wanted_number(before: int, wanted: int) -> None:
    """Up or down, and none at all if it is so already."""
    fleet = Fleet(before, fits=9)
    found = scale(fleet.service, wanted)
    assert found == Scaled(before, wanted, wanted)
    assert fleet.sent == [signal.SIGTTIN] * max(0, wanted - before) + [signal.SIGTTOU] * max(
        0, before - wanted
    )


def test_growth_ends_where_the_budget_does() -> None:
    """No signal is sent for what cannot be; the answer has the sum."""
    fleet = Fleet(2, fits=4)
    found = scale(fleet.service, 6)
    assert found == Scaled(2, 4, 6, ("the budget allows no more", *SUM))
    assert (fleet.sent, fleet.time, found.done) == ([signal.SIGTTIN] * 2, 0.0, False)
    assert str(found).splitlines() == [
        "2 -> 4 workers, not 6: the budget allows no more",
        *(f"  {s}" for s in SUM),
    ]


def test_a_budget_that_only_warns_limits_nobody() -> None:
    """Nor does one that is not known yet."""
    assert scale(Fleet(2, fits=3, policy="warn").service, 6).done
    assert scale(Fleet(2).service, 6).done
    assert limit_of({"budget": {"policy": "warn", "fits": 3}}) is None
    assert limit_of({}) is None


def test_a_service_that_does_not_move_is_given_up() -> None:
    """After ten seconds, with the number it stayed at; the table may be full, or the arbiter hang."""
    fleet = Fleet(2)
    fleet.deaf = True
    found = scale(fleet.service, 3)
    assert (found.before, found.after, found.done) == (2, 2, False)
    assert found.reason[0].startswith("the service took no more within 10 s")
    assert 10 <= fleet.time < 11


def test_a_listener_that_is_silent_for_a_moment_is_asked_again() -> None:
    """The worker that would have answered may be the one that leaves."""
    fleet = Fleet(3, fits=9)
    fleet.silent = 5
    assert scale(fleet.service, 2).done


def test_a_service_that_answers_no_more_is_an_error() -> None:
    """Said after ten seconds."""
    fleet = Fleet(3)
    fleet.silent = 10**9
    with pytest.raises(ControlError, match="has not answered for 10 s"):
        scale(fleet.service, 2)


def test_a_service_that_is_still_growing_stays_at_the_wanted_number() -> None:
    """It has three of six planned workers: one step on and one back end the growth at three."""
    fleet = Fleet(3, fits=6, planned=6)
    assert scale(fleet.service, 3).done
    assert (fleet.sent, fleet.target, fleet.planned) == ([signal.SIGTTIN, signal.SIGTTOU], 3, 3)
    assert next_signal(3, 2, 3) is None


@pytest.mark.parametrize(
    ("found", "said"),
    [(Scaled(2, 5, 5), "2 -> 5 workers"), (Scaled(5, 5, 5), "5 workers, as before")],
)
def test_the_answer_is_short(found: Scaled, said: str) -> None:
    """One line if all went as wanted."""
    assert str(found) == said


# roll


def test_a_roll_is_a_new_epoch() -> None:
    """One HUP; done when the arbiter has counted it."""
    fleet = Fleet(2)
    assert roll(fleet.service) == 1
    assert fleet.sent == [signal.SIGHUP]


def test_a_roll_that_does_not_begin_is_an_error() -> None:
    """Said after ten seconds."""
    fleet = Fleet(2)
    fleet.deaf = True
    with pytest.raises(ControlError, match="began no rolling restart within 10 s"):
        roll(fleet.service)


def test_a_roll_is_over_when_every_worker_is_ready_in_the_new_epoch() -> None:
    """Not while one is old, or cold, or its listener is silent for a moment."""
    fleet = Fleet(2)
    epoch = roll(fleet.service)
    steps = [([1, 0], ["warming", "ready"]), ([1, 0], ["ready", "ready"]), ([1, 1], ["ready", "loading"])]
    steps.append(([1, 1], ["ready", "ready"]))
    left = list(steps)

    def move() -> None:
        if left:
            fleet.epochs, fleet.states = left.pop(0)
            fleet.silent = 1

    fleet.on_sleep = move
    found = wait_rolled(fleet.service, epoch, 60)
    assert [row["epoch"] for row in found["workers"]] == [1, 1]
    assert not left


def test_a_roll_that_takes_too_long_names_who_is_missing() -> None:
    """Each slot with its state; nothing else is done about it."""
    fleet = Fleet(2)
    epoch = roll(fleet.service)
    fleet.epochs, fleet.states = [1, 0], ["backoff", "ready"]
    with pytest.raises(
        ControlError, match=r"after 5 s: slot 0 is backoff; slot 1 is ready in the old epoch$"
    ):
        wait_rolled(fleet.service, epoch, 5)
    fleet.silent = 10**9
    with pytest.raises(ControlError, match="nobody answers"):
        wait_rolled(fleet.service, epoch, 5)


def test_slots_without_a_row_are_missing() -> None:
    """A worker that has not been forked yet has none."""
    assert missing({"target": 3, "workers": [{"slot": 0, "state": "ready", "epoch": 1}]}, 1) == [
        "2 of 3 workers are not there yet"
    ]


def test_scaling_is_over_when_so_many_are_ready_and_no_others_left() -> None:
    """Not while one is cold, one too many drains, or somebody else scaled meanwhile; all of it is told."""
    fleet = Fleet(2, fits=9)
    assert scale(fleet.service, 3).done
    steps = [["ready", "ready", "loading"], ["ready"] * 3 + ["draining"], ["ready"] * 3]
    told: list[int] = []

    def move() -> None:
        if steps:
            fleet.states = steps.pop(0)
            fleet.epochs = [0] * len(fleet.states)

    fleet.on_sleep = move
    found = wait_scaled(fleet.service, 3, 60, lambda payload: told.append(len(payload["workers"])))
    assert [row["state"] for row in found["workers"]] == ["ready"] * 3
    assert told == [2, 3, 4, 3]
    fleet.target = 2
    assert unsettled(fleet.look() or {}, 3) == ["the service keeps 2 by now"]


def test_a_service_that_ends_meanwhile_is_not_waited_for() -> None:
    """Its arbiter is gone, or it says that it is stopping: one sentence, at once."""
    fleet = Fleet(2, fits=9)
    fleet.states = ["ready", "loading"]

    def end() -> None:
        fleet.ended = True

    fleet.on_sleep = end
    with pytest.raises(ControlError, match="the service has ended meanwhile; its log says why"):
        wait_scaled(fleet.service, 2, 60)
    assert fleet.time < 1
    stopping = Fleet(2)
    stopping.stopping = True
    with pytest.raises(ControlError, match="there are not 2 workers: the service is stopping"):
        wait_scaled(stopping.service, 2, 60)


# Whom the signals reach


def proc(root: Path, pid: int, parent: int, command: bytes) -> None:
    """Make a process."""
    (root / str(pid)).mkdir()
    (root / str(pid) / "cmdline").write_bytes(command)
    (root / str(pid) / "stat").write_text(f"{pid} (a (strange) name) S {parent} 1 1 0")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What /workers says: an arbiter and its workers."""
    payload: dict[str, Any] = {"arbiter_pid": 100, "workers": [{"pid": None}, {"pid": 101}]}
    monkeypatch.setattr(control, "ask", lambda bind, path: payload if path == "/workers" else None)
    return payload


def test_a_gunicorn_of_this_machine_is_found(answer: dict[str, Any], tmp_path: Path) -> None:
    """Its process is a Gunicorn, and parent of a worker that the answer names."""
    proc(tmp_path, 100, 1, b"python\0-m\0gunicorn\0")
    proc(tmp_path, 101, 100, b"python\0-m\0gunicorn\0")
    assert find(HERE, tmp_path).look() == answer


@pytest.mark.parametrize(
    "processes",
    [
        [],
        [(100, 1, b"postgres"), (101, 100, b"postgres")],
        [(100, 1, b"python\0-m\0gunicorn"), (101, 7, b"python\0-m\0gunicorn")],
        [(100, 1, b"python\0-m\0gunicorn")],
    ],
    ids=["nothing", "another program", "another Gunicorn", "a Gunicorn alone"],
)
def test_a_process_that_is_not_the_arbiter_gets_no_signal(
    processes: list[tuple[int, int, bytes]], answer: dict[str, Any], tmp_path: Path
) -> None:
    """The same number means something else on another host, or in another container."""
    for one in processes:
        proc(tmp_path, *one)
    with pytest.raises(
        ControlError, match="process 100, on another host or in another container; run this there"
    ):
        find(HERE, tmp_path)


@pytest.mark.parametrize(
    "payload", [None, {}, {"arbiter_pid": "1"}], ids=["nobody", "a stranger", "nonsense"]
)
def test_nobody_there_is_said(monkeypatch: pytest.MonkeyPatch, payload: dict[str, Any] | None) -> None:
    """No answer, or none of ours."""
    monkeypatch.setattr(control, "ask", lambda bind, path: payload)
    with pytest.raises(
        NoServiceError, match="nobody answers on http://localhost:9000; is the service running"
    ):
        find(HERE)


@pytest.mark.parametrize(
    ("error", "said"),
    [(PermissionError, "belongs to another user; run this as that user"), (ProcessLookupError, "has ended")],
)
def test_a_signal_that_cannot_be_sent_is_said(
    monkeypatch: pytest.MonkeyPatch, error: type[OSError], said: str
) -> None:
    """In one sentence, with the process."""

    def kill(pid: int, signum: int) -> None:
        raise error

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(ControlError, match=said):
        send(100, signal.SIGHUP)
