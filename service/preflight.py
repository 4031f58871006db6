# SPDX-License-Identifier: Apache-2.0
"""All that can be refused before torch is imported: model, devices, ports. Arbiter."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from service import device, models
from service.errors import SettingsError
from service.slots import CPU

if TYPE_CHECKING:
    from pathlib import Path

    from service.settings import Settings


@dataclass(frozen=True)
class Preflight:
    """What the checks found: tokens to pin workers to, and the model's folder if it is here already."""

    devices: tuple[str, ...]
    folder: Path | None

    @property
    def cuda(self) -> bool:
        """Whether workers are pinned to GPUs."""
        return self.devices != (CPU,)


@cache
def check(settings: Settings) -> Preflight:
    """Look at everything the settings point to.

    Raises:
        SettingsError: the first thing that cannot work, in one sentence.
    """
    for bind in (settings.bind, settings.ops_bind):
        _check_free(bind)
    folder = None
    if settings.backend != "stub":
        folder = models.find(settings)
        if folder is not None:
            models.check_folder(folder)
    devices = device.discover(settings, os.environ)
    found = Preflight(devices, folder)
    if not found.cuda and settings.dtype in ("float16", "bfloat16"):
        msg = f"no GPU is visible, and dtype {settings.dtype} on CPU is about 100 times slower; use auto"
        raise SettingsError(msg)
    if found.cuda and settings.preload == "weights":
        msg = "preload weights works on CPU only (a fork cannot take CUDA memory along); use imports or auto"
        raise SettingsError(msg)
    return found


def _check_free(bind: str) -> None:
    """Gunicorn retries a busy port for five seconds, with a line each time; say it once, at once."""
    if bind.startswith("unix:") or os.environ.get("LISTEN_FDS") or os.environ.get("GUNICORN_FD"):
        return
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        msg = f"cannot listen on {bind}: {error.strerror}; stop what uses it or choose another address"
        raise SettingsError(msg) from None
