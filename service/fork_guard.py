# SPDX-License-Identifier: Apache-2.0
"""The guard that stands before the first fork: no CUDA and one thread, or no worker. Arbiter."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Final

from service.errors import ForkUnsafeError

CUDA_NOT_INITIALIZED: Final = 3
CUDA_SUSPECTS: Final = (
    "a forward or backward pass even on CPU, a torch.cuda call, torch.compile, "
    "CUDA_VISIBLE_DEVICES=MIG-… with a device count, or a library that calls cuInit"
)


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
