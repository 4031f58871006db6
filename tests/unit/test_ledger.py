# SPDX-License-Identifier: Apache-2.0
"""The budget that all processes share: what one writes all read, and nobody reads half of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.budget import GIB, MIB, Room, WorkerCost, plan
from service.ledger import RAISE, SIZE, Ledger, Sum

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Child

    Fork = Callable[[Callable[[], object]], Child]

SMALL = Sum(WorkerCost(0, 0, 0, 50 * MIB), Room("host", 2 * GIB, 0.9))
FULL = Sum(
    cost=WorkerCost(512 * MIB, GIB, 3 * GIB, 500 * MIB),
    host=Room("host", 64 * GIB, 0.9, others=GIB, shared=GIB, source="cgroup v2 limit of /für/uns"),
    devices=(Room("GPU-0", 80 * GIB, 0.9, limit=20 * GIB), Room("MIG-ä", 10 * GIB, 0.8, others=7)),
    cores=16,
    threads=2,
    max_workers=9,
)
BYTES = st.integers(0, 1 << 50)
ROOMS = st.builds(
    Room,
    st.text(max_size=20),
    BYTES,
    st.floats(0.01, 1),
    BYTES,
    BYTES,
    st.none() | BYTES,
    st.text(max_size=20),
)
SUMS = st.builds(
    Sum,
    cost=st.builds(WorkerCost, BYTES, BYTES, BYTES, BYTES),
    host=ROOMS,
    devices=st.lists(ROOMS, max_size=4).map(tuple),
    cores=st.none() | st.integers(1, 256),
    threads=st.integers(1, 64),
    max_workers=st.none() | st.integers(1, 256),
)


def test_a_new_ledger_is_blank() -> None:
    """Before the first measurement there is no sum, and every number is 0, which stands for unknown."""
    ledger = Ledger()
    assert ledger.read() is None
    assert {getattr(ledger.numbers, name) for name, *_ in ledger.numbers._fields_} == {0}


@given(entries=st.lists(SUMS, min_size=1, max_size=3))
def test_what_was_written_last_is_read(entries: list[Sum]) -> None:
    """To the last bit, any number of times, whether it is longer or shorter than the one before."""
    ledger = Ledger()
    for entry in entries:
        ledger.write(entry)
        assert [ledger.read(), ledger.read()] == [entry, entry]


@pytest.mark.parametrize("kills", [0, 1, 3])
def test_every_oom_kill_raises_the_cost_that_is_read(kills: int) -> None:
    """Whether it came before the sum was written or after; what was written is left as it was."""
    ledger = Ledger()
    ledger.numbers.oom_kills = kills
    for entry in (SMALL, replace(SMALL, cost=replace(SMALL.cost, raised=7.0))):
        ledger.write(entry)
        assert ledger.read() == replace(SMALL, cost=replace(SMALL.cost, raised=RAISE**kills))
    text = bytes(ledger._memory)
    ledger.numbers.oom_kills = kills + 1
    found = ledger.read()
    assert found is not None
    assert found.cost.raised == RAISE ** (kills + 1)
    ledger.numbers.oom_kills = kills
    assert bytes(ledger._memory) == text


def test_a_sum_plans_with_all_it_has() -> None:
    """The plan is that of `budget.plan` with cost, memories, cores, threads and cap."""
    assert FULL.plan() == plan(
        FULL.cost, host=FULL.host, devices=FULL.devices, cores=16, threads=2, max_workers=9
    )
    assert [line.name for line in FULL.plan().constraints] == [
        "GPU-0",
        "MIG-ä",
        "host",
        "cores",
        "max_workers",
    ]


def test_a_workers_sum_is_read_by_all(fork: Fork) -> None:
    """What a fork writes, its parent reads and forks of its own read, also after the writer was killed."""
    ledger = Ledger()

    def work() -> None:
        ledger.write(FULL)
        ledger.numbers.planned = 7

    child = fork(work)
    assert (ledger.read(), ledger.numbers.planned) == (FULL, 7)
    child.kill()
    ledger.write(SMALL)
    assert fork(ledger.read).said.decode() == repr(SMALL)


def test_two_ledgers_share_nothing() -> None:
    """Each fleet has its own."""
    one, other = Ledger(), Ledger()
    one.write(FULL)
    assert other.read() is None


class WriterDies(Exception):  # noqa: N818 - no error: a kill
    """Stands for SIGKILL amid a write."""


class Halting:
    """A mapping whose writer dies with only half of the text in place."""

    def __init__(self, ledger: Ledger) -> None:
        self._memory = ledger._memory

    def __setitem__(self, place: slice, text: bytes) -> None:
        half = len(text) // 2
        self._memory[place.start : place.start + half] = text[:half]
        raise WriterDies


def die_amid_a_write(ledger: Ledger, entry: Sum) -> None:
    memory = ledger._memory
    ledger._memory = Halting(ledger)  # type: ignore[assignment]
    with pytest.raises(WriterDies):
        ledger.write(entry)
    ledger._memory = memory


@pytest.mark.parametrize("before", [None, SMALL, FULL])
def test_a_torn_write_is_no_sum(before: Sum | None) -> None:
    """Half of one sum over another is never read, nor is an error raised: it is as if there were none."""
    ledger = Ledger()
    if before is not None:
        ledger.write(before)
    die_amid_a_write(ledger, replace(FULL, max_workers=3))
    assert ledger.read() is None


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_the_next_writer_mends_it(deaths: int) -> None:
    """However many writers died in a row, a whole write is read, and a torn one after it is not."""
    ledger = Ledger()
    for _ in range(deaths):
        die_amid_a_write(ledger, FULL)
    ledger.write(SMALL)
    assert ledger.read() == SMALL
    die_amid_a_write(ledger, FULL)
    assert ledger.read() is None


def test_a_write_during_a_read_is_read_whole() -> None:
    """A reader that finds another version behind the text than before it reads again."""
    ledger = Ledger()
    ledger.write(FULL)
    memory, looks = ledger._memory, []

    class Changing:
        def __getitem__(self, place: slice) -> bytes:
            text = memory[place]
            looks.append(text)
            if len(looks) == 1:
                ledger._memory = memory
                ledger.write(SMALL)
                ledger._memory = self  # type: ignore[assignment]
            return text

    ledger._memory = Changing()  # type: ignore[assignment]
    assert (ledger.read(), len(looks)) == (SMALL, 2)


def test_a_sum_that_is_too_long_is_refused_whole() -> None:
    """As many devices as no machine has: an error, and the sum before it stays."""
    ledger = Ledger()
    ledger.write(FULL)
    room = Room("GPU-" + "0" * 36, 80 * GIB, 0.9)
    with pytest.raises(ValueError, match=f"1000 devices is longer than {SIZE} bytes"):
        ledger.write(replace(FULL, devices=(room,) * 1000))
    assert ledger.read() == FULL


def test_there_is_room_for_the_largest_machines() -> None:
    """16 GPUs of seven MIG instances each, under long names: 112 devices."""
    room = Room("MIG-" + "é" * 60, (1 << 50) - 1, 0.123456789, others=(1 << 50) - 1, limit=(1 << 50) - 1)
    ledger = Ledger()
    ledger.write(replace(FULL, devices=(room,) * 112))
    found = ledger.read()
    assert found is not None
    assert found.devices == (room,) * 112


def test_a_sum_never_spills_into_the_numbers() -> None:
    """The numbers lie before the text, and keep what they say."""
    ledger = Ledger()
    numbers = ledger.numbers
    names = [name for name, *_ in numbers._fields_[2:]]
    for value, name in enumerate(names, 1):
        setattr(numbers, name, value)
    ledger.write(FULL)
    assert [getattr(numbers, name) for name in names] == list(range(1, len(names) + 1))
