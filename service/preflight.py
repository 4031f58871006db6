# SPDX-License-Identifier: Apache-2.0
"""All that can be refused before torch is imported: model, devices, ports. Arbiter."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from service import device, gpus, models, security
from service.errors import SettingsError
from service.slots import CPU

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.settings import Settings

PACKAGES = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino",)}
"""What a backend imports beyond torch's stack: to run a graph, and to export it."""
OTLP_PACKAGE = "opentelemetry.proto"


@dataclass(frozen=True)
class Preflight:
    """What the checks found: tokens to pin workers to, and the model's folder if it is here already.

    Attributes:
        gpu_nodes: the NUMA node of each token, where the machine says.
    """

    devices: tuple[str, ...]
    folder: Path | None
    gpu_nodes: Mapping[str, int] = field(default_factory=dict)

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
    security.read_keys(settings)
    _check_packages(settings.backend)
    _check_traces(settings)
    _check_free(settings.bind, settings.ops_bind)
    folder = None
    if settings.backend != "stub":
        check_temporary()
        folder = model_folder(settings)
    addresses: dict[str, str] = {}
    list_gpus = partial(gpus.list_gpus, addresses=addresses)
    devices = device.discover(settings, os.environ, list_gpus=list_gpus)
    found = Preflight(devices, folder, device.numa_nodes(devices, addresses))
    if not found.cuda and settings.dtype in ("float16", "bfloat16"):
        msg = f"no GPU is visible, and dtype {settings.dtype} on CPU is about 100 times slower; use auto"
        raise SettingsError(msg)
    if found.cuda and settings.preload == "weights":
        msg = "preload weights works on CPU only (a fork cannot take CUDA memory along); use imports or auto"
        raise SettingsError(msg)
    if found.cuda and settings.backend in PACKAGES:
        msg = f"backend {settings.backend} computes on the CPU only, but a GPU is visible; set device to cpu"
        raise SettingsError(msg)
    return found


def model_folder(settings: Settings) -> Path | None:
    """Return the model's folder, which holds weights in safetensors; None: it must be downloaded first.

    Raises:
        SettingsError: there is no such model, or it cannot be loaded or downloaded.
    """
    try:
        folder = models.find(settings)
    except RuntimeError:  # pathlib's, of a user who has neither HOME nor an entry in passwd
        raise SettingsError(
            f"model {settings.model_id}: user {os.getuid()} has no home folder for the hub's cache; "
            "set WARMFLEET_HUB_CACHE to a folder that can be written to"
        ) from None
    if folder is not None:
        models.check_folder(folder)
    return folder


def check_temporary() -> None:
    """Refuse a machine without a temporary folder: torch cannot even be imported there."""
    try:
        tempfile.gettempdir()
    except OSError:
        raise SettingsError(
            "no temporary folder can be written to, which torch needs to be imported; "
            "mount one at /tmp, or set TMPDIR to a folder that can be"
        ) from None


def _check_packages(backend: str) -> None:
    """Refuse a backend whose packages are not installed; none is imported."""
    missing = [package for package in PACKAGES.get(backend, ()) if find_spec(package) is None]
    if missing:
        msg = (
            f"backend {backend} needs {' and '.join(missing)}, not installed for {sys.executable}; "
            f"run `pip install 'warmfleet[{backend}]'` there"
        )
        raise SettingsError(msg)


def _check_traces(settings: Settings) -> None:
    """Refuse an endpoint without the package that knows how to talk to it."""
    if settings.otlp_endpoint is None:
        return
    try:
        spec = find_spec(OTLP_PACKAGE)
    except ModuleNotFoundError:  # not even the package that it is part of
        spec = None
    if spec is None:
        msg = (
            f"otlp_endpoint needs {OTLP_PACKAGE}, not installed for {sys.executable}; "
            "run `pip install 'warmfleet[otlp]'` there, or leave WARMFLEET_OTLP_ENDPOINT unset"
        )
        raise SettingsError(msg)


def _check_free(*binds: str) -> None:
    """Gunicorn retries a busy port for five seconds, with a line each time; say it once, at once."""
    if os.environ.get("LISTEN_FDS") or os.environ.get("GUNICORN_FD"):
        return
    with ExitStack() as probes:  # all open at once: two listeners may want the same port
        for bind in binds:
            if bind.startswith("unix:"):
                _check_path(bind)
            else:
                probes.enter_context(_listen(bind))


def _listen(bind: str) -> socket.socket:
    """Listen; with no more than a bind, Linux would give the port to the next probe too."""
    host, _, port = bind.rpartition(":")
    if ":" in host.strip("[]") and not (host.startswith("[") and host.endswith("]")):
        msg = f"cannot listen on {bind}: an IPv6 address needs brackets; write [{host.strip('[]')}]:{port}"
        raise SettingsError(msg)
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, proto, _, address = found[0]
        with ExitStack() as failed:
            probe = failed.enter_context(socket.socket(family, kind, proto))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
            failed.pop_all()
    except OSError as error:
        msg = f"cannot listen on {bind}: {error.strerror}; stop what uses it or choose another address"
        raise SettingsError(msg) from None
    return probe


def _check_path(bind: str) -> None:
    """Gunicorn makes the socket, and replaces one that is left over; it makes no folder."""
    path = Path(bind.removeprefix("unix:").removeprefix("//"))
    if not path.parent.is_dir():
        msg = f"cannot listen on {bind}: the folder {path.parent} does not exist; make it first"
        raise SettingsError(msg)
    if path.exists() and not path.is_socket():
        msg = f"cannot listen on {bind}: {path} exists and is no socket; choose another path"
        raise SettingsError(msg)
