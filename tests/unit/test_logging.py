# SPDX-License-Identifier: Apache-2.0
"""The log: one line a record, as text or JSON, with time, level, slot, state and the ids of a request."""

from __future__ import annotations

import asyncio
import json
import logging
import logging.config
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from service import logging as ours
from service.trail import Trail, followed

if TYPE_CHECKING:
    from collections.abc import Iterator

Formatter = type[logging.Formatter]


@pytest.fixture(autouse=True)
def _arbiter_in_tokyo() -> Iterator[None]:
    """Run far from UTC, and give the process back its name, its request and its time zone after a test."""
    with pytest.MonkeyPatch.context() as patch, followed(None):
        patch.setattr(ours, "_self", ours._Identity(4711, "arbiter", lambda: ours._arbiter["state"]))
        patch.setattr(ours, "_fork", [])
        patch.setitem(ours._arbiter, "state", "importing")
        patch.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


def record(message: str, *args: Any, level: int = logging.INFO, **others: Any) -> logging.LogRecord:
    """Return a record of 2026-01-02 03:04:05.678 UTC, written by process 4711; `others` are attributes."""
    made = logging.LogRecord("warmfleet", level, __file__, 1, message, args, others.pop("exc_info", None))
    made.created, made.msecs, made.process = 1767323045.678, 678.0, 4711
    vars(made).update(others)
    ours.SlotFilter().filter(made)
    return made


def raised() -> Any:
    try:
        json.loads("[")
    except ValueError:
        return sys.exc_info()


def test_a_line_of_text_has_time_level_slot_and_message() -> None:
    """Columns that line up, and UTC with milliseconds; `-` where no request is meant."""
    ours.set_slot(3, lambda: "ready")
    lines = [
        ours.TextFormatter().format(record("ready on %s", "GPU-1")),
        ours.TextFormatter().format(record("stopping", level=logging.CRITICAL)),
    ]
    assert lines == [
        "2026-01-02T03:04:05.678Z INFO    s3      ready     - - ready on GPU-1",
        "2026-01-02T03:04:05.678Z CRITICAL s3      ready     - - stopping",
    ]


def test_a_line_of_json_has_the_same_and_more() -> None:
    """One object a record, with logger and pid; text as it is, not escaped."""
    ours.set_slot(12, lambda: "warming")
    line = ours.JsonFormatter().format(record("zu groß: %d", 3, level=logging.WARNING))
    assert "zu groß" in line
    assert json.loads(line) == {
        "time": "2026-01-02T03:04:05.678Z",
        "level": "warning",
        "logger": "warmfleet",
        "slot": "s12",
        "state": "warming",
        "pid": 4711,
        "message": "zu groß: 3",
    }


def test_until_it_has_a_slot_a_process_is_the_arbiter() -> None:
    """The arbiter never gets a slot, so its lines say so, and what it does."""
    lines = []
    for state in ("importing", "running", "stopping"):
        ours.enter(state)
        lines.append(ours.TextFormatter().format(record("hello")).partition("Z ")[2])
    assert lines == [
        "INFO    arbiter importing - - hello",
        "INFO    arbiter running   - - hello",
        "INFO    arbiter stopping  - - hello",
    ]


def test_a_fork_is_its_slot_before_it_says_so() -> None:
    """What Gunicorn logs in a fresh fork is the slot's; what the arbiter logs meanwhile is its own."""
    ours.expect(5, lambda: "spawned")
    mine = record("of the arbiter")
    theirs = logging.LogRecord("gunicorn.error", logging.INFO, __file__, 1, "Booting", (), None)
    theirs.process = 4712
    ours.SlotFilter().filter(theirs)
    found = [(vars(one)["slot"], vars(one)["state"]) for one in (mine, theirs)]
    assert found == [("arbiter", "importing"), ("s5", "spawned")]
    ours.expect(-1, lambda: "nowhere")
    assert ours._fork == []


def test_the_state_is_that_of_the_moment() -> None:
    """A worker's state is asked at each record."""
    states = iter(["loading", "warming"])
    ours.set_slot(0, lambda: next(states))
    assert [vars(record("hello"))["state"] for _ in range(2)] == ["loading", "warming"]


