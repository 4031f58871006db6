# SPDX-License-Identifier: Apache-2.0
"""Which GPU a slot gets, how a worker is tied to it, and the guard that forks are safe. Both processes.

Theory of operation. A device is an opaque token: what CUDA_VISIBLE_DEVICES takes (`1`, `GPU-…`, `MIG-…`),
or `cpu`. The driver reads the variable once, at cuInit, and drops what it does not understand without a
word; so the arbiter checks the tokens first, the worker sets the variable before anything else, and
everything after that is `cuda:0`. The arbiter itself loads neither NVML nor CUDA: a child asks them.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from service import logging
from service.errors import ForkUnsafeError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping, Sequence

    from service.settings import Settings

CPU: Final = "cpu"
VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
HIDING: Final = frozenset({"-1", "NoDevFiles"})
DEVICES: Final = "WARMFLEET_DEVICES"

ALWAYS: Final = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # else torch.cuda.is_available() calls cuInit
    "TRITON_NVML_BASED_CUDA_CHECK": "1",  # Triton's check of its own, from 3.8
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # a progress bar leaves its monitor thread behind
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
UNLESS_SET: Final = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # torch takes NVML's index for CUDA's
    "OPENBLAS_NUM_THREADS": "1",  # numpy and scipy start their BLAS threads at import
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its thread pool does not survive a fork
}

DRIVER_SAYS: Final = ("the driver lists none", "no NVIDIA driver answers")
WITHOUT_GPU: Final = f"give the service a GPU, or set WARMFLEET_DEVICE=cpu and leave {DEVICES} unset"

CUDA_NOT_INITIALIZED: Final = 3
CUDA_NO_DEVICE: Final = 100
CUDA_SUSPECTS: Final = (
    "a forward or backward pass even on CPU, a torch.cuda call, torch.compile, "
    f"{VISIBLE}=MIG-… with a device count, or a library that calls cuInit"
)
CHILD: Final = "import sys; sys.path.insert(0, sys.argv[1]); import service.device as d; d.print_gpus()"


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Arbiter: set what torch, BLAS and the hub read when they are imported, so that forks stay safe."""
    environ.update(ALWAYS)
    for name, value in UNLESS_SET.items():
        environ.setdefault(name, value)


def list_gpus(timeout_s: float = 20.0) -> list[str] | None:
    """Arbiter: return the UUID of each GPU, or of each MIG instance of it; None if no driver answers.

    A child asks, because NVML does not survive a fork and cuInit spoils every later one. Its answer
    is its output, never its exit status, which another waitpid may have taken.
    """
    command = [sys.executable, "-c", CHILD, str(Path(__file__).resolve().parents[1])]
    environ = {name: value for name, value in os.environ.items() if name != VISIBLE}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True}
    try:
        child = subprocess.run(command, env=environ, timeout=timeout_s, check=False, **pipes)  # noqa: S603
    except subprocess.TimeoutExpired:
        logging.get().warning("no GPU list: the NVIDIA driver did not answer within %g s", timeout_s)
        return None
    try:
        listed: list[str] | None = json.loads(child.stdout)
    except ValueError:
        reason = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        logging.get().warning("no GPU list: the child that asks the driver failed: %s", reason)
        return None
    return listed


def discover(
    settings: Settings,
    environ: Mapping[str, str] = os.environ,
    *,
    list_gpus: Callable[[], list[str] | None] = list_gpus,
) -> tuple[str, ...]:
    """Arbiter: return the tokens that slots are pinned to, or `(CPU,)`.

    Raises:
        SettingsError: CUDA_VISIBLE_DEVICES or `devices` names what the driver does not have, or GPUs
            are asked for and none is visible.
    """
    if settings.device == "cpu":
        return (CPU,)
    value = environ.get(VISIBLE)
    named = None if value is None else visible_tokens(value)
    listed = [] if named == () else list_gpus()
    tokens = tuple(listed or ()) if named is None else usable(named, listed, insist=settings.device == "cuda")
    if tokens and settings.devices:
        return chosen(settings.devices, tokens) if named is None else among(settings.devices, tokens)
    if not tokens and (settings.device == "cuda" or settings.devices):
        why = f"{VISIBLE}={value!r} hides them all" if named == () else DRIVER_SAYS[listed is None]
        asked = f"devices are {','.join(settings.devices)}" if settings.devices else "device is cuda"
        raise SettingsError(f"{asked} but no CUDA device is visible: {why}; {WITHOUT_GPU}")
    return tokens or (CPU,)


