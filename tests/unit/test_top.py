# SPDX-License-Identifier: Apache-2.0
"""What `warmfleet status` and `top` draw of status documents; no terminal is involved."""

from __future__ import annotations

import io
from typing import Any

import pytest
from documents import MIB, document, room, slot, totals
from rich.console import Console

from service.commands.following import Seen
from service.commands.showing import age, bar, duration, failures, memory, number, remark, room_words
from service.commands.status import show
from service.commands.top_view import Watch, fit, screen, spark
from service.ops_client import Address

HERE = Address.parse("127.0.0.1:9000")


def drawn(watch: Watch, now: float = 0.0, width: int = 120, height: int = 40) -> list[str]:
    """Return the lines of the screen."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    with console.capture() as captured:
        console.print(screen(watch, now, width, height))
    return [line.rstrip() for line in captured.get().splitlines()]


def watch_of(*documents: dict[str, Any] | None) -> Watch:
    """Return what is known after these looks, a second apart."""
    watch = Watch(HERE)
    for second, one in enumerate(documents):
        watch.take(Seen(float(second), one, live=True))
    return watch


def printed(one: dict[str, Any], width: int = 160) -> list[str]:
    """Return what `status` prints."""
    stream = io.StringIO()
    show(one, Console(file=stream, width=width, highlight=False))
    return stream.getvalue().splitlines()


# Words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "-"),
        (0.04, "0.0 s"),
        (3.21, "3.2 s"),
        (42.4, "42 s"),
        (312, "5m 12s"),
        (11040, "3h 4m"),
        (9e5, "10d 10h"),
    ],
)
def test_ages_have_two_units_at_most(seconds: float | None, said: str) -> None:
    """Short enough for a column."""
    assert age(seconds) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "-"), (0.00042, "420 µs"), (0.0031, "3.1 ms"), (0.42, "420 ms"), (1.25, "1.25 s")],
)
def test_durations_have_the_digits_that_matter(seconds: float | None, said: str) -> None:
    """From microseconds to seconds."""
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0"), (0.25, "0.25"), (3, "3"), (12.4, "12"), (1530, "1 530"), (2.4e6, "2.4 M")]
)
def test_rates_have_the_digits_that_matter(count: float, said: str) -> None:
    """Thousands are set apart."""
    assert number(count) == said


def test_memory_is_of_the_device_and_of_the_host() -> None:
    """On a CPU the host's alone; before a worker is measured, nothing."""
    gpu = {"device_reserved": 900 * MIB, "device_context": 100 * MIB, "uss": 50 * MIB}
    assert memory(slot(0)) == "100 MiB"
    assert memory(slot(0, memory_bytes=gpu)) == "1000 MiB + 50 MiB host"
    assert memory(slot(0, memory_bytes={"rss": None})) == "-"


def test_failures_are_told_by_reason() -> None:
    """Nothing else is worth a column."""
    assert failures(slot(0)) == "0"
    assert failures(slot(0, failures=1, failures_by_reason={"killed": 2, "load": 0})) == "2 killed"


def test_a_slot_says_what_it_does_and_what_went_wrong() -> None:
    """On one line, whatever the error holds: it goes to somebody's terminal."""
    row = slot(
        0, "warming", doing="64x512", eta_seconds=8.0, last_error={"state": "loading", "text": "a\nb\x1b[2Jc"}
    )
    assert remark(row) == "64x512, 8.0 s left, last error while loading: a b [2Jc"
    assert remark(slot(0, "backoff", retry_in_seconds=3.2)) == "tries again in 3.2 s"


# Memory


def test_a_memory_is_a_bar_of_its_parts() -> None:
    """A tenth is others', a fifth shared, a fifth of workers; a tenth is kept free."""
    assert bar(room(), 10).plain == "░▒▒██····" + " "
    assert room_words(room()) == "500 MiB of 1000 MiB · one more needs 150 MiB: fits"


@pytest.mark.parametrize("others", [0, 500 * MIB, 5000 * MIB])
def test_a_bar_is_never_wider_than_it_may(others: int) -> None:
    """Also if more is used than there is."""
    assert len(bar(room(others_bytes=others), 30).plain) == 30


# status


def test_status_is_the_verdict_the_slots_and_the_budget() -> None:
    """One line each, cut nowhere, with nothing behind it."""
    warming = slot(1, "warming", progress=0.4, doing="64x512")
    one = document(slot(0), warming, verdict="serving: 1 of 2 ready", warning="warm-up is skipped")
    one["totals"] = totals(10, refused=2)
    lines = printed(one)
    assert lines[:3] == [
        "serving: 1 of 2 ready",
        "warm-up is skipped",
        "org/name · torch on cpu · up 1m 40s · arbiter 1 on pod-a · API 0.0.0.0:8000",
    ]
    assert " ".join(lines[4].split()) == "slot state age device gen load memory failures doing, last error"
    assert " ".join(lines[6].split()) == "1 warming 40% 42 s cpu 1 3 100 MiB 0 64x512"
    assert lines[-2:] == [
        "budget: 6 workers fit; host allows no more",
        "since the start: 20 texts, requests answered: 10 with 200, 2 with 429",
    ]
    assert all(line == line.rstrip() for line in lines)


