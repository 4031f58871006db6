# SPDX-License-Identifier: Apache-2.0
"""What a full boot measured, kept as JSON for the next one. Both processes.

Theory of operation. A manifest is a hint: with none, a boot measures everything anew. So whatever is wrong
with the file or its folder costs one line in the log and never a boot. Its name is the digest of a key that
holds all that the measurements depend on; readers need no lock, as files are replaced as a whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from service.budget import WorkerCost  # noqa: TC001 - pydantic reads the annotations
from service.learned import LearnedShape, ShapeHistogram, decay_after
from service.logging import get
from service.slots import ShapeTimes  # noqa: TC001 - likewise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from service.settings import Settings

LOG = get()
FORMAT = 1
"""To be raised when the fields mean something else."""
MOST_BYTES = 1 << 20
MOST = (1 << 63) - 1
PAUSE_S = 0.02
TRIES = 50
"""A second in all; a holder of the lock has it for about a millisecond."""
MATTERS = (
    *("revision", "trust_remote_code", "backend", "dtype", "packing", "compile", "preload"),
    *("max_batch_tokens", "max_batch_requests", "max_concurrent_requests"),
    *("gpu_memory_utilization", "gpu_memory_limit"),  # what warm-up finds room for
    *("skip_warmup", "warmup_shapes", "warmup_rounds", "warmup_budget"),
    *("stub_load_ms", "stub_forward_ms", "stub_memory_mb", "stub_scenario"),
)
"""Settings by which the measurements differ; all others are listed in tests/unit/test_manifest.py."""


@dataclass(frozen=True)
class Manifest:
    """The measurements of one boot, and what traffic taught since.

    Attributes:
        written_at: when the boot was over, ISO 8601 in UTC.
        key: all that the measurements depend on, for people.
        stage_seconds: by stage, in the order in which they ran.
        boot_seconds: from the start to the quorum.
        shapes: what warm-up measured.
        max_batch_tokens: what warm-up found room for.
        cost: of one worker.
        workers: that were planned.
        learned: shapes of real traffic.
        learned_at: when these were last weighed, in seconds since 1970.
    """

    written_at: str
    key: dict[str, Any]
    stage_seconds: dict[str, float]
    boot_seconds: float
    shapes: tuple[ShapeTimes, ...]
    max_batch_tokens: int
    cost: WorkerCost
    workers: int
    learned: tuple[LearnedShape, ...] = ()
    learned_at: float = 0.0

    def after(self, before: Manifest | None) -> Manifest:
        """Return this manifest with what traffic taught the one before it."""
        return replace(self, learned=before.learned, learned_at=before.learned_at) if before else self

    def learn(self, fresh: ShapeHistogram, now: float) -> Manifest:
        """Return this manifest with more shapes, those it has weighed less by their age at `now`."""
        histogram = ShapeHistogram(self.learned)
        histogram.merge(fresh, decay_after(now - self.learned_at))
        return replace(self, learned=histogram.learned(), learned_at=now)


_ADAPTER = TypeAdapter(Manifest)


def stamp(now: float) -> str:
    """Return seconds since 1970 as `written_at` has them."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")


# ---------------------------------------------------------------------------------------------
# The key