def visible_tokens(value: str) -> tuple[str, ...]:
    """Split CUDA_VISIBLE_DEVICES; as in the driver, `-1` and `NoDevFiles` hide themselves and the rest."""
    parts = [part.strip() for part in value.rstrip(", ").split(",")] if value.strip(", ") else []
    return tuple(itertools.takewhile(lambda part: part not in HIDING, parts))


def usable(tokens: tuple[str, ...], listed: Sequence[str] | None, *, insist: bool) -> tuple[str, ...]:
    """Return the tokens of CUDA_VISIBLE_DEVICES, checked; none if no driver is there to honour them.

    Whoever insists on `cuda` gets unchecked tokens from a driver that does not answer (it may be slow).
    """
    if listed:
        refuse_twice(VISIBLE, tokens, [identity(token, listed) for token in tokens])
        return tokens
    if listed is None and insist:
        refuse_twice(VISIBLE, tokens, tokens)
        return tokens
    return ()


def identity(token: str, listed: Sequence[str]) -> str:
    """Return the UUID behind a token of CUDA_VISIBLE_DEVICES, or the token where the list cannot tell."""
    # Where MIG is on, the list lacks the GPU around the instances and their older names.
    mig = any(uuid.startswith("MIG-") for uuid in listed)
    trusted = token.startswith("MIG-") or (mig and token.startswith("GPU-"))
    return token if trusted else resolve(VISIBLE, token, listed)


def chosen(devices: Sequence[str], listed: Sequence[str]) -> tuple[str, ...]:
    """Return the UUIDs that the indices and UUIDs in `devices` mean."""
    uuids = tuple(resolve(DEVICES, device, listed) for device in devices)
    refuse_twice(DEVICES, devices, uuids)
    return uuids


def among(devices: Sequence[str], tokens: Sequence[str]) -> tuple[str, ...]:
    """Return `devices`, each of which must be a token of CUDA_VISIBLE_DEVICES."""
    for device in devices:
        if device not in tokens:
            raise SettingsError(
                f"{DEVICES} names {device!r}, but {VISIBLE} is {','.join(tokens)}; "
                "choose from there, written as there"
            )
    refuse_twice(DEVICES, devices, devices)
    return tuple(devices)


def resolve(name: str, token: str, listed: Sequence[str]) -> str:
    """Return the one UUID that an index, or a UUID that may be abbreviated, means."""
    if token.isdecimal():
        if int(token) < len(listed):
            return listed[int(token)]
        raise SettingsError(
            f"{name} names GPU {token}, but the driver lists {len(listed)}; "
            f"use indices from 0 to {len(listed) - 1}"
        )
    prefixed = token.startswith(("GPU-", "MIG-"))
    fits = [uuid for uuid in listed if prefixed and uuid.startswith(token)]
    if len(fits) == 1:
        return fits[0]
    raise SettingsError(
        f"{name} names {token!r}, which fits {len(fits)} of the driver's GPUs ({', '.join(listed)}); "
        "write an index, or enough of a UUID to tell them apart"
    )


def refuse_twice(name: str, tokens: Sequence[str], identities: Sequence[str]) -> None:
    """Refuse a list with a GPU in it twice: the driver ignores such a list as a whole."""
    if len(set(identities)) < len(identities):
        raise SettingsError(
            f"{name}={','.join(tokens)} names a GPU twice; name it once (slots share it by themselves)"
        )


