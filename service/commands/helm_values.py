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

DEFAULTS: Final = {name: field.default for name, field in Settings.model_fields.items()}
POD_BYTES = 64 << 20
"""What a pod is charged for besides its processes' pages: counters in tmpfs, page tables, sockets."""
MIB = 1 << 20
UNITS: Final = {"GiB": 1 << 30, "MiB": MIB, "GB": 10**9, "MB": 10**6}
PERIOD_S = 5
PATIENCE = 3.0
"""A boot may take so many times what it took here."""
LEAST_S = 60.0
PLACES: Final[Mapping[str, str]] = {
    "model_id": "model.id",
    "revision": "model.revision",
    "hf_token": "model.tokenSecret",
    "workers": "workers",
    "max_workers": "maxWorkers",
    "ready_quorum": "readyQuorum",
    "ready_floor": "readyFloor",
    "budget_policy": "budgetPolicy",
    "gpu_memory_utilization": "gpuMemoryUtilization",
    "gpu_memory_limit": "gpuMemoryLimit",
    "host_memory_utilization": "hostMemoryUtilization",
    "device": "gpu.enabled",
    "bind": "ports.api",
    "ops_bind": "ports.ops",
    "api_key": "apiKeys.existingSecret",
    "api_key_file": "apiKeys.existingSecret",
    "otlp_headers": "otlpHeadersSecret",
}
"""Settings that have a place of their own in the chart; all others are under `settings`, by `camel` name."""
LOCAL: Final = frozenset(
    {"cache_dir", "metrics_dir", "hub_cache", "compile_cache", "export_cache", "devices"}
)
"""Settings that are true on this machine only."""
SECRET: Final = frozenset({"model.tokenSecret", "apiKeys.existingSecret", "otlpHeadersSecret"})
TOP: Final = (
    *("budget_policy", "ready_quorum", "ready_floor"),
    *("gpu_memory_utilization", "gpu_memory_limit", "host_memory_utilization"),
)
"""Settings that have the same name at the top of the chart's values."""


def camel(name: str) -> str:
    """Return a setting's name as the chart writes it: `max_batch_tokens` as `maxBatchTokens`."""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def values(settings: Settings, scouted: Scouted, entry: Sum, workers: int) -> dict[str, Any]:
    """Return what to give the chart so that so many workers run and their pod is let live."""
    model = {
        place: value
        for place, name in (("id", "model_id"), ("revision", "revision"))
        if (value := getattr(settings, name)) != DEFAULTS[name]
    }
    gpus = {"count": min(workers, len(entry.devices))} if entry.devices else {}
    return {
        "workers": workers,
        **({"model": model} if model else {}),
        "gpu": {"enabled": bool(entry.devices)} | gpus,
        **top(settings, workers),
        "worker": worker(entry),
        "settings": others(settings, scouted),
        "startupProbe": probe(boot_seconds(settings, scouted, entry, workers)),
    }


def top(settings: Settings, workers: int) -> dict[str, Any]:
    """Return those of `TOP` that differ from the defaults; so many workers can meet them."""
    chosen = {name: getattr(settings, name) for name in TOP}
    chosen = {name: value for name, value in chosen.items() if value != DEFAULTS[name]}
    for name in chosen.keys() & {"ready_quorum", "ready_floor"}:
        chosen[name] = min(chosen[name], workers)
    if "gpu_memory_limit" in chosen:
        chosen["gpu_memory_limit"] = size_text(chosen["gpu_memory_limit"])
    return {camel(name): value for name, value in chosen.items()}


def worker(entry: Sum) -> dict[str, Any]:
    """Return what a worker takes, and a pod without any.

    The chart's memory limit is one base, so many workers and /dev/shm, divided by `hostMemoryUtilization`.
    """
    return {
        "hostMemory": f"{math.ceil(entry.cost.on_host / MIB)}Mi",
        "baseMemory": f"{math.ceil((POD_BYTES + entry.host.shared) / MIB)}Mi",
        "cpu": entry.threads,
    }


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


def others(settings: Settings, scouted: Scouted) -> dict[str, Any]:
    """Return all other settings that differ from the defaults, and what was tried and measured."""
    chosen = {
        camel(name): list(value) if isinstance(value, tuple) else value
        for name, default in DEFAULTS.items()
        if name not in PLACES and name not in LOCAL and (value := getattr(settings, name)) != default
    }
    tried = {} if scouted.asked.dtype == "auto" else {"dtype": scouted.asked.dtype}
    return chosen | tried | {"maxBatchTokens": scouted.max_batch_tokens}


def size_text(count: int) -> str:
    """Return bytes with the largest unit of which they are a multiple; an odd byte is left out.

    Never a bare number: Helm would make 2.147483648e+10 of 20 GiB.
    """
    for unit, size in UNITS.items():
        if count % size == 0:
            return f"{count // size}{unit}"
    return f"{count // MIB}MiB"


def secrets(settings: Settings) -> list[str]:
    """Return the variables of the secrets that are set, for the reader to pass on by a Secret."""
    names = [name for name in Settings.model_fields if PLACES.get(name) in SECRET]
    return [PREFIX + name.upper() for name in names if getattr(settings, name) is not None]


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