def key_of(
    settings: Settings,
    *,
    model: str,
    device_names: Sequence[str],
    cores: int,
    threads: int,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return all that the measurements depend on; neither numbers of workers, nor places, nor secrets.

    Args:
        settings: of which those in `MATTERS` count.
        model: `fingerprint` of its folder.
        device_names: what the devices are, not which.
        cores: that the fleet may use.
        threads: that a worker computes with.
        versions: of the packages that compute.
    """
    chosen = {name: getattr(settings, name) for name in MATTERS}
    return {
        "model": model,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()},
        "device_names": sorted(device_names),
        "cores": cores,
        "threads": threads,
        "versions": dict(versions),
    }


def fingerprint(folder: Path | None) -> str:
    """Tell a model from any other by its files' names, sizes and times, and by config.json; never raises."""
    if folder is None:
        return "none"
    facts: list[tuple[object, ...]] = []
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue  # .git and .cache change while the model does not
        try:
            if file.is_file():
                stat = file.stat()
                facts.append((str(name), stat.st_size, stat.st_mtime_ns))
        except OSError:
            facts.append((str(name), None, None))
    try:
        config = (folder / "config.json").read_bytes()
    except OSError:
        config = b""
    return hashlib.sha256(json.dumps(sorted(facts, key=str)).encode() + config).hexdigest()[:24]


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"))


def path_of(folder: Path, key: Mapping[str, Any]) -> Path:
    """Return where the manifest of a key is."""
    return folder / f"{hashlib.sha256(_canonical(key).encode()).hexdigest()[:24]}.json"


# ---------------------------------------------------------------------------------------------
# The file


def dump(manifest: Manifest) -> bytes:
    """Return the manifest as JSON.

    Raises:
        ValueError: it holds what JSON has not, such as infinity.
    """
    return json.dumps({"format": FORMAT, **asdict(manifest)}, allow_nan=False, indent=1).encode()


def parse(data: bytes) -> Manifest:
    """Return the manifest that `dump` wrote.

    Raises:
        ValueError: it is none; the text is the reason in a few words.
    """
    try:
        raw = json.loads(data)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        manifest = _ADAPTER.validate_json(data, strict=True)
        datetime.fromisoformat(manifest.written_at)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    sides = [(shape.texts, shape.tokens) for shape in manifest.shapes]
    sides += [(shape.texts, shape.tokens) for shape in manifest.learned]
    positive = [manifest.workers, manifest.max_batch_tokens, manifest.cost.raised, *chain(*sides)]
    if not all(0 <= number <= MOST for number in _numbers(asdict(replace(manifest, key={})))):
        raise ValueError("a number is negative, or not finite")
    if min(positive) < 1:
        raise ValueError("a number is below 1 that cannot be")
    return manifest


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def read(folder: Path, key: Mapping[str, Any]) -> Manifest | None:
    """Return the manifest of a key, or None: silently if there is none, with one line if it is of no use."""
    path = path_of(folder, key)
    try:
        return _read(path, key)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        LOG.warning("the manifest %s is ignored: %s", path, _reason(error))
        return None


def _read(path: Path, key: Mapping[str, Any]) -> Manifest:
    with path.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes")
    manifest = parse(data)
    if _canonical(manifest.key) != _canonical(key):
        raise ValueError("it is foreign: its key is another one")
    return manifest


def write(folder: Path, manifest: Manifest) -> bool:
    """Put the manifest in place of the one there is; return whether that worked, with one line if not."""
    path = path_of(folder, manifest.key)
    unfinished = None
    try:
        data = dump(manifest)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{path.stem}-", delete=False) as stream:
            unfinished = Path(stream.name)
            stream.write(data)
        unfinished.replace(path)
    except (OSError, ValueError) as error:
        LOG.warning("the manifest %s is not written: %s", path, _reason(error))
        if unfinished is not None:
            with contextlib.suppress(OSError):
                unfinished.unlink()
        return False
    return True


def update(
    folder: Path,
    key: Mapping[str, Any],
    change: Callable[[Manifest | None], Manifest | None],
    *,
    sleep: Callable[[float], object] = time.sleep,
) -> bool:
    """Change the manifest of a key while no other process does; it blocks for up to a second.

    Args:
        folder: of the manifests.
        key: that the manifest has before and after.
        change: gets what `read` returned at the start, or what is there since; returns what is to be written,
            or None to leave the file as it is.
        sleep: between tries for the lock, for tests.

    Returns:
        Whether a manifest was written; if not, and `change` wanted it, one line has said why.
    """
    path = path_of(folder, key).with_suffix(".lock")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = path.open("ab")
    except OSError as error:
        LOG.warning(
            "the manifest's lock %s cannot be opened: %s; set WARMFLEET_CACHE_DIR to a folder that can be "
            "written to",
            path,
            _reason(error),
        )
        return False
    problem = ""
    with lock:
        for _ in range(TRIES):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:  # EWOULDBLOCK; on some network file systems also ENOLCK
                problem = _reason(error)
            sleep(PAUSE_S)
        else:
            LOG.warning("the manifest's lock %s is given up: %s", path, problem)
            return False
        before = None
        with contextlib.suppress(OSError, ValueError):  # said by `read`, at the start
            before = _read(path_of(folder, key), key)
        after = change(before)
        return after is not None and write(folder, after)


def _reason(error: Exception) -> str:
    """Return one line for people, whatever the file held."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.split())[:200]


# ---------------------------------------------------------------------------------------------
# This boot against the last one


def slower(
    before: Mapping[str, float], now: Mapping[str, float], factor: float = 1.5, least_s: float = 1.0
) -> list[str]:
    """Return a sentence for each stage that took longer than last time, by the factor and by `least_s`."""
    return [
        f"{stage} took {seconds:.1f} s, {before[stage]:.1f} s last time"
        for stage, seconds in now.items()
        if stage in before and seconds >= factor * before[stage] and seconds - before[stage] >= least_s
    ]


def eta(last: Mapping[str, float], stage: str, seconds: float) -> float | None:
    """Return the seconds until ready, by what the last boot took; None if it had no such stage.

    Args:
        last: seconds by stage, in the order in which they ran.
        stage: that runs.
        seconds: for which it has.
    """
    if stage not in last:
        return None
    stages = list(last)
    later = stages[stages.index(stage) + 1 :]
    return max(0.0, last[stage] - seconds) + sum(last[name] for name in later)
