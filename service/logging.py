# SPDX-License-Identifier: Apache-2.0
"""One log format for Gunicorn, uvicorn and us: text or JSON, the slot on every record. Both processes."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

_identity = {"slot": "arbiter"}

LEVEL = logging.getLevelNamesMapping().__getitem__
TEXT = "%(asctime)s %(levelname)-7s %(slot)-7s %(message)s"


def set_slot(slot: int) -> None:
    """Worker: mark all further records of this process."""
    _identity["slot"] = f"s{slot}"


class SlotFilter(logging.Filter):
    """Puts the slot (`s0`, or `arbiter`) on each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record."""
        record.slot = _identity["slot"]
        return True


class TextFormatter(logging.Formatter):
    """`time LEVEL slot message`, times in UTC."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        """Use the one text layout."""
        super().__init__(TEXT)


class JsonFormatter(TextFormatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON; the traceback, if any, is the field `exception`."""
        fields: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "slot": getattr(record, "slot", _identity["slot"]),
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def config(log_format: str, level: str) -> dict[str, Any]:
    """Return the dictionary for `logging.config.dictConfig` (Gunicorn's `logconfig_dict`)."""
    # The level is the handler's: service.exits reads warnings off Gunicorn's logger at any level.
    handlers = {"handlers": ["stderr"], "level": min("INFO", level.upper(), key=LEVEL), "propagate": False}
    formatter = JsonFormatter if log_format == "json" else TextFormatter
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"slot": {"()": SlotFilter}},
        "formatters": {"line": {"()": formatter}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "level": level.upper(),
                "stream": "ext://sys.stderr",
                "formatter": "line",
                "filters": ["slot"],
            }
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "gunicorn.error": dict(handlers),
            "gunicorn.access": {"handlers": [], "level": "INFO", "propagate": False},
            "warmfleet": dict(handlers),
        },
    }


def get() -> logging.Logger:
    """Return the project's logger."""
    return logging.getLogger("warmfleet")