def print_gpus() -> None:
    """Child of the arbiter: write as JSON what NVML lists, else what CUDA lists, else null."""
    listed = ask_nvml()
    json.dump(ask_cuda() if listed is None else listed, sys.stdout)


def ask_nvml() -> list[str] | None:
    """Child of the arbiter: return UUIDs by NVML, or None if it does not work here."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [pynvml.nvmlDeviceGetUUID(part) for gpu in gpus for part in parts(pynvml, gpu)]
    except pynvml.NVMLError:
        return None


def parts(pynvml: Any, gpu: Any) -> list[Any]:  # noqa: ANN401 - pynvml has no types
    """Child of the arbiter: return the MIG instances of a GPU in MIG mode, else the GPU."""
    try:
        mig, _pending = pynvml.nvmlDeviceGetMigMode(gpu)
    except pynvml.NVMLError:  # not supported: most GPUs
        mig = False
    if not mig:
        return [gpu]
    instances = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        with contextlib.suppress(pynvml.NVMLError):  # free places are numbered too
            instances.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
    return instances


def ask_cuda() -> list[str] | None:
    """Child of the arbiter: return UUIDs by CUDA itself (no NVML: WSL, some vGPUs), or None without CUDA."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int()
    status = driver.cuInit(0)
    if status == CUDA_NO_DEVICE:
        return []
    if status or driver.cuDeviceGetCount(ctypes.byref(count)):
        return None
    uuids = [cuda_uuid(driver, ordinal) for ordinal in range(count.value)]
    return None if None in uuids else [uuid for uuid in uuids if uuid]


def cuda_uuid(driver: ctypes.CDLL, ordinal: int) -> str | None:
    """Child of the arbiter: return the UUID of a device as CUDA_VISIBLE_DEVICES takes it."""
    device, name, raw = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
    if (
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetUuid_v2(raw, device)
    ):
        return None
    kind = "MIG" if b" MIG " in name.value else "GPU"  # the bytes do not say which of the two
    return f"{kind}-{UUID(bytes=raw.raw)}"


def pin(token: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Worker: see this one device as `cuda:0`, or none on CPU. Before anything can call cuInit."""
    environ[VISIBLE] = "" if token == CPU else token


def cuda_initialised(maps: str = "/proc/self/maps") -> bool | None:
    """Return whether cuInit was called in this process; None if it has no CUDA driver mapped.

    torch cannot tell: a cuInit past its own lazy initialisation leaves `torch.cuda.is_initialized()`
    False. In a child the answer means nothing: an inherited cuInit reads as "not initialised".
    """
    with Path(maps).open(encoding="utf-8", errors="replace") as lines:
        if not any("libcuda.so" in line for line in lines):
            return None
    count = ctypes.c_int()
    status: int = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count))
    return status != CUDA_NOT_INITIALIZED


def thread_count(task_dir: str = "/proc/self/task") -> int:
    """Return the threads of this process, those of C libraries included."""
    return len(list(Path(task_dir).iterdir()))


def assert_fork_safe(*, maps: str = "/proc/self/maps", task_dir: str = "/proc/self/task") -> None:
    """Arbiter: make sure that workers can be forked from this process.

    Raises:
        ForkUnsafeError: cuInit was called, or more than one thread runs.
    """
    findings = []
    if cuda_initialised(maps):
        findings.append(f"CUDA is initialised here (suspects: {CUDA_SUSPECTS})")
    threads = thread_count(task_dir)
    if threads > 1:
        names = [thread.name for thread in threading.enumerate()]
        native = f" and {threads - len(names)} of C libraries such as BLAS" if threads > len(names) else ""
        findings.append(f"{threads} threads run here ({', '.join(names)}{native}) where only 1 may")
    if findings:
        raise ForkUnsafeError(
            f"workers forked now would hang or lose their GPU: {'; '.join(findings)}; "
            "set WARMFLEET_PRELOAD=imports, or remove what does this at import"
        )