# top


def test_nobody_has_answered_yet() -> None:
    """The screen says whom it asks."""
    assert drawn(Watch(HERE))[0] == "asking http://localhost:9000"
    (line, _) = drawn(watch_of(None))
    assert line.startswith("nobody answers on http://localhost:9000; is the service running")


def test_the_screen_has_traffic_stages_memory_and_slots() -> None:
    """Rates come from two documents; until then it says that it measures."""
    first, second = (document(uptime=100 + s) | {"totals": totals(100 * s, 10 * s)} for s in (0, 1))
    assert "traffic: measuring" in drawn(watch_of(first))
    lines = drawn(watch_of(first, second), now=1.0)
    assert lines[0] == "warmfleet top http://localhost:9000  live  q leaves"
    assert lines[1] == "serving: 2 of 2 ready"
    assert lines[4] == (
        "200 texts/s  2 000 tokens/s  100 batches/s of 2.0 texts  20% padding  "
        "replies/s: 100 with 200, 10 with 429  10 requests…"
    )
    text = "\n".join(lines)
    assert "≤ 200/s" in text
    assert ["total", "5.5", "ms", "9.9", "ms", "5.0", "ms", "100"] in [line.split() for line in lines]
    assert "500 MiB of 1000 MiB · one more needs 150 MiB: fits" in text
    assert "6 workers fit; host allows no more" in text
    heads = next(nth for nth, line in enumerate(lines) if line.startswith("slot"))
    assert [line.split()[:2] for line in lines[heads + 1 : heads + 3]] == [["0", "ready"], ["1", "ready"]]


def test_a_service_that_goes_away_is_said_to_and_what_was_known_stays() -> None:
    """With how long it has been silent; so for one that hangs, and looks like answering."""
    watch = watch_of(document(), None)
    assert "nobody has answered for 42 s; trying again" in drawn(watch, now=42.0)[0]
    assert "serving: 2 of 2 ready" in drawn(watch, now=42.0)
    assert "nobody has answered for 9.0 s" in drawn(watch_of(document()), now=9.0)[0]


def test_a_restart_empties_the_window() -> None:
    """Counters begin anew: no rate is made of the two lives."""
    watch = watch_of(document(uptime=100), document(uptime=101), document(uptime=2, arbiter_pid=9))
    assert watch.figures is None
    assert len(watch.window) == 1


def test_the_window_has_ten_seconds() -> None:
    """Older documents are forgotten."""
    watch = watch_of(*(document(uptime=100 + s) | {"totals": totals(s)} for s in range(60)))
    assert watch.figures is not None
    assert 10 <= watch.figures.seconds <= 11
    assert len(watch.history) == 59


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (60, 12), (40, 10), (300, 100)])
@pytest.mark.parametrize("workers", [1, 64])
def test_the_screen_fits_terminals(width: int, height: int, workers: int) -> None:
    """No line is wider than the terminal; few terminals are too low, and then slots give way."""
    rows = [
        slot(n, "failed" if n == 40 else "ready", last_error={"state": "loading", "text": "x" * 300})
        for n in range(workers)
    ]
    first, second = (document(*rows, uptime=100 + s) | {"totals": totals(100 * s)} for s in (0, 1))
    lines = drawn(watch_of(first, second), now=1.0, width=width, height=height)
    assert max(len(line) for line in lines) <= width
    assert len(lines) <= max(height, 22)
    if workers == 64:
        assert any(line.split()[:2] == ["40", "failed"] for line in lines)


def test_slots_in_trouble_are_shown_before_the_others() -> None:
    """In their order; the last line is kept for how many are not shown."""
    rows = [slot(0), slot(1), slot(2, "failed"), slot(3)]
    assert [row["slot"] for row in fit(rows, 4)] == [0, 1, 2, 3]
    assert [row["slot"] for row in fit(rows, 3)] == [0, 2]
    assert [row["slot"] for row in fit(rows, 1)] == [2]


def test_the_graph_ends_with_what_is_now() -> None:
    """Its highest value is named; nothing is drawn of nothing."""
    assert spark([0, 1, 2, 4, 8], 3) == "▂▄█ ≤ 8/s"
    assert spark([0, 0], 10) == ""
