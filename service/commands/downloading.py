# SPDX-License-Identifier: Apache-2.0
"""`warmfleet download`: put the model where a later start finds it, and end. Command line."""

from __future__ import annotations

from logging.config import dictConfig
from typing import TYPE_CHECKING

from service import device, download, logging, models, preflight

if TYPE_CHECKING:
    from service.settings import Settings


def fill(settings: Settings) -> str:
    """Fetch the model unless it is here; return a sentence that says where it is.

    Raises:
        WarmfleetError: there is no such model, it cannot be downloaded, or it is of no use.
    """
    if settings.backend == "stub":
        return "backend stub has no model: nothing to download"
    folder = preflight.model_folder(settings)
    if folder is not None:
        return f"model {settings.model_id} is in {folder}: nothing to download"
    dictConfig(logging.config(settings.log_format, settings.log_level))
    device.prepare_environment()  # as before a start: no progress bars in the log, no telemetry
    folder = download.fetch(settings)
    models.check_folder(folder)
    return f"model {settings.model_id} is downloaded to {folder}"
