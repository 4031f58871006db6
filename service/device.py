# SPDX-License-Identifier: Apache-2.0
"""Which GPUs the fleet may use, and how a worker is tied to one. Both processes.

Theory of operation. A device is an opaque token: what CUDA_VISIBLE_DEVICES takes (`1`, `GPU-…`, `MIG-…`),
or `cpu`. The driver reads the variable once, at cuInit, and drops what it does not understand without a
word; so the arbiter checks the tokens first, the worker sets the variable before anything else, and
everything after that is `cuda:0`.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Final

from service import cpus, gpus
from service.errors import SettingsError
from service.slots import CPU

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping, Sequence
    from pathlib import Path

    from service.settings import Settings

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
HIDING: Final = frozenset({"-1", "NoDevFiles"})
DEVICES: Final = "WARMFLEET_DEVICES"

ALWAYS: Final = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # else torch.cuda.is_available() calls cuInit
    "TRITON_NVML_BASED_CUDA_CHECK": "1",  # Triton's check of its own, from 3.8
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # a progress bar leaves its monitor thread behind
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime would report to its maker, and keep an id of this machine
}
UNLESS_SET: Final = {
    # Code for each number of tokens that a pass had: 3 MB apiece, a thousand of them, for no gain
    # (docs/decisions/0016). The first is torch's own cache of oneDNN's, the second oneDNN's.
    "LRU_CACHE_CAPACITY": "16",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # torch takes NVML's index for CUDA's
    "OPENBLAS_NUM_THREADS": "1",  # numpy and scipy start their BLAS threads at import
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else each worker tokenises on every core (docs/decisions/0015)
}

DRIVER_SAYS: Final = ("the driver lists none", "no NVIDIA driver answers")
WITHOUT_GPU: Final = f"give the service a GPU, or set WARMFLEET_DEVICE=cpu and leave {DEVICES} unset"


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Arbiter: set what torch, BLAS and the hub read when they are imported, so that forks stay safe."""
    environ.update(ALWAYS)
    for name, value in UNLESS_SET.items():
        environ.setdefault(name, value)


def discover(
    settings: Settings,
    environ: Mapping[str, str] = os.environ,
    *,
    list_gpus: Callable[[], list[str] | None] = gpus.list_gpus,
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


def describe(tokens: Sequence[str], settings: Settings, environ: Mapping[str, str] = os.environ) -> str:
    """Arbiter: say what `discover` picked, and from where."""
    if tokens == (CPU,):
        return "the CPU: WARMFLEET_DEVICE=cpu" if settings.device == "cpu" else "the CPU: no GPU is visible"
    source = DEVICES if settings.devices else VISIBLE if VISIBLE in environ else "the driver"
    return f"{len(tokens)} {'GPU' if len(tokens) == 1 else 'GPUs'} from {source}: {', '.join(tokens)}"


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


def numa_nodes(tokens: Sequence[str], addresses: Mapping[str, str], root: Path = cpus.ROOT) -> dict[str, int]:
    """Arbiter: return the NUMA node of each token, where it can be known; `addresses` are by UUID."""
    listed = list(addresses)
    found = {token: addresses.get(identity(token, listed), "") for token in tokens if listed}
    nodes = {token: cpus.gpu_node(address, root) for token, address in found.items() if address}
    return {token: node for token, node in nodes.items() if node is not None}


def refuse_twice(name: str, tokens: Sequence[str], identities: Sequence[str]) -> None:
    """Refuse a list with a GPU in it twice: the driver ignores such a list as a whole."""
    if len(set(identities)) < len(identities):
        raise SettingsError(
            f"{name}={','.join(tokens)} names a GPU twice; name it once (slots share it by themselves)"
        )


def pin(token: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Worker: see this one device as `cuda:0`, or none on CPU. Before anything can call cuInit."""
    environ[VISIBLE] = "" if token == CPU else token
