# SPDX-License-Identifier: Apache-2.0
"""Which GPUs the driver has. Arbiter, and a throw-away child of it that alone loads NVML or CUDA.

NVML does not survive a fork and cuInit spoils every later one, so the process that forks asks neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from service import logging

if TYPE_CHECKING:
    from collections.abc import MutableMapping

LOG = logging.get()
CUDA_NO_DEVICE: Final = 100


def list_gpus(
    timeout_s: float = 20.0, *, addresses: MutableMapping[str, str] | None = None
) -> list[str] | None:
    """Arbiter: return the UUID of each GPU, or of each MIG instance of it; None if no driver answers.

    The child's answer is its output, never its exit status, which another waitpid may have taken.

    Args:
        timeout_s: how long the driver may take.
        addresses: is given the PCI address of each by UUID, "" where it is unknown.
    """
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # with -P: find ourselves, and no other
    environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "service.gpus"],
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        LOG.warning("no GPU list: the NVIDIA driver did not answer within %g s", timeout_s)
        return None
    try:
        listed: dict[str, str] | None = json.loads(child.stdout)
    except ValueError:
        reason = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        LOG.warning("no GPU list: the child that asks the driver failed: %s", reason)
        return None
    if listed and addresses is not None:
        addresses.update(listed)
    return None if listed is None else list(listed)


def print_gpus() -> None:
    """Child: write as JSON what NVML lists, else what CUDA lists, else null."""
    listed = ask_nvml()
    if listed is None and (uuids := ask_cuda()) is not None:
        listed = dict.fromkeys(uuids, "")
    json.dump(listed, sys.stdout)


def ask_nvml() -> dict[str, str] | None:
    """Child: return PCI addresses by UUID, by NVML, or None if it does not work here."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return {
            pynvml.nvmlDeviceGetUUID(part): address(pynvml, gpu)
            for gpu in gpus
            for part in parts(pynvml, gpu)
        }
    except pynvml.NVMLError:
        return None


def address(pynvml: Any, gpu: Any) -> str:  # noqa: ANN401 - pynvml has no types
    """Child: return the PCI address of a GPU as the kernel writes it, or nothing."""
    try:
        pci = pynvml.nvmlDeviceGetPciInfo(gpu)
    except pynvml.NVMLError:
        return ""
    return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"


def parts(pynvml: Any, gpu: Any) -> list[Any]:  # noqa: ANN401 - pynvml has no types
    """Child: return the MIG instances of a GPU in MIG mode, else the GPU."""
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
    """Child: return UUIDs by CUDA itself (no NVML: WSL, some vGPUs), or None without CUDA."""
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
    """Child: return the UUID of a device as CUDA_VISIBLE_DEVICES takes it."""
    device, name, raw = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
    if (
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetUuid_v2(raw, device)
    ):
        return None
    kind = "MIG" if b" MIG " in name.value else "GPU"  # the bytes do not say which of the two
    return f"{kind}-{UUID(bytes=raw.raw)}"


if __name__ == "__main__":
    print_gpus()
