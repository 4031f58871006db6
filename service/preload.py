# SPDX-License-Identifier: Apache-2.0
"""What the arbiter imports and loads once, for all workers to share. Arbiter, before the first fork.

Only imports and, on CPU, a load: a forward pass, a tokenizer call or a multi-threaded operation
here would leave CUDA or a lock in a state that no fork survives (docs/decisions/0002).
"""

from __future__ import annotations

import faulthandler
import gc
import time
from typing import TYPE_CHECKING

from service import backends, device, download, models, otlp, preflight
from service.app import create_app
from service.errors import WarmfleetError
from service.logging import gather, get
from service.settings import load

if TYPE_CHECKING:
    from pathlib import Path

    from fastapi import FastAPI

    from service.settings import Settings

LOG = get()


def application() -> FastAPI:
    """Return the app with its backend imported and, on CPU, its weights loaded."""
    settings = load()
    found = preflight.check(settings)
    device.prepare_environment()
    app = create_app(settings)
    folder, problem = found.folder, ""
    if folder is None and settings.backend != "stub":
        folder, problem = _download(settings)
    faulthandler.dump_traceback_later(
        settings.load_timeout, exit=True
    )  # a hang here has nobody else to see it
    gc.disable()  # an import leaves little garbage: without collections it takes a sixth less time
    began = time.monotonic()
    backend = backends.create(settings, folder, cuda=found.cuda)
    if settings.otlp_endpoint:
        otlp.load()
    imported = time.monotonic()
    if backend.preloadable and not found.cuda and settings.preload != "imports" and folder is not None:
        try:
            backend.load()
        except WarmfleetError as error:  # the workers will fail alike, and tell on /ready
            LOG.error("the arbiter could not load the model: %s", error)  # noqa: TRY400 - a sentence will do
    faulthandler.cancel_dump_traceback_later()
    gather()
    app.state.backend, app.state.problem, app.state.folder = backend, problem, folder
    app.state.import_seconds = imported - began
    app.state.preload_seconds = time.monotonic() - imported
    gc.collect()
    gc.freeze()  # the collector would write to every shared page
    gc.enable()
    return app


def _download(settings: Settings) -> tuple[Path | None, str]:
    """Return the model's folder, or None and the reason, which the workers will tell on /ready."""
    try:
        folder = download.fetch(settings)
        models.check_folder(folder)
    except WarmfleetError as error:
        LOG.error("the model could not be downloaded: %s", error)  # noqa: TRY400 - a sentence will do
        return None, str(error)
    return folder, ""
