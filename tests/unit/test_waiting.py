# SPDX-License-Identifier: Apache-2.0
"""`warmfleet wait`: when it ends, with which exit code, and what it says meanwhile."""

from __future__ import annotations

import io
import socket
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from documents import document, slot
from rich.console import Console

from service.commands import following
from service.commands.following import Seen, follow
from service.commands.waiting import FAILED, NOBODY, READY, TOO_LATE, Outcome, ended_here, telling, wait
from service.ops_client import Address, Event

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Address.parse("127.0.0.1:9000")
COLD = document(
    slot(0, "loading"), status="starting", ready=False, ready_workers=0, verdict="starting: 0 of 1"
)
WARM = document()
LAST = {"state": "loading", "text": "no such file"}
LOST = document(slot(0, "failed", last_error=LAST), status="failed", ready=False, verdict="failed: 0 of 1")


def outcome(*documents: dict[str, Any] | None, timeout: float = 5.0, ended: bool = False) -> Outcome:
    """Wait while these are seen, one a second, the last of them for ever."""
    seen = (Seen(float(second), documents[min(second, len(documents) - 1)]) for second in count())
    return wait(seen, HERE, timeout, lambda _: None, clock=lambda: 0.0, has_ended=lambda _: ended)


@pytest.mark.parametrize(
    ("documents", "code", "said"),
    [
        ([WARM], READY, "serving: 2 of 2 ready"),
        ([None, COLD, COLD, WARM], READY, "serving: 2 of 2 ready"),
        ([COLD], TOO_LATE, "not ready after 5 s: starting: 0 of 1"),
        ([COLD, None], TOO_LATE, "not ready after 5 s: nobody answers any more"),
        ([None], NOBODY, "nobody answers on http://localhost:9000; is the service running"),
        ([COLD, LOST, WARM], FAILED, "failed: 0 of 1; slot 0: last error while loading: no such file"),
    ],
    ids=["ready", "ready later", "never ready", "gone", "nobody", "failed"],
)
def test_waiting_ends_when_it_is_decided(
    documents: list[dict[str, Any] | None], code: int, said: str
) -> None:
    """Each way has an exit code and a sentence of its own."""
    found = outcome(*documents)
    assert found.code == code
    assert found.text.startswith(said)


def test_no_time_means_one_look() -> None:
    """It is the same as asking."""
    assert outcome(COLD, WARM, timeout=0).code == TOO_LATE


def test_a_service_that_ended_is_not_waited_for() -> None:
    """Unless it was stopping, as it does when another one takes its place."""
    assert outcome(COLD, None, WARM, ended=True).code == FAILED
    assert outcome(document(stopping=True, ready=False), None, WARM, ended=True).code == READY


def test_only_a_process_of_this_machine_can_be_known_to_have_ended() -> None:
    """Another host's numbers mean nothing here."""
    nobody = 2**22 + 1
    assert ended_here(document(host=socket.gethostname(), arbiter_pid=nobody))
    assert not ended_here(document(host="pod-a", arbiter_pid=nobody))


def test_off_a_terminal_each_step_is_a_line() -> None:
    """The same step is not said twice, and the end is not said here."""
    stream = io.StringIO()
    half = document(
        slot(0), slot(1, "warming"), status="starting", ready=False, ready_workers=1, verdict="1 of 2"
    )
    with telling(Console(file=stream), HERE) as tell:
        for one in (None, None, COLD, COLD, half, half, WARM):
            tell(one)
    assert stream.getvalue().splitlines() == [
        "nobody answers on http://localhost:9000",
        "starting: 0 of 1",
        "1 of 2",
    ]


# Following


def test_following_falls_back_to_asking_and_finds_the_stream_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream, its end, a look that finds nobody, a look that finds somebody, and a stream again."""
    first, second = (f'{{"schema": 1, "n": {n}}}' for n in (1, 2))
    streams: list[list[Event] | OSError] = [
        [Event("status", first), Event("other", "{}"), Event("bye", "{}")],
        ConnectionRefusedError(),
        [Event("status", second), Event("status", "{")],
    ]
    answers: list[dict[str, Any] | None] = [None, {"schema": 1, "n": 3}, {"detail": "Not Found"}]

    def stream(_: Address) -> Iterator[Event]:
        found = streams.pop(0)
        if isinstance(found, OSError):
            raise found
        yield from found

    monkeypatch.setattr(following, "stream", stream)
    monkeypatch.setattr(following, "ask", lambda address, path: answers.pop(0))
    slept: list[float] = []
    seen = follow(HERE, clock=lambda: 7.0, sleep=slept.append)
    found = [next(seen) for _ in range(5)]
    assert [one.document and one.document["n"] for one in found] == [1, None, 3, 2, None]
    assert [one.live for one in found] == [True, False, False, True, False]
    assert all(0.25 <= seconds <= 0.75 for seconds in slept)
