# SPDX-License-Identifier: Apache-2.0
"""The fork guard on recorded files (on a real process with a fake CUDA driver: tests/process)."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from service import fork_guard
from service.errors import ForkUnsafeError


@pytest.fixture
def one_thread(tmp_path: Path) -> str:
    (tmp_path / "task" / "100").mkdir(parents=True)
    return str(tmp_path / "task")


@pytest.fixture
def no_cuda(tmp_path: Path) -> str:
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 0 08:01 1 /usr/lib/libcudart.so.13\n")
    return str(tmp_path / "maps")


def test_no_driver_mapped_is_none(no_cuda: str) -> None:
    """Without libcuda in the process there is nothing to ask; the runtime library does not count."""
    assert fork_guard.cuda_initialised(no_cuda) is None


def test_threads_are_counted() -> None:
    """The count comes from the kernel: one more while a thread runs."""
    before, release = fork_guard.thread_count(), threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    assert fork_guard.thread_count() == before + 1
    release.set()
    thread.join()


def test_clean_process_may_fork(no_cuda: str, one_thread: str) -> None:
    """One thread and no CUDA: nothing is raised."""
    fork_guard.assert_fork_safe(maps=no_cuda, task_dir=one_thread)


def test_threads_are_named(no_cuda: str, one_thread: str) -> None:
    """More than one thread is refused, with the names that Python knows and the number of others."""
    known = [thread.name for thread in threading.enumerate()]
    for thread_id in range(len(known) + 1):
        (Path(one_thread) / str(200 + thread_id)).mkdir()
    with pytest.raises(ForkUnsafeError) as caught:
        fork_guard.assert_fork_safe(maps=no_cuda, task_dir=one_thread)
    text = str(caught.value)
    assert f"{len(known) + 2} threads run here ({', '.join(known)} and 2 of C libraries" in text
    assert "\n" not in text


def test_initialised_cuda_is_refused(no_cuda: str, one_thread: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cuInit in this process is refused, with the usual suspects."""
    monkeypatch.setattr(fork_guard, "cuda_initialised", lambda maps: True)
    with pytest.raises(
        ForkUnsafeError, match=r"CUDA is initialised here \(suspects: .*forward.*; set WARMFLEET"
    ):
        fork_guard.assert_fork_safe(maps=no_cuda, task_dir=one_thread)
