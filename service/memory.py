# SPDX-License-Identifier: Apache-2.0
"""Host readings: the memory of one process, and how long a listener's queue is. Both processes."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

# struct tcp_info (linux/tcp.h): one byte of state, seven more, then 32-bit words; the fifth of
# them, tcpi_unacked, is the length of the accept queue when the socket listens.
TCP_LISTEN = 10
TCP_UNACKED = slice(24, 28)


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