def test_records_of_a_request_have_its_ids() -> None:
    """In both formats, also in a thread that the request waits for, and not after it."""
    formats = ours.TextFormatter(), ours.JsonFormatter()

    async def lines() -> list[str]:
        return [one.format(record("hello")) for one in formats] + await asyncio.to_thread(
            lambda: [one.format(record("hello")) for one in formats]
        )

    with followed(Trail("request-1", "4bf92f3577b34da6a3ce929d0e0e4736")):
        text, line, text_of_thread, line_of_thread = asyncio.run(lines())
    assert text == text_of_thread
    assert line == line_of_thread
    assert text.endswith(" request-1 4bf92f3577b34da6a3ce929d0e0e4736 hello")
    fields = json.loads(line)
    assert (fields["request_id"], fields["trace_id"]) == ("request-1", "4bf92f3577b34da6a3ce929d0e0e4736")
    assert "request_id" not in json.loads(formats[1].format(record("hello")))


def test_a_request_that_nobody_traces_has_no_trace_id() -> None:
    """`-` in text, no such field in JSON."""
    with followed(Trail("request-1")):
        made = record("hello")
    assert ours.TextFormatter().format(made).endswith(" request-1 - hello")
    assert "trace_id" not in json.loads(ours.JsonFormatter().format(made))


def test_json_stays_one_line_with_a_traceback_in_it() -> None:
    """A traceback, and a message of several lines, are escaped into their fields."""
    line = ours.JsonFormatter().format(record("failed:\n%s", "why", level=logging.ERROR, exc_info=raised()))
    fields = json.loads(line)
    assert "\n" not in line
    assert fields["message"] == "failed:\nwhy"
    first, *_, last = fields["exception"].splitlines()
    assert (first, last.partition(":")[0]) == (
        "Traceback (most recent call last):",
        "json.decoder.JSONDecodeError",
    )


def test_text_shows_a_traceback_below_its_line() -> None:
    """For people: the line first, then the stack as Python prints it, indented."""
    line, first, *_, last = ours.TextFormatter().format(record("failed", exc_info=raised())).splitlines()
    assert line == "2026-01-02T03:04:05.678Z INFO    arbiter importing - - failed"
    assert (first, last.partition(":")[0]) == (
        "    Traceback (most recent call last):",
        "    json.decoder.JSONDecodeError",
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_no_text_can_look_like_a_record(end: str) -> None:
    """Whatever ends a line for some reader, what follows is indented, or escaped in JSON."""
    forged = record("of a client: a%s2026-01-02T03:04:05.678Z INFO    s0 ready - - all is well", end)
    text, line = ours.TextFormatter().format(forged), ours.JsonFormatter().format(forged)
    assert [one[:4] for one in text.splitlines()[1:]] == ["    "]
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == forged.getMessage()


def test_a_record_that_no_filter_has_seen_still_becomes_json() -> None:
    """Records that reach the formatter by another handler carry the slot all the same."""
    bare = logging.LogRecord("other", logging.INFO, __file__, 1, "hello", (), None)
    bare.process = 4711
    assert json.loads(ours.JsonFormatter().format(bare))["slot"] == "arbiter"
    bare = logging.LogRecord("other", logging.INFO, __file__, 1, "hello", (), None)
    bare.process = 4711
    assert " arbiter importing - - hello" in ours.TextFormatter().format(bare)


# What others give


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError


def circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3, 3),
        ({"a": [1, None]}, {"a": [1, None]}),
        (float("nan"), None),
        (Path("/srv/a"), "/srv/a"),
        (ValueError("why"), "why"),
        ({1: 2}, "{1: 2}"),
        (b"raw", "b'raw'"),
        ("\ud800", "\\ud800"),
        (1 << 70, str(1 << 70)),
        (circle(), "[[...]]"),
        (Unshowable(), "<Unshowable, which cannot be shown: RuntimeError>"),
    ],
    ids=[
        "int",
        "nested",
        "nan",
        "path",
        "error",
        "keys",
        "bytes",
        "surrogate",
        "huge",
        "circle",
        "unshowable",
    ],
)
def test_whatever_is_given_with_a_record_becomes_json(value: Any, shown: Any) -> None:
    """`extra` has fields of its own; what JSON cannot hold is there as text, and the rest stays whole."""
    fields = json.loads(ours.JsonFormatter().format(record("hello", batch=value, other=1)))
    assert (fields["batch"], fields["other"], fields["message"]) == (shown, 1, "hello")


