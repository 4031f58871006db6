# SPDX-License-Identifier: Apache-2.0
"""One log format for all that write here: text or JSON, with slot, state and ids. Both processes."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from service.trail import TRAIL

if TYPE_CHECKING:
    from collections.abc import Callable

LEVEL = logging.getLevelNamesMapping().__getitem__
TEXT = "%(asctime)s %(levelname)-7s %(slot)-7s %(state)-9s %(request_id)s %(trace_id)s %(message)s"
INDENT = "\n    "
"""Before all lines of a record but its first: no text in it can look like a record."""
UNKNOWN: Final = "-"
OURS: Final = frozenset({"slot", "state", "request_id", "trace_id"})
USUAL: Final = (
    frozenset(vars(logging.makeLogRecord({}))) | OURS | {"message", "asctime", "taskName", "color_message"}
)
"""Attributes that are no fields of a record's own; the last is uvicorn's, the message with colours."""
LINE_BREAKS: Final = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
"""Unescaped in JSON, and yet the end of a line to some readers."""


@dataclass
class _Identity:
    """Who writes records: a worker, or the arbiter, whose fork is nobody until it has taken its slot."""

    pid: int
    slot: str
    state: Callable[[], str]


_arbiter = {"state": "importing"}
_self = _Identity(os.getpid(), "arbiter", lambda: _arbiter["state"])
_fork: list[_Identity] = []


def enter(state: str) -> None:
    """Arbiter: mark all further records with `importing`, `running` or `stopping`."""
    _arbiter["state"] = state


def expect(slot: int, state: Callable[[], str]) -> None:
    """Arbiter, before a fork: what the fork logs before it calls `set_slot` is already the slot's."""
    _fork[:] = [_Identity(0, f"s{slot}", state)] if slot >= 0 else []


def set_slot(slot: int, state: Callable[[], str] = lambda: UNKNOWN) -> None:
    """Worker: mark all further records of this process; `state` is asked at each."""
    _self.pid, _self.slot, _self.state = os.getpid(), f"s{slot}", state
    _fork.clear()


class SlotFilter(logging.Filter):
    """Puts slot (`s0`, or `arbiter`), state, request id and trace id on each record; `-` for none."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record."""
        who = _fork[0] if _fork and record.process != _self.pid else _self
        trail = TRAIL.get()
        record.slot, record.state = who.slot, who.state()
        record.request_id = trail.request_id if trail else UNKNOWN
        record.trace_id = (trail and trail.trace_id) or UNKNOWN
        return True


class TextFormatter(logging.Formatter):
    """`time LEVEL slot state request trace message`, times in UTC; further lines of a record are indented."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        """Use the one text layout."""
        super().__init__(TEXT)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        _complete(record)
        return INDENT.join(super().format(record).splitlines())


class JsonFormatter(TextFormatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON.

        The traceback, if any, is the field `exception`. What was given by `extra`, or as a mapping for the
        message, has fields too. What cannot be JSON is there as text.
        """
        _complete(record)
        fields: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "slot": vars(record)["slot"],
            "state": vars(record)["state"],
            "pid": record.process,
        }
        ids = {name: vars(record)[name] for name in ("request_id", "trace_id")}
        fields |= {name: value for name, value in ids.items() if value != UNKNOWN}
        fields["message"] = record.message
        given = dict(record.args) if isinstance(record.args, dict) else {}
        given |= {name: value for name, value in vars(record).items() if name not in USUAL}
        for name, value in given.items():
            fields.setdefault(str(name), value)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            fields["exception"] = record.exc_text
        if record.stack_info:
            fields["stack"] = record.stack_info
        return _json(fields).translate(LINE_BREAKS)


def _complete(record: logging.LogRecord) -> None:
    """Mark a record that came by another handler; show one, too, whose message cannot be made."""
    if not hasattr(record, "trace_id"):
        SlotFilter().filter(record)
    try:
        record.message = record.getMessage()
    except Exception:  # noqa: BLE001 - logging would print a traceback of its own, in no format
        record.msg, record.args = f"{record.msg} {_text(record.args)}", ()
        record.message = str(record.msg)


def _json(fields: dict[str, Any]) -> str:
    """Write fields as JSON; those that cannot be, one by one as text."""
    try:
        return orjson.dumps(fields, default=_text).decode()
    except (TypeError, ValueError, RecursionError):  # lone surrogates, circles
        safe = {_utf8(name): _jsonable(value) for name, value in fields.items()}
        return orjson.dumps(safe).decode()


def _jsonable(value: Any) -> Any:  # noqa: ANN401 - whatever was logged
    try:
        orjson.dumps(value, default=_text)
    except (TypeError, ValueError, RecursionError):
        return _utf8(value if isinstance(value, str) else _text(value))
    return value


def _text(value: object) -> str:
    """Return a value as text, whatever its own code does."""
    try:
        return str(value) if isinstance(value, (BaseException, os.PathLike)) else repr(value)
    except Exception as error:  # noqa: BLE001 - somebody's __repr__
        return f"<{type(value).__name__}, which cannot be shown: {type(error).__name__}>"


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def config(log_format: str, level: str) -> dict[str, Any]:
    """Return the dictionary for `logging.config.dictConfig` (Gunicorn's `logconfig_dict`)."""
    # The level is the handler's: service.exits reads warnings off Gunicorn's logger at any level.
    handlers = {"handlers": ["stderr"], "level": min("INFO", level.upper(), key=LEVEL), "propagate": False}
    formatter = JsonFormatter if log_format == "json" else TextFormatter
    stderr = {
        "class": "logging.StreamHandler",
        "stream": "ext://sys.stderr",
        "formatter": "line",
        "filters": ["slot"],
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"slot": {"()": SlotFilter}},
        "formatters": {"line": {"()": formatter}},
        # `access` has a setting of its own: a log_level of `warning` does not take it away.
        "handlers": {"stderr": stderr | {"level": level.upper()}, "access": dict(stderr)},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "gunicorn.error": dict(handlers),
            "gunicorn.access": {"handlers": [], "level": "INFO", "propagate": False},
            "warmfleet": dict(handlers),
            "warmfleet.access": {"handlers": ["access"], "level": "INFO", "propagate": False},
        },
    }


def gather() -> None:
    """Let Python's warnings, and libraries that brought handlers of their own to stderr, write in our format.

    Call it again after imports; what was gathered before stays so.
    """
    logging.captureWarnings(capture=True)
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if not isinstance(logger, logging.Logger) or name.startswith(("gunicorn.", "warmfleet", "uvicorn.")):
            continue
        own = [handler for handler in logger.handlers if _is_console(handler)]
        for handler in own:
            logger.removeHandler(handler)
        if own:
            logger.propagate = True


def _is_console(handler: logging.Handler) -> bool:
    return type(handler) is logging.StreamHandler and handler.stream in (
        sys.stderr,
        sys.stdout,
        sys.__stderr__,
    )


def get() -> logging.Logger:
    """Return the project's logger."""
    return logging.getLogger("warmfleet")
