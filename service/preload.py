# SPDX-License-Identifier: Apache-2.0
"""What the arbiter imports and loads once, for all workers to share. Arbiter, before the first fork.

Only imports and, on CPU, a load: a forward pass, a tokenizer call or a multi-threaded operation
here would leave CUDA or a lock in a state that no fork survives (docs/decisions/0002).
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING

from service import backends, device, models, preflight
from service.app import create_app
from service.errors import WarmfleetError
from service.logging import get
from service.settings import load

if TYPE_CHECKING:
    from fastapi import FastAPI

LOG = get()


def application() -> FastAPI:
    """Return the app with its backend imported and, on CPU, its weights loaded."""
    began = time.monotonic()
    settings = load()
    found = preflight.check(settings)
    device.prepare_environment()
    app = create_app(settings)
    folder = found.folder
    problem = ""
    if folder is None and settings.backend != "stub":
        try:
            folder = models.download(settings, settings.download_timeout)
        except WarmfleetError as error:
            problem = str(error)
    cuda = found.devices != (device.CPU,)
    backend = backends.create(settings, folder, cuda=cuda)
    imported = time.monotonic()
    if backend.preloadable and not cuda and settings.preload != "imports" and not problem:
        try:
            backend.load()
        except WarmfleetError as error:
            problem = str(error)
    if problem:  # the workers will fail alike, and /ready will say so
        LOG.error("the arbiter could not load the model: %s", problem)
    app.state.backend, app.state.folder = backend, folder
    app.state.import_seconds = imported - began
    app.state.preload_seconds = time.monotonic() - imported
    gc.collect()
    gc.freeze()  # the collector would write to every shared page
    return app