def test_what_is_given_takes_nobodys_place() -> None:
    """A field of ours cannot be overwritten; uvicorn's message with colours is left out."""
    made = record("hello", level=logging.INFO, pid=1, color_message="\x1b[1mhello", time=0)
    fields = json.loads(ours.JsonFormatter().format(made))
    assert (fields["pid"], fields["time"][:4]) == (4711, "2026")
    assert "color_message" not in fields


def test_the_mapping_of_a_message_has_fields_too() -> None:
    """One call says it in words and as data."""
    made = record("%(method)s %(path)s", {"method": "GET", "path": "/ready"})
    fields = json.loads(ours.JsonFormatter().format(made))
    assert [fields[name] for name in ("message", "method", "path")] == ["GET /ready", "GET", "/ready"]


@pytest.mark.parametrize("formatter", [ours.TextFormatter, ours.JsonFormatter])
def test_a_message_that_does_not_fit_its_arguments_is_still_a_record(formatter: Formatter) -> None:
    """Logging itself would print a traceback to stderr, in no format, and drop the message."""
    line = formatter().format(record("%d texts, 100%", "many"))
    assert "%d texts, 100% ('many',)" in line


def test_libraries_that_write_by_themselves_write_through_us() -> None:
    """Handlers to the console of other libraries go, handlers to files stay; so do uvicorn's and ours."""
    with scratch_loggers("somelib", "somelib.part", "uvicorn.error", "warmfleet.x") as loggers:
        part = loggers[1]
        for one in loggers:
            one.addHandler(logging.StreamHandler(sys.stderr))
            one.propagate = False
        part.addHandler(logging.NullHandler())
        ours.gather()
        logging.captureWarnings(capture=False)
        found = [([type(h) for h in one.handlers], one.propagate) for one in loggers]
    console = [logging.StreamHandler]
    assert found == [([], True), ([logging.NullHandler], True), (console, False), (console, False)]


@contextmanager
def scratch_loggers(*names: str) -> Iterator[list[logging.Logger]]:
    """Lend loggers, and give them back as they were."""
    loggers = [logging.getLogger(name) for name in names]
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    try:
        yield loggers
    finally:
        for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
            one.handlers[:], one.propagate = handlers, propagate
            one.setLevel(level)


@pytest.mark.parametrize(
    ("log_format", "formatter"), [("text", ours.TextFormatter), ("json", ours.JsonFormatter)]
)
def test_gunicorn_and_we_log_alike(log_format: str, formatter: Formatter) -> None:
    """One handler on stderr for Gunicorn's messages, all warnings and ours; Gunicorn's access log is off."""
    names = ("", "gunicorn.error", "gunicorn.access", "warmfleet", "warmfleet.access")
    with scratch_loggers(*names) as loggers:
        logging.config.dictConfig(ours.config(log_format, "debug"))
        seen = [
            ([type(handler.formatter) for handler in one.handlers], one.level, one.propagate)
            for one in loggers
        ]
        [handler] = ours.get().handlers
        assert isinstance(handler, logging.StreamHandler)
        assert handler.stream is sys.stderr
        assert [type(one) for one in handler.filters] == [ours.SlotFilter]
    assert seen == [
        ([formatter], logging.WARNING, True),
        ([formatter], logging.DEBUG, False),
        ([], logging.INFO, False),
        ([formatter], logging.DEBUG, False),
        ([formatter], logging.INFO, False),
    ]


@pytest.mark.parametrize("level", ["debug", "error"])
def test_the_level_does_not_take_the_access_log_away(level: str) -> None:
    """It has a setting of its own."""
    handlers = ours.config("text", level)["handlers"]
    assert (handlers["stderr"]["level"], "level" in handlers["access"]) == (level.upper(), False)
