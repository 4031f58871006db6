# SPDX-License-Identifier: Apache-2.0
"""Host readings: what /proc says of one process, and how long a listener's queue is."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.memory import (
    OOM_SCORE,
    HostMemory,
    go_before_the_arbiter,
    listen_queue_length,
    peak_private_bytes,
    read_host_memory,
    reset_peak,
)

PROC = Path(__file__).parent / "trees" / "proc"
MIB = 1024 * 1024


def test_rollup_gives_rss_pss_and_uss() -> None:
    """USS is the sum of the three private sizes of smaps_rollup; a kB there is 1024 bytes."""
    assert read_host_memory(100, PROC) == HostMemory(
        rss_bytes=129572 * 1024, pss_bytes=128250 * 1024, uss_bytes=(93612 + 34348 + 2048) * 1024
    )


def test_without_rollup_only_rss_is_known() -> None:
    """Where smaps_rollup cannot be read, statm gives the RSS, and 0 says that the others are unknown."""
    rss_bytes = 12055 * os.sysconf("SC_PAGE_SIZE")
    assert read_host_memory(200, PROC) == HostMemory(rss_bytes=rss_bytes, pss_bytes=0, uss_bytes=0)


def test_rollup_that_may_not_be_read_falls_back(tmp_path: Path) -> None:
    """A smaps_rollup that exists and cannot be read (a folder here, another user's there) is as if absent."""
    (tmp_path / "7" / "smaps_rollup").mkdir(parents=True)
    (tmp_path / "7" / "statm").write_text("10 5 0 0 0 0 0\n")
    rss_bytes = 5 * os.sysconf("SC_PAGE_SIZE")
    assert read_host_memory(7, tmp_path) == HostMemory(rss_bytes=rss_bytes, pss_bytes=0, uss_bytes=0)


@pytest.mark.parametrize("pid", [300, 400], ids=["zombie", "no such process"])
def test_process_that_is_gone_has_no_memory(pid: int) -> None:
    """A process that has ended reads as None, whether or not its parent has noticed."""
    assert read_host_memory(pid, PROC) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads the real /proc")
def test_own_memory_is_read_from_the_real_proc() -> None:
    """On this kernel 32 MiB that are written show up in RSS, PSS and USS of the process itself."""
    before = read_host_memory()
    block = mmap.mmap(-1, 32 * MIB)
    block.write(b"x" * 32 * MIB)
    after = read_host_memory(os.getpid())
    assert before is not None
    assert after is not None
    assert after.rss_bytes >= after.pss_bytes >= after.uss_bytes > 0
    assert after.uss_bytes - before.uss_bytes > 24 * MIB
    block.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the real /proc")
def test_real_zombie_is_gone() -> None:
    """A child that has exited and was not waited for reads as None on this kernel."""
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert read_host_memory(child.pid) is None
    finally:
        child.communicate()


ROLLUP = "4000-7ffc4251c000 ---p 00000000 00:00 0 [rollup]\nRss: 900 kB\nPss: 500 kB\nPrivate_Dirty: 300 kB\n"


@pytest.mark.parametrize(
    ("status", "expected_kb"),
    [
        ("Name:\tpython\nVmPeak:\t 9999 kB\nVmHWM:\t  1400 kB\nVmRSS:\t   900 kB\nThreads:\t4\n", 800),
        ("VmHWM:\t   900 kB\nVmRSS:\t   900 kB\n", 300),
        ("VmHWM:\t   800 kB\nVmRSS:\t   900 kB\n", 300),
        ("VmRSS:\t   900 kB\n", 300),
        (None, 300),
    ],
    ids=["came down", "at its peak", "counted late", "no peak", "no status"],
)
def test_private_peak_is_what_is_private_now_and_what_was_given_back(
    tmp_path: Path, status: str | None, expected_kb: int
) -> None:
    """To the USS comes how far the RSS is below its peak, if the kernel says; never less than the USS."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps_rollup").write_text(ROLLUP)
    if status is not None:
        (tmp_path / "7" / "status").write_text(status)
    assert peak_private_bytes(7, tmp_path) == expected_kb * 1024


@pytest.mark.parametrize(
    "statm", ["10 5 0 0 0 0 0", "0 0 0 0 0 0 0", None], ids=["only RSS", "zombie", "gone"]
)
def test_private_peak_is_unknown_without_uss(tmp_path: Path, statm: str | None) -> None:
    """Where it cannot be told what is private, the peak is 0, which says unknown, and not the difference."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("VmHWM:\t 1400 kB\nVmRSS:\t 900 kB\n")
    if statm is not None:
        (tmp_path / "7" / "statm").write_text(statm)
    assert peak_private_bytes(7, tmp_path) == 0


def test_reset_writes_what_the_kernel_takes_for_it(tmp_path: Path) -> None:
    """5 resets the peak and nothing else (1 to 4 clear bits of pages)."""
    (tmp_path / "self").mkdir()
    reset_peak(tmp_path)
    assert (tmp_path / "self" / "clear_refs").read_text() == "5"


def test_forbidden_reset_is_silent(tmp_path: Path) -> None:
    """A file that cannot be written (a folder here, another user's there) leaves the peak as it is."""
    (tmp_path / "self" / "clear_refs").mkdir(parents=True)
    reset_peak(tmp_path)
    reset_peak(tmp_path / "missing")


@pytest.mark.parametrize(
    ("before", "after"), [("0\n", OOM_SCORE), ("-900\n", OOM_SCORE - 900), ("950\n", 1000)]
)
def test_a_worker_seems_larger_to_the_oom_killer(before: str, after: int, tmp_path: Path) -> None:
    """By the same as whoever started it, who may have set it apart; 1000 is the most that there is."""
    file = tmp_path / "self" / "oom_score_adj"
    file.parent.mkdir()
    file.write_text(before)
    go_before_the_arbiter(tmp_path)
    assert file.read_text() == str(after)


@pytest.mark.parametrize("text", [None, "", "none"])
def test_where_the_kernel_has_no_such_score_it_chooses_by_size(text: str | None, tmp_path: Path) -> None:
    """No file, or one that says nothing: no error, and nothing is made."""
    file = tmp_path / "self" / "oom_score_adj"
    if text is not None:
        file.parent.mkdir()
        file.write_text(text)
    go_before_the_arbiter(tmp_path)
    assert (file.read_text() if file.exists() else None) == text


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this kernel resets no peaks")
def test_real_peak_outlives_the_memory_until_it_is_reset() -> None:
    """On this kernel 32 MiB that were written and given back are in the peak, and a reset takes them out."""
    reset_peak()
    before = peak_private_bytes()
    block = mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(b"x" * 32 * MIB)
    block.close()
    after = peak_private_bytes()
    reset_peak()
    again = peak_private_bytes()
    assert after - before > 24 * MIB
    assert after - again > 24 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO of a listener is Linux's")
@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["IPv4", "IPv6"]
)
def test_queue_length_counts_connections_not_accepted(family: socket.AddressFamily, host: str) -> None:
    """Each connection that nobody has accepted counts one, and accepting takes it off."""
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"no {host} here")
        listener.listen(8)
        assert listen_queue_length(listener) == 0
        clients = [socket.create_connection(listener.getsockname()[:2]) for _ in range(3)]
        assert listen_queue_length(listener) == 3
        accepted, _ = listener.accept()
        assert listen_queue_length(listener) == 2
        for sock in (*clients, accepted):
            sock.close()


def test_queue_length_is_unknown_where_there_is_no_tcp_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unix listeners, sockets that do not listen, closed ones, short answers and other kernels give -1."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        assert listen_queue_length(listener) == -1
    assert listen_queue_length(listener) == -1
    with socket.socket() as sock:
        assert listen_queue_length(sock) == -1
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert listen_queue_length(Short(server)) == -1  # type: ignore[arg-type]
        monkeypatch.setattr(sys, "platform", "darwin")
        assert listen_queue_length(server) == -1


class Short:
    """A socket whose kernel knows only the first fields of struct tcp_info."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def getsockopt(self, level: int, name: int, size: int) -> bytes:
        return self.sock.getsockopt(level, name, 8)
