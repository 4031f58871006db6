# SPDX-License-Identifier: Apache-2.0
"""Which cgroups we are in, and what memory they and the machine leave to us. Both processes.

Theory of operation. Every cgroup from ours up to the root binds. Its usage has that of all below it, so the
smallest limit is held against the usage of the cgroup that sets it, siblings of ours and all. In version 1 a
limit is never absent, only too large to mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path("/")
NO_LIMIT: Final = 1 << 60
"""Where the RAM is unknown, a limit of this many bytes is none: version 1 says 2^63 less a page."""


@dataclass(frozen=True)
class HostReading:
    """The memory that this process shares with others. Zero means unknown, except for kills.

    Attributes:
        total_bytes: the smallest limit on the way up, or the RAM where none is smaller.
        source: whose total it is: `cgroup v2 limit of <folder>`, `cgroup v1 limit of <folder>` or `RAM`.
        used_bytes: of that total, less the file pages that the kernel would give up first, as the
            kubelet's working set is counted; active file pages and tmpfs are in it.
        peak_bytes: the most that the limiting cgroup ever had, all file pages included.
        oom_kills: processes of our own cgroup that an OOM killer ended, whichever limit they hit.
        shm_bytes: tmpfs and shared memory, within used_bytes.
    """

    total_bytes: int
    source: str
    used_bytes: int
    peak_bytes: int = 0
    oom_kills: int = 0
    shm_bytes: int = 0


@dataclass(frozen=True)
class Version:
    """What the memory controller's files are called in one version of cgroups."""

    name: str
    limit: str
    usage: str
    peak: str
    events: str
    hierarchical: str


VERSIONS: Final = (
    Version("v2", "memory.max", "memory.current", "memory.peak", "memory.events", ""),
    Version(
        "v1",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.oom_control",
        "total_",
    ),
)


def read_host(root: Path = ROOT) -> HostReading:
    """Read the memory around this process, from the kernel's files below `root`."""
    folders = list(cgroup_folders(root, "memory"))
    kills = oom_kills(folders)
    ram = counts(root / "proc/meminfo")
    total = ram.get("MemTotal", 0)
    limits = [
        (limit, folder, version)
        for folder in reversed(folders)  # of equal limits the outer one is reached first
        for version in VERSIONS
        if 0 < (limit := number(folder / version.limit)) <= (total or NO_LIMIT - 1)
    ]
    if not limits:
        used = total - ram.get("MemAvailable", total)
        return HostReading(total, "RAM", used, oom_kills=kills, shm_bytes=ram.get("Shmem", 0))
    limit, folder, version = min(limits, key=lambda found: found[0])
    stat = counts(folder / "memory.stat")
    inactive = stat.get(f"{version.hierarchical}inactive_file", 0)
    return HostReading(
        total_bytes=limit,
        source=f"cgroup {version.name} limit of /{folder.relative_to(root)}",
        used_bytes=max(0, number(folder / version.usage) - inactive),
        peak_bytes=number(folder / version.peak),
        oom_kills=kills,
        shm_bytes=stat.get(f"{version.hierarchical}shmem", 0),
    )


def oom_kills(folders: Sequence[Path]) -> int:
    """Return the kills of the innermost cgroup that counts them.

    Not of the limiting one: version 1 counts a kill where the victim was, and version 2 further up too,
    but there with those of our siblings.
    """
    for folder in folders:
        for version in VERSIONS:
            events = counts(folder / version.events)
            if "oom_kill" in events:
                return events["oom_kill"]
    return 0


def cgroup_folders(root: Path = ROOT, controller: str = "cpu") -> Iterator[Path]:
    """Yield the folder of our cgroup, then all around it that we can see, of both versions."""
    groups = own_groups(root, controller)
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        where, _, what = line.partition(" - ")
        match where.split(" "), what.split(" "):
            case [_, _, _, top, mount, *_], [kind, _, options, *_]:
                controls = kind == "cgroup2" or controller in options.split(",")
                if controls and kind in groups and groups[kind].is_relative_to(top):
                    inner = groups[kind].relative_to(top)
                    for part in (inner, *inner.parents):
                        yield root / mount.lstrip("/") / part


def own_groups(root: Path, controller: str) -> dict[str, PurePosixPath]:
    """Return the names of our cgroup, by the type of file system that shows it."""
    groups = {}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        match line.split(":", 2):
            case [_, controllers, group] if not controllers or controller in controllers.split(","):
                groups["cgroup" if controllers else "cgroup2"] = PurePosixPath(group)
    return groups


def read_text(path: Path) -> str:
    """Return a small file of the kernel's, or nothing."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def number(path: Path) -> int:
    """Return the number that a file consists of; 0 for `max`, and for no such file."""
    text = read_text(path)
    return int(text) if text.isdecimal() else 0


def counts(path: Path) -> dict[str, int]:
    """Return the numbers in a file of `name 1` or `Name: 1 kB` lines; kB as bytes."""
    found = {}
    for line in read_text(path).splitlines():
        match line.replace(":", " ").split():
            case [name, count] if count.isdecimal():
                found[name] = int(count)
            case [name, count, "kB"] if count.isdecimal():
                found[name] = int(count) * 1024
    return found
