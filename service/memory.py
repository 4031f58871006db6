# SPDX-License-Identifier: Apache-2.0
"""Host readings: the memory of one process, and how long a listener's queue is. Both processes."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from service import cgroups

if TYPE_CHECKING:
    from collections.abc import Sequence

# struct tcp_info (linux/tcp.h): one byte of state, seven more, then 32-bit words; the fifth of
# them, tcpi_unacked, is the length of the accept queue when the socket listens.
TCP_LISTEN = 10
TCP_UNACKED = slice(24, 28)
OOM_SCORE = 200
"""Thousandths of the limit by which a worker seems larger than it is to the kernel's OOM killer."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of one process. Zero means unknown: no process that runs has none.

    Attributes:
        rss_bytes: all pages that are resident, shared ones in full.
        pss_bytes: the same with each shared page divided by the number of its users: sums to the truth.
        uss_bytes: pages of this process alone, which its end would free.
    """

    rss_bytes: int
    pss_bytes: int
    uss_bytes: int


def read_host_memory(pid: int | str = "self", root: Path = Path("/proc")) -> HostMemory | None:
    """Read the memory of a process, as exactly as the kernel lets us.

    Exact numbers cost tens of milliseconds (the kernel walks every page): off the event loop,
    and not on every scrape.

    Args:
        pid: the process.
        root: where the kernel shows its processes.

    Returns:
        Everything where `smaps_rollup` can be read; RSS alone where it cannot (another user's
        process, a kernel before 4.14), the others 0; None when the process is gone.
    """
    try:
        rollup = (root / str(pid) / "smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return read_rss_only(root / str(pid) / "statm")
    return parse_rollup(rollup)


def go_before_the_arbiter(root: Path = Path("/proc")) -> None:
    """Worker: when memory is short, let the kernel kill this process, and not the one that replaces it."""
    file = root / "self" / "oom_score_adj"
    with suppress(OSError, ValueError):  # no such file, or forbidden: then the kernel chooses by size
        file.write_text(str(min(1000, int(file.read_text(encoding="ascii")) + OOM_SCORE)), encoding="ascii")


def parse_rollup(text: str) -> HostMemory:
    """Sum up `smaps_rollup`; a line of it is `Name:   123 kB`, the first is an address range."""
    sizes_bytes: dict[str, int] = {}
    for line in text.splitlines():
        name, _, size = line.partition(":")
        if size.endswith(" kB"):
            sizes_bytes[name] = int(size.removesuffix(" kB")) * 1024
    private = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")
    return HostMemory(
        rss_bytes=sizes_bytes.get("Rss", 0),
        pss_bytes=sizes_bytes.get("Pss", 0),
        uss_bytes=sum(sizes_bytes.get(name, 0) for name in private),
    )


def read_rss_only(statm: Path) -> HostMemory | None:
    """Read the RSS from `statm`, whose second number it is, in pages."""
    try:
        rss_bytes = int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
    # A zombie keeps its files in /proc, but no memory.
    return HostMemory(rss_bytes=rss_bytes, pss_bytes=0, uss_bytes=0) if rss_bytes else None


def peak_private_bytes(pid: int | str = "self", root: Path = Path("/proc")) -> int:
    """Return the pages of a process alone, when it had most memory; as slow as `read_host_memory`.

    The kernel keeps a peak of the RSS, and of nothing else. How far the RSS has come down from it is
    added to what is private now: shared pages are those of the code and of what the arbiter loaded,
    which do not come and go during a pass. The peak is since the start, or since `reset_peak`.

    Returns:
        Bytes; 0 where they are unknown, or the process is gone.
    """
    now = read_host_memory(pid, root)
    if now is None or not now.uss_bytes:
        return 0
    status = cgroups.counts(root / str(pid) / "status")
    return now.uss_bytes + max(0, status.get("VmHWM", 0) - status.get("VmRSS", 0))


def reset_peak(root: Path = Path("/proc")) -> None:
    """Let the peak of this process begin anew; where that is forbidden, it goes on as an upper bound."""
    with suppress(OSError):
        (root / "self" / "clear_refs").write_text("5", encoding="ascii")


def listen_queue_length(sock: socket.socket) -> int:
    """Return how many connections wait in the kernel for someone to accept them.

    Returns:
        The length of the accept queue of a listening TCP socket; -1 where it is unknown (unix
        sockets, sockets that do not listen, other kernels).
    """
    if not sys.platform.startswith("linux"):
        return -1
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_UNACKED.stop)
    except OSError:
        return -1
    if len(info) < TCP_UNACKED.stop or info[0] != TCP_LISTEN:
        return -1
    return int.from_bytes(info[TCP_UNACKED], sys.byteorder)


def queue_length(listeners: Sequence[socket.socket]) -> int | None:
    """Return how many connections wait at all of these sockets; None where the kernel says it of none."""
    known = [length for length in map(listen_queue_length, listeners) if length >= 0]
    return sum(known) if known else None
