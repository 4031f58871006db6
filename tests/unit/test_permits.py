# SPDX-License-Identifier: Apache-2.0
"""Permits: each held by one process at a time, and returned by any death."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from service.permits import Permits

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Child

    Fork = Callable[[Callable[[], object]], Child]


def test_a_permit_that_another_process_holds_cannot_be_taken(fork: Fork) -> None:
    """While a forked child holds the only permit, the parent gets none, and does not wait for it."""
    permits = Permits("test", 1)
    child = fork(permits.try_acquire)
    assert (child.said, permits.try_acquire()) == (b"0", None)


def test_a_killed_process_returns_its_permit(fork: Fork) -> None:
    """SIGKILL leaves no time to clean up: the kernel gives the permit back."""
    permits = Permits("test", 1)
    child = fork(permits.try_acquire)
    before = permits.try_acquire()
    child.kill()
    assert (child.said, before, permits.try_acquire()) == (b"0", None, 0)


def test_a_released_permit_can_be_taken(fork: Fork) -> None:
    """A process that lives on gives its permit back by its number."""
    permits = Permits("test", 1)

    def borrow() -> tuple[int | None, None]:
        number = permits.try_acquire()
        assert number is not None
        return number, permits.release(number)

    assert (fork(borrow).said, permits.try_acquire()) == (b"(0, None)", 0)


def test_as_many_processes_as_permits_get_one(fork: Fork) -> None:
    """Of four processes that want one of three permits, three get one each and the fourth none."""
    permits = Permits("test", 3)
    children = [fork(permits.try_acquire) for _ in range(4)]
    assert [child.said for child in children] == [b"0", b"1", b"2", b"None"]
    children[1].kill()
    assert (fork(permits.try_acquire).said, permits.try_acquire()) == (b"1", None)


def test_a_permit_is_not_inherited(fork: Fork) -> None:
    """What the parent holds, its forks do not: the lock belongs to the process, not to the file."""
    permits = Permits("test", 1)
    assert permits.try_acquire() == 0
    assert (fork(permits.try_acquire).said, fork(permits.try_acquire).said) == (b"None", b"None")


def test_a_child_that_closes_its_copy_of_the_file_drops_nothing(fork: Fork) -> None:
    """Record locks vanish when their own process closes the file, not when another one does."""
    permits = Permits("test", 1)
    assert permits.try_acquire() == 0
    fork(lambda: os.close(permits._fd)).kill()
    assert fork(permits.try_acquire).said == b"None"


def test_permits_of_two_names_are_independent(fork: Fork) -> None:
    """Each set of permits is a file of its own."""
    load, roll = Permits("load", 1), Permits("roll", 1)
    fork(load.try_acquire)
    assert (load.try_acquire(), roll.try_acquire()) == (None, 0)
