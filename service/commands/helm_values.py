# SPDX-License-Identifier: Apache-2.0
"""Values for the Helm chart, from a measured boot. Pure; command line."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

from service.settings import PREFIX, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from service.commands.scouting import Scouted
    from service.ledger import Sum

STEP = 64 << 20
"""Memory is asked for in multiples of this."""
POD_BYTES = 64 << 20
"""What a pod is charged for besides its processes' pages: counters in tmpfs, page tables, sockets."""
PERIOD_S = 5
PATIENCE = 3.0
"""A boot may take so many times what it took here."""
LEAST_S = 60.0
PLACES: Final = frozenset(
    {
        *("bind", "ops_bind", "cache_dir", "metrics_dir", "hub_cache", "compile_cache", "export_cache"),
        *("workers", "max_workers", "devices"),
    }
)
"""Settings that are the chart's business, or true on this machine only."""


def values(settings: Settings, scouted: Scouted, entry: Sum, workers: int) -> dict[str, Any]:
    """Return what to give the chart so that so many workers run and their pod is let live."""
    memory = f"{pod_memory(entry, workers) >> 20}Mi"
    gpus = {"nvidia.com/gpu": min(workers, len(entry.devices))} if entry.devices else {}
    return {
        "workers": workers,
        "env": env(settings, scouted),
        "resources": {
            "requests": {"cpu": workers * entry.threads, "memory": memory} | gpus,
            "limits": {"memory": memory} | gpus,
        },
        "startupProbe": probe(boot_seconds(settings, scouted, entry, workers)),
    }


def pod_memory(entry: Sum, workers: int) -> int:
    """Return bytes of which the usable share holds arbiter and workers at their peak."""
    need = POD_BYTES + entry.host.shared + workers * entry.cost.on_host
    return math.ceil(need / entry.host.utilization / STEP) * STEP


def boot_seconds(settings: Settings, scouted: Scouted, entry: Sum, workers: int) -> float:
    """Return how long the whole fleet boots, from what one worker took: loads wait for each other."""
    stages = scouted.stage_seconds
    turn = sum(stages.get(stage, 0.0) for stage in ("load", "to_device", "warmup"))
    at_once = settings.concurrent_loads or len(entry.devices) or entry.cores or 1
    return scouted.ready_s + (math.ceil(workers / at_once) - 1) * turn


def probe(boot_s: float) -> dict[str, int]:
    """Return the numbers of a startup probe that waits three times the measured boot, a minute at least."""
    return {
        "periodSeconds": PERIOD_S,
        "failureThreshold": math.ceil(max(LEAST_S, PATIENCE * boot_s) / PERIOD_S),
    }


def env(settings: Settings, scouted: Scouted) -> dict[str, str]:
    """Return the settings that differ from the defaults, and what was tried and measured; no secrets."""
    chosen = {
        PREFIX + name.upper(): text_of(getattr(settings, name))
        for name, field in Settings.model_fields.items()
        if name not in PLACES
        and "Secret" not in str(field.annotation)
        and getattr(settings, name) != field.default
    }
    tried = {} if scouted.asked.dtype == "auto" else {PREFIX + "DTYPE": scouted.asked.dtype}
    return chosen | tried | {PREFIX + "MAX_BATCH_TOKENS": str(scouted.max_batch_tokens)}


def text_of(value: object) -> str:
    """Return a setting as its variable has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def secrets(settings: Settings) -> list[str]:
    """Return the variables of the secrets that are set, for the reader to pass on by a Secret."""
    return [
        PREFIX + name.upper()
        for name, field in Settings.model_fields.items()
        if "Secret" in str(field.annotation) and getattr(settings, name) is not None
    ]


def yaml(tree: Mapping[str, Any], depth: int = 0) -> str:
    """Return nested mappings as YAML; texts are in quotes, as JSON has them."""
    return "\n".join(_lines(tree, depth))


def _lines(tree: Mapping[str, Any], depth: int) -> Iterator[str]:
    for name, value in tree.items():
        head = "  " * depth + name + ":"
        if isinstance(value, dict):
            yield head if value else head + " {}"
            yield from _lines(value, depth + 1)
        else:
            yield f"{head} {json.dumps(value, ensure_ascii=False)}"
