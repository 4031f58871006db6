# SPDX-License-Identifier: Apache-2.0
"""The log: one line a record, as text or JSON, with time, level and slot."""

from __future__ import annotations

import json
import logging
import logging.config
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from service import logging as ours

if TYPE_CHECKING:
    from collections.abc import Iterator

Formatter = type[logging.Formatter]


@pytest.fixture(autouse=True)
def _arbiter_in_tokyo() -> Iterator[None]:
    """Run far from UTC, and give the process back its name and its time zone after a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ours._identity, "slot", "arbiter")
        patch.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


def record(message: str, *args: object, level: int = logging.INFO, **others: Any) -> logging.LogRecord:
    """Return a record of 2026-01-02 03:04:05.678 UTC, written by process 4711."""
    made = logging.LogRecord("warmfleet", level, __file__, 1, message, args, others.get("exc_info"))
    made.created, made.msecs, made.process = 1767323045.678, 678.0, 4711
    ours.SlotFilter().filter(made)
    return made


def raised() -> Any:
    try:
        json.loads("[")
    except ValueError:
        return sys.exc_info()


def test_a_line_of_text_has_time_level_slot_and_message() -> None:
    """Columns that line up, and UTC with milliseconds."""
    ours.set_slot(3)
    lines = [
        ours.TextFormatter().format(record("ready on %s", "GPU-1")),
        ours.TextFormatter().format(record("stopping", level=logging.CRITICAL)),
    ]
    assert lines == [
        "2026-01-02T03:04:05.678Z INFO    s3      ready on GPU-1",
        "2026-01-02T03:04:05.678Z CRITICAL s3      stopping",
    ]


def test_a_line_of_json_has_the_same_and_more() -> None:
    """One object a record, with logger and pid; text as it is, not escaped."""
    ours.set_slot(12)
    line = ours.JsonFormatter().format(record("zu groß: %d", 3, level=logging.WARNING))
    assert "zu groß" in line
    assert json.loads(line) == {
        "time": "2026-01-02T03:04:05.678Z",
        "level": "warning",
        "logger": "warmfleet",
        "slot": "s12",
        "pid": 4711,
        "message": "zu groß: 3",
    }


def test_until_it_has_a_slot_a_process_is_the_arbiter() -> None:
    """The arbiter never gets a slot, so its lines say so."""
    assert " arbiter hello" in ours.TextFormatter().format(record("hello"))


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
    """For people: the line first, then the stack as Python prints it."""
    line, first, *_, last = ours.TextFormatter().format(record("failed", exc_info=raised())).splitlines()
    assert line == "2026-01-02T03:04:05.678Z INFO    arbiter failed"
    assert (first, last.partition(":")[0]) == (
        "Traceback (most recent call last):",
        "json.decoder.JSONDecodeError",
    )


def test_a_record_that_no_filter_has_seen_still_becomes_json() -> None:
    """Records that reach the formatter by another handler carry the slot all the same."""
    bare = logging.LogRecord("other", logging.INFO, __file__, 1, "hello", (), None)
    assert json.loads(ours.JsonFormatter().format(bare))["slot"] == "arbiter"


@pytest.mark.parametrize(
    ("log_format", "formatter"), [("text", ours.TextFormatter), ("json", ours.JsonFormatter)]
)
def test_gunicorn_and_we_log_alike(log_format: str, formatter: Formatter) -> None:
    """One handler on stderr for Gunicorn's messages, everybody's warnings and ours; no access log."""
    names = ("", "gunicorn.error", "gunicorn.access", "warmfleet")
    loggers = [logging.getLogger(name) for name in names]
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    try:
        logging.config.dictConfig(ours.config(log_format, "debug"))
        seen = [
            ([type(handler.formatter) for handler in one.handlers], one.level, one.propagate)
            for one in loggers
        ]
        [handler] = ours.get().handlers
        assert isinstance(handler, logging.StreamHandler)
        assert handler.stream is sys.stderr
        assert [type(one) for one in handler.filters] == [ours.SlotFilter]
    finally:
        for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
            one.handlers[:], one.propagate = handlers, propagate
            one.setLevel(level)
    assert seen == [
        ([formatter], logging.WARNING, True),
        ([formatter], logging.DEBUG, False),
        ([], logging.INFO, False),
        ([formatter], logging.DEBUG, False),
    ]
