# SPDX-License-Identifier: Apache-2.0
"""What the last boot of this model on this machine measured, and keeping it for the next. Both processes."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service import manifest
from service.backends.caches import choose
from service.lifecycle import Stage
from service.logging import get

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from service.budget import WorkerCost
    from service.gpu_memory import DeviceReading
    from service.learned import ShapeHistogram
    from service.settings import Settings
    from service.slots import SlotRecord

LOG = get()
PACKAGES = ("warmfleet", "torch", "sentence-transformers", "transformers", "onnxruntime", "openvino")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Recall:
    """Where the manifest of this service lies, and what it says.

    Attributes:
        folder: of the manifests; None: nothing is kept.
        key: of this one.
        last: what it held at the start, if anything.
    """

    folder: Path | None = None
    key: dict[str, Any] = field(default_factory=dict)
    last: manifest.Manifest | None = None

    @classmethod
    def look(
        cls,
        settings: Settings,
        model: Path | None,
        readings: Collection[DeviceReading],
        *,
        cores: int,
        threads: int,
    ) -> Recall:
        """Read the manifest; the model's folder is here."""
        key = manifest.key_of(
            settings,
            model=manifest.fingerprint(model),
            device_names=[f"{one.name} {one.total_bytes}" for one in readings] or [cpu_name()],
            cores=cores,
            threads=threads,
            versions=versions(),
        )
        folder = choose(settings.cache_dir, "manifests")
        return cls(folder, key, manifest.read(folder, key))

    def keep(self, rows: Sequence[SlotRecord], cost: WorkerCost, *, boot_seconds: float) -> None:
        """Worker, thread: write what this boot has measured, and say what was slower than last time.

        Args:
            rows: of all workers; each is READY.
            cost: of one worker.
            boot_seconds: from the start until all were.
        """
        if self.folder is None:
            return
        slowest = max(rows, key=lambda row: row.stage_seconds.get(Stage.WARMUP, 0.0))
        # How long a worker waits for its turn depends on how many there are.
        stages = {stage: s for stage, s in slowest.stage_seconds.items() if stage != Stage.WAIT}
        for sentence in manifest.slower(self.last.stage_seconds if self.last else {}, stages):
            LOG.warning("this boot was slower than the last: %s", sentence)
        found = manifest.Manifest(
            written_at=manifest.stamp(time.time()),
            key=self.key,
            stage_seconds=stages,
            boot_seconds=boot_seconds,
            shapes=slowest.shapes,
            max_batch_tokens=slowest.max_batch_tokens,
            cost=replace(cost, raised=1.0),
            workers=len(rows),
        )
        manifest.update(self.folder, self.key, found.after)

    def learn(self, seen: ShapeHistogram) -> None:
        """Worker, thread: add the shapes of real traffic to the manifest."""
        if self.folder is None or not len(seen):
            return
        if not os.access(manifest.path_of(self.folder, self.key), os.R_OK):
            return  # without a manifest there is nothing to add to
        taken = seen.take()
        if not manifest.update(self.folder, self.key, lambda old: old and old.learn(taken, time.time())):
            seen.merge(taken)


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Return the model of the CPU, as far as the kernel says it."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return "cpu"


def versions() -> dict[str, str]:
    """Return the versions of what computes, as far as it is installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
