# SPDX-License-Identifier: Apache-2.0
"""What memory the GPUs have, and who uses it. Any process, and a throw-away child that alone loads NVML.

Theory of operation. CUDA tells of the device it runs on, and only to a process that spends memory there for
a context; NVML tells of all, but does not survive a fork. So a child asks NVML about all of them, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from service import device, gpus, logging
from service.errors import SettingsError
from service.slots import CPU

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LOG = logging.get()
FAILED: Final = "no reading of GPU memory: %s"


@dataclass(frozen=True)
class DeviceReading:
    """Memory of a GPU, or of a MIG instance.

    Attributes:
        uuid: as the driver writes it.
        name: of the model; empty where it is unknown.
        total_bytes: what processes can have, all of them together: without what the driver reserves.
        used_bytes: what they have.
        processes: bytes by process id, where the driver shows them; in a container the ids may be
            those of the host, and under MPS all memory is the server's.
    """

    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    processes: Mapping[int, int]


def read_devices(tokens: Sequence[str], timeout_s: float = 20.0) -> dict[str, DeviceReading]:
    """Return the readings by token, of those tokens of which there is one.

    There is none of the CPU, of GPUs that share the host's memory, of a GPU that is cut into MIG instances
    (CUDA picks one of them), and of any if NVML does not work, which is logged.

    Args:
        tokens: as CUDA_VISIBLE_DEVICES takes them: indices, and UUIDs that may be abbreviated.
        timeout_s: how long the driver may take.
    """
    tokens = [token for token in tokens if token != CPU]
    listed = ask_child(timeout_s) if tokens else {}
    readings = {}
    for token in tokens:
        with contextlib.suppress(SettingsError):  # no GPU of that name
            uuid = device.resolve(device.VISIBLE, token, list(listed))
            if found := listed[uuid]:
                readings[token] = parse_reading(uuid, found)
    return readings


def parse_reading(uuid: str, found: Mapping[str, Any]) -> DeviceReading:
    """Return what the child wrote of one GPU; JSON has made text of the process ids."""
    processes = {int(pid): used_bytes for pid, used_bytes in found["processes"].items()}
    return DeviceReading(uuid, **dict(found, processes=processes))


def ask_child(timeout_s: float) -> dict[str, Any]:
    """Return what the child writes, or nothing; of its exit status see `gpus.list_gpus`."""
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "service.gpu_memory"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        LOG.warning(FAILED, f"the NVIDIA driver did not answer within {timeout_s:g} s")
        return {}
    except OSError as error:  # no memory for a child, which is when someone wants to know
        LOG.warning(FAILED, error.strerror)
        return {}
    try:
        listed: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        LOG.warning(FAILED, child.stderr.decode(errors="replace").strip().rpartition("\n")[2])
        return {}
    return listed


def print_devices() -> None:
    """Child: write as JSON what NVML says; if it does not work, say why as exceptions do."""
    json.dump(ask_nvml(), sys.stdout)


def ask_nvml() -> dict[str, dict[str, Any] | None]:
    """Child: return the fields of a reading by UUID, of every part there is, so that indices hold.

    Raises:
        ImportError: there is no binding of NVML.
        NVMLError: there is no driver, or it does not work.
    """
    import pynvml

    pynvml.nvmlInit()
    listed = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return {
        pynvml.nvmlDeviceGetUUID(part): read_part(pynvml, part)
        for gpu in listed
        for part in gpus.parts(pynvml, gpu)
    }


def read_part(pynvml: Any, part: Any) -> dict[str, Any] | None:  # noqa: ANN401 - pynvml has no types
    """Child: return what is known of a GPU or MIG instance; None without its memory."""
    name, processes = "", {}
    try:
        total_bytes, used_bytes = read_memory(pynvml, part)
    except pynvml.NVMLError:  # it has none of its own, or is lost
        return None
    with contextlib.suppress(pynvml.NVMLError):
        name = pynvml.nvmlDeviceGetName(part)
    with contextlib.suppress(pynvml.NVMLError):  # forbidden on some virtual GPUs
        rows = pynvml.nvmlDeviceGetComputeRunningProcesses(part)
        # None is how NVML says unknown, and in containers some drivers say 0 for it.
        processes = {row.pid: row.usedGpuMemory for row in rows if row.usedGpuMemory}
    return {"name": name, "total_bytes": total_bytes, "used_bytes": used_bytes, "processes": processes}


def read_memory(pynvml: Any, part: Any) -> tuple[int, int]:  # noqa: ANN401 - pynvml has no types
    """Child: return total and used bytes; only the second version of the call knows what is reserved."""
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(part, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError:  # an old driver, or a MIG instance; what is reserved may be in `used` then
        memory = pynvml.nvmlDeviceGetMemoryInfo(part)
        return memory.total, memory.used
    return memory.total - memory.reserved, memory.used


if __name__ == "__main__":
    print_devices()
