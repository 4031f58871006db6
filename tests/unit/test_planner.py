# SPDX-License-Identifier: Apache-2.0
"""From what one worker measured to the number that shall run, on machines that a test makes up.

Unless a test says otherwise: a host of 10 GiB, of which 9 may be used and 2 are; 1 GiB of these is the
arbiter's, and each worker has 100 MiB of its own. Beside one worker others have 2048 - 1024 - 100 = 924 MiB,
so workers may have 9216 - 924 - 1024 = 7268 MiB. One with 300 MiB of its own takes 1.1 * 300 + 64 = 394.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from households import GONE, Device, Machine, cpu_cost, fleet_of, put, reading

from service import planner
from service.backends.base import DeviceMemory
from service.budget import GIB, MIB, Plan, Room, WorkerCost
from service.cgroups import HostReading
from service.errors import BudgetError
from service.ledger import Sum
from service.lifecycle import State
from service.manifest import Manifest
from service.planner import (
    fence_first,
    foresee,
    learn_from_oom,
    outgrown,
    settle,
    share_of,
)
from service.rooms import Before, context_of, cost_of
from service.settings import MOST_WORKERS

if TYPE_CHECKING:
    from service.fleet import Fleet

A, B = "GPU-a", "GPU-b"
CHEAP, USUAL, DEAR = cpu_cost(200 * MIB), cpu_cost(300 * MIB), cpu_cost(600 * MIB)
READY, WARMING = State.READY, State.WARMING
ON_GPU = WorkerCost(context=GIB // 2, weights=2 * GIB, batch=4 * GIB, host=300 * MIB)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine().install(monkeypatch)


def numbers(fleet: Fleet) -> tuple[int, int]:
    """Return what is planned and what fits."""
    return fleet.ledger.numbers.planned, fleet.ledger.numbers.fits


def sum_of(fleet: Fleet) -> Sum:
    found = fleet.ledger.read()
    assert found is not None
    return found


def device(
    total: int = 80 * GIB, free: int = 70 * GIB, reserved: int = 7 * GIB, peak: int = 8 * GIB
) -> DeviceMemory:
    return DeviceMemory(6 * GIB, reserved, 7 * GIB, peak, free, total)


# ---------------------------------------------------------------------------------------------
# What a worker costs


def test_on_a_cpu_a_worker_costs_its_private_pages(machine: Machine) -> None:
    """There is no device; the peak of the pages that are its own is all there is to count."""
    fleet = fleet_of(1)
    put(fleet, 0, WARMING)
    machine.peak = 321 * MIB
    before = Before.load(fleet, 0)
    assert (before, machine.asked) == (Before(0, 0), [])
    assert cost_of(fleet, 0, Device(), before, 0) == cpu_cost(321 * MIB)  # type: ignore[arg-type]


def test_on_a_gpu_the_context_is_what_its_allocator_does_not_know(machine: Machine) -> None:
    """80 - 60 = 20 GiB are used, 12 of them before, 7 reserved: 1 GiB is the context, and is kept."""
    fleet = fleet_of(2, (A, B))
    put(fleet, 1, WARMING)
    machine.gpus, machine.peak = {B: reading(80 * GIB, 12 * GIB)}, 300 * MIB
    before = Before.load(fleet, 1)
    assert (before, machine.asked) == (Before(12 * GIB, 12 * GIB), [[B]])
    found = cost_of(fleet, 1, Device(device(free=60 * GIB)), before, 2 * GIB)  # type: ignore[arg-type]
    assert found == WorkerCost(context=GIB, weights=2 * GIB, batch=6 * GIB, host=300 * MIB)
    assert fleet.board.record(1).memory_bytes == {"device_context": GIB}


def test_what_its_siblings_hold_is_in_use_and_not_others(machine: Machine) -> None:
    """Of 12 GiB on the device the one neighbour there has 9, by its own figures: 3 are others'."""
    fleet = fleet_of(4, (A, B))
    for slot in range(3):  # a, b, a
        put(fleet, slot, READY)
        fleet.board.note_memory(slot, device_reserved=8 * GIB, device_context=GIB, device_peak=50 * GIB)
    machine.gpus = {A: reading(80 * GIB, 12 * GIB)}
    assert Before.load(fleet, 0) == Before(12 * GIB, 3 * GIB)


@pytest.mark.parametrize(("used", "context"), [(None, 4 * GIB), (3 * GIB, GIB)])
def test_without_a_reading_what_was_in_use_at_the_start_still_is(
    machine: Machine, used: int | None, context: int
) -> None:
    """20 GiB are used, 9 by the neighbour, 7 reserved, as many by others as before the first fork."""
    fleet = fleet_of(4, (A, B), readings={} if used is None else {A: reading(80 * GIB, used)})
    for slot in range(3):  # a, b, a
        put(fleet, slot, READY)
        fleet.board.note_memory(slot, device_reserved=8 * GIB, device_context=GIB, device_peak=50 * GIB)
    before = Before.load(fleet, 0)
    assert before == Before(9 * GIB + (used or 0), used or 0)
    assert context_of(device(free=60 * GIB), before) == context
    assert cost_of(fleet, 0, Device(device(free=60 * GIB)), before, GIB).context == context  # type: ignore[arg-type]


def test_a_driver_that_counts_late_makes_nobody_negative(machine: Machine) -> None:
    """NVML says less than the siblings hold: others have nothing."""
    fleet = fleet_of("auto", (A,))
    for slot in (0, 1):
        put(fleet, slot, WARMING)
    fleet.board.note_memory(1, device_reserved=8 * GIB)
    machine.gpus = {A: reading(80 * GIB, GIB)}
    assert Before.load(fleet, 0) == Before(GIB, 0)


def test_no_part_of_a_cost_is_below_nothing(machine: Machine) -> None:
    """A neighbour that left meanwhile, or a peak below the weights, makes no cost negative."""
    fleet = fleet_of(1, (A,))
    put(fleet, 0, WARMING)
    found = cost_of(fleet, 0, Device(device(peak=GIB)), Before(40 * GIB, 40 * GIB), 2 * GIB)  # type: ignore[arg-type]
    assert (found.context, found.batch) == (0, 0)


# ---------------------------------------------------------------------------------------------
# The sum


def test_the_first_worker_writes_the_sum(machine: Machine) -> None:
    """`auto`: 7268 / 394 = 18 fit and are planned, in the ledger for all."""
    fleet = fleet_of("auto", cores=64)
    put(fleet, 0, WARMING)
    found = settle(fleet, 0, USUAL, None, 0)
    room = Room("host", 10 * GIB, 0.9, others=924 * MIB, shared=GIB, source="RAM")
    assert sum_of(fleet) == Sum(USUAL, room, (), cores=64, threads=1, max_workers=None)
    assert (found, numbers(fleet)) == (sum_of(fleet).plan(), (18, 18))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"workers": "auto", "cores": 4}, (4, 4), id="auto: the cores count"),
        pytest.param({"workers": "auto", "max_workers": 3}, (3, 3), id="auto: so does the cap"),
        pytest.param({"workers": 6, "cores": 4}, (6, 18), id="a number: the cores are the user's affair"),
        pytest.param({"workers": 30, "cores": 4}, (18, 18), id="a number that does not fit"),
        pytest.param({"workers": 30, "budget_policy": "warn"}, (30, 18), id="is only told"),
    ],
)
def test_what_is_planned_follows_from_the_setting(
    machine: Machine, settings: dict[str, Any], expected: tuple[int, int]
) -> None:
    """`auto` runs what fits by memory, cores and cap; a number runs as it is, as far as memory goes."""
    fleet = fleet_of(**settings)
    put(fleet, 0, WARMING)
    settle(fleet, 0, USUAL, None, 0)
    assert numbers(fleet) == expected


def test_auto_wants_no_more_than_a_table_has_rows(machine: Machine) -> None:
    """However much memory there is: more fit, and are not wanted."""
    machine.host = HostReading(1024 * GIB, "RAM", 2 * GIB)
    fleet = fleet_of("auto", cores=4096)
    put(fleet, 0, WARMING)
    found = settle(fleet, 0, USUAL, None, 0)
    assert found.fits > MOST_WORKERS
    assert numbers(fleet) == (MOST_WORKERS, found.fits)


@pytest.mark.parametrize("cost", [CHEAP, USUAL, cpu_cost(305 * MIB)])
def test_a_worker_that_is_cheaper_or_much_the_same_changes_nothing(
    machine: Machine, cost: WorkerCost
) -> None:
    """Neither sum nor plan: the first one's figures stay to the byte, and nothing is read anew."""
    fleet = fleet_of("auto", cores=64)
    put(fleet, 0, READY)
    settle(fleet, 0, USUAL, None, 0)
    before = sum_of(fleet)
    machine.host = HostReading(GIB, "RAM", GIB)
    put(fleet, 1, WARMING)
    found = settle(fleet, 1, cost, None, 0)
    assert (found, sum_of(fleet), numbers(fleet)) == (before.plan(), before, (18, 18))


def test_a_dearer_worker_raises_the_cost_and_shrinks_the_plan(machine: Machine) -> None:
    """660 + 64 = 724 MiB. Two workers' pages are not others': 2048 - 1024 - 200; 7368 / 724 = 10."""
    fleet = fleet_of("auto", cores=64)
    put(fleet, 0, READY)
    settle(fleet, 0, USUAL, None, 0)
    put(fleet, 1, WARMING)
    settle(fleet, 1, DEAR, None, 0)
    assert (sum_of(fleet).cost, sum_of(fleet).host.others) == (DEAR, 824 * MIB)
    assert numbers(fleet) == (10, 10)


def test_of_two_workers_each_part_counts_at_its_dearest(machine: Machine) -> None:
    """A worker that is dearer on its device alone leaves the host's part as it was."""
    fleet = fleet_of("auto", (A,), cores=64)
    put(fleet, 0, READY)
    settle(fleet, 0, ON_GPU, device(), 0)
    put(fleet, 1, WARMING)
    settle(fleet, 1, replace(ON_GPU, context=0, batch=5 * GIB, host=MIB), device(), 0)
    assert sum_of(fleet).cost == replace(ON_GPU, batch=5 * GIB)


def test_a_plan_that_a_person_has_cut_is_not_raised_again(machine: Machine) -> None:
    """TTOU has ended the growth at three; a respawn that measures anew leaves it so."""
    fleet = fleet_of("auto", cores=64)
    put(fleet, 0, READY)
    settle(fleet, 0, USUAL, None, 0)
    fleet.ledger.numbers.planned = fleet.board.header.target = 3
    put(fleet, 1, WARMING)
    settle(fleet, 1, replace(USUAL, host=320 * MIB), None, 0)
    assert numbers(fleet) == (3, 17)


def test_processes_that_are_gone_and_cgroups_that_count_less_are_no_error(machine: Machine) -> None:
    """Readings are of different moments: what others use is never below nothing."""
    machine.host = HostReading(10 * GIB, "RAM", 0)
    fleet = fleet_of("auto", cores=64)
    put(fleet, 0, READY)
    fleet.board.rows[0].pid = GONE
    settle(fleet, 0, USUAL, None, 0)
    assert sum_of(fleet).host.others == 0


# ---------------------------------------------------------------------------------------------
# Refusal


@pytest.mark.parametrize("workers", [30, "auto"])
def test_a_service_of_which_no_worker_fits_is_refused_where_asked_for(
    machine: Machine, workers: int | str
) -> None:
    """A worker of 8 GiB where 7 are: refused with the sum, whatever number is wanted."""
    fleet = fleet_of(workers, budget_policy="refuse")
    put(fleet, 0, WARMING)
    with pytest.raises(BudgetError) as caught:
        settle(fleet, 0, cpu_cost(8 * GIB), None, 0)
    text = f"{1 if workers == 'auto' else 30} workers are wanted, 0 fit: host: 10.00 GiB * 0.9"
    assert str(caught.value).startswith(text)
    assert numbers(fleet) == (0, 1)


@pytest.mark.parametrize("workers", [30, "auto"])
def test_else_one_runs_where_none_fits(
    machine: Machine, workers: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is there, and works; the log has the sum."""
    fleet = fleet_of(workers)
    put(fleet, 0, WARMING)
    with caplog.at_level(logging.WARNING):
        settle(fleet, 0, cpu_cost(8 * GIB), None, 0)
    assert numbers(fleet) == (1, 1)
    assert "workers are wanted, 0 fit: host: 10.00 GiB * 0.9" in caplog.text
    assert caplog.text.rstrip().endswith("one runs all the same")


def test_with_warn_as_many_run_as_are_wanted_where_none_fits(machine: Machine) -> None:
    """Who wants no more than a warning gets no more."""
    for workers, planned in (("auto", 1), (5, 5)):
        fleet = fleet_of(workers, budget_policy="warn")
        put(fleet, 0, WARMING)
        settle(fleet, 0, cpu_cost(8 * GIB), None, 0)
        assert numbers(fleet) == (planned, 1)


def test_refuse_ends_a_start_with_too_many(machine: Machine) -> None:
    """Nothing was ready yet: 30 are wanted, 18 fit, and the person shall decide. All workers say the same."""
    fleet = fleet_of(30, budget_policy="refuse")
    for slot in (0, 1):
        put(fleet, slot, WARMING)
        with pytest.raises(BudgetError, match=r"30 workers are wanted, 18 fit: .*; give more memory"):
            settle(fleet, slot, USUAL, None, 0)
    assert fleet.plan_permit.try_acquire() is not None


def test_refuse_lets_what_fits_start(machine: Machine) -> None:
    """18 of 18."""
    fleet = fleet_of(18, budget_policy="refuse")
    put(fleet, 0, WARMING)
    settle(fleet, 0, USUAL, None, 0)
    assert numbers(fleet) == (18, 18)


def test_a_service_that_serves_is_not_refused_but_shrinks(machine: Machine) -> None:
    """With `refuse`, a worker that turns out dearer later costs the fleet workers, and not its life."""
    fleet = fleet_of(12, budget_policy="refuse")
    put(fleet, 0, READY)
    settle(fleet, 0, USUAL, None, 0)
    assert numbers(fleet) == (12, 18)
    put(fleet, 1, WARMING)
    settle(fleet, 1, DEAR, None, 0)
    assert numbers(fleet) == (10, 10)


@pytest.mark.parametrize("policy", ["clamp", "refuse"])
def test_one_worker_runs_on_when_not_even_that_fits_any_more(
    machine: Machine, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A service that was ready and now fits nowhere would else respawn its last worker for ever."""
    fleet = fleet_of(2, budget_policy=policy)
    put(fleet, 0, READY)
    settle(fleet, 0, USUAL, None, 0)
    with caplog.at_level(logging.WARNING):
        settle(fleet, 0, cpu_cost(8 * GIB), None, 0)
    assert numbers(fleet) == (1, 1)
    assert "2 workers are wanted, 0 fit" in caplog.text
    assert caplog.text.rstrip().endswith("one runs all the same")


def test_what_is_clamped_is_told_once(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """The second worker that measures the same has nothing new to say."""
    fleet = fleet_of(30)
    with caplog.at_level(logging.WARNING):
        for slot in (0, 1):
            put(fleet, slot, WARMING)
            settle(fleet, slot, USUAL, None, 0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.text.count("30 workers are wanted, 18 fit") == 1


# ---------------------------------------------------------------------------------------------
# After an OOM kill


def test_an_oom_kill_raises_the_cost_and_shrinks_the_plan(machine: Machine) -> None:
    """394 * 1.1 = 433.4 MiB: 7268 / 433.4 = 16.8. Again: 476.7, 15.2."""
    fleet = fleet_of("auto", cores=64)
    put(fleet, 0, READY)
    settle(fleet, 0, USUAL, None, 0)
    found = []
    for _ in range(2):
        learn_from_oom(fleet, 1)
        found.append((sum_of(fleet).cost.raised, *numbers(fleet), fleet.ledger.numbers.oom_kills))
    assert found == [(pytest.approx(1.1), 16, 16, 1), (pytest.approx(1.21), 15, 15, 2)]


def test_what_a_kill_has_taught_is_not_forgotten_by_a_new_measurement(machine: Machine) -> None:
    """A dearer worker later raises the measured part; the factor stays. As dear as known is not dearer."""
    fleet = fleet_of("auto", cores=64)
    put(fleet, 0, READY)
    settle(fleet, 0, USUAL, None, 0)
    learn_from_oom(fleet, 1)
    settle(fleet, 0, replace(USUAL, host=330 * MIB), None, 0)
    assert sum_of(fleet).cost == replace(USUAL, raised=1.1)
    settle(fleet, 0, DEAR, None, 0)
    assert sum_of(fleet).cost == replace(DEAR, raised=1.1)


def test_kills_that_came_at_once_all_count(machine: Machine) -> None:
    """The kernel has killed three since the arbiter looked: 394 * 1.331 = 524.4, 13.9."""
    fleet = fleet_of("auto", cores=64)
    put(fleet, 0, READY)
    settle(fleet, 0, USUAL, None, 0)
    learn_from_oom(fleet, 3)
    assert (sum_of(fleet).cost.raised, *numbers(fleet)) == (pytest.approx(1.331), 13, 13)


def test_kills_never_take_the_last_worker(machine: Machine) -> None:
    """However often it happens, one is planned, and may boot."""
    fleet = fleet_of(1)
    put(fleet, 0, READY)
    settle(fleet, 0, cpu_cost(6 * GIB), None, 0)
    assert numbers(fleet) == (1, 1)
    for _ in range(5):
        learn_from_oom(fleet, 1)
        assert numbers(fleet) == (1, 1)
    settle(fleet, 0, cpu_cost(6 * GIB), None, 0)
    assert (sum_of(fleet).plan().fits, numbers(fleet)) == (0, (1, 1))


def test_a_kill_before_the_first_measurement_counts_with_it(machine: Machine) -> None:
    """There is no cost to raise yet; who measures first finds the kill counted: 7268 / 433.4 = 16."""
    fleet = fleet_of("auto", cores=64)
    learn_from_oom(fleet, 1)
    assert (fleet.ledger.read(), numbers(fleet), fleet.ledger.numbers.oom_kills) == (None, (0, 0), 1)
    put(fleet, 0, WARMING)
    found = settle(fleet, 0, USUAL, None, 0)
    assert (found, numbers(fleet)) == (sum_of(fleet).plan(), (16, 16))


# ---------------------------------------------------------------------------------------------
# By the last boot


def manifest(cost: WorkerCost, **others: Any) -> Manifest:
    fields: dict[str, Any] = {
        "written_at": "2026-01-01T00:00:00+00:00",
        "key": {},
        "stage_seconds": {},
        "boot_seconds": 1.0,
        "shapes": (),
        "max_batch_tokens": 512,
        "workers": 1,
    }
    return Manifest(cost=cost, **fields | others)


@pytest.mark.parametrize(
    ("settings", "started", "planned"),
    [
        pytest.param({"workers": "auto"}, 18, 18, id="auto starts all that fit at once"),
        pytest.param({"workers": "auto", "max_workers": 5}, 5, 5, id="as far as the cap"),
        pytest.param({"workers": "auto", "cores": 3}, 3, 3, id="or the cores"),
        pytest.param({"workers": 7}, 7, 7, id="a number that fits"),
        pytest.param({"workers": 30}, 18, 18, id="a number that does not"),
        pytest.param({"workers": 30, "budget_policy": "warn"}, 30, 30, id="is started if only told"),
    ],
)
def test_the_next_boot_starts_what_will_fit(
    machine: Machine, settings: dict[str, Any], started: int, planned: int
) -> None:
    """Of 9216 MiB others have 1024 and the arbiter as many: 7168 / 394 = 18, before any worker was forked."""
    fleet = fleet_of(**{"cores": 64} | settings)
    assert foresee(fleet, manifest(USUAL)) == started
    assert (numbers(fleet), sum_of(fleet).cost) == ((planned, sum_of(fleet).plan().fits), USUAL)


@pytest.mark.parametrize(
    ("workers", "cost", "started"),
    [(30, USUAL, 30), (30, cpu_cost(8 * GIB), 30), ("auto", cpu_cost(8 * GIB), 1)],
)
def test_what_the_last_boot_would_refuse_is_measured_anew(
    machine: Machine, workers: int | str, cost: WorkerCost, started: int
) -> None:
    """A manifest alone refuses nobody: perhaps a worker needs less now, and the sum is then said by it."""
    fleet = fleet_of(workers, budget_policy="refuse")
    assert foresee(fleet, manifest(cost)) == started
    assert (fleet.ledger.read(), numbers(fleet), fleet.ledger.numbers.foreseen) == (None, (0, 0), 0)


def test_by_a_last_boot_of_which_none_fits_one_starts(machine: Machine) -> None:
    """As a measurement would have it."""
    fleet = fleet_of(30)
    assert (foresee(fleet, manifest(cpu_cost(8 * GIB))), numbers(fleet)) == (1, (1, 1))


def test_what_oom_kills_taught_the_last_boot_is_its_own_affair(machine: Machine) -> None:
    """Nobody was killed in this one."""
    fleet = fleet_of("auto", cores=64)
    assert foresee(fleet, manifest(replace(USUAL, raised=2.0))) == 18
    assert sum_of(fleet).cost == USUAL


def test_on_gpus_the_next_boot_counts_what_others_use_now(machine: Machine) -> None:
    """72 - 30 GiB at 0.5 + 6 + 0.3 = 6.8 hold 6; the other card 10: 16 in all. The limit caps each at 2."""
    gpus = {A: reading(80 * GIB, 30 * GIB), B: reading(80 * GIB, 0)}
    machine.host = HostReading(1024 * GIB, "RAM", 2 * GIB)
    fleet = fleet_of("auto", (A, B), cores=1, readings=gpus)
    assert foresee(fleet, manifest(ON_GPU)) == 16
    assert sum_of(fleet).plan().by_device == {A: 6, B: 10}
    capped = fleet_of("auto", (A, B), gpu_memory_limit="15GiB", readings=gpus)
    assert foresee(capped, manifest(ON_GPU)) == 4
    assert machine.asked == []


@pytest.mark.parametrize(("workers", "started"), [("auto", 1), (5, 5)])
def test_a_gpu_of_which_nobody_tells_is_measured_anew(
    machine: Machine, workers: int | str, started: int
) -> None:
    """Without a reading of every device the last boot's figures say nothing about this one's room."""
    fleet = fleet_of(workers, (A, B), readings={A: reading(80 * GIB, 0)})
    assert (foresee(fleet, manifest(ON_GPU)), fleet.ledger.read(), numbers(fleet)) == (started, None, (0, 0))


def test_workers_that_measure_more_than_foreseen_shrink_the_plan(machine: Machine) -> None:
    """The last boot is a hint; what is measured now counts."""
    fleet = fleet_of("auto", cores=64)
    fleet.aim(foresee(fleet, manifest(USUAL)))
    put(fleet, 0, WARMING)
    settle(fleet, 0, DEAR, None, 0)
    assert numbers(fleet) == (10, 10)


@pytest.mark.parametrize("cost", [CHEAP, USUAL, DEAR])
def test_the_first_measurement_takes_the_place_of_what_was_foreseen(
    machine: Machine, cost: WorkerCost
) -> None:
    """Dearer or cheaper; from then on only a dearer worker corrects it."""
    fleet = fleet_of("auto", cores=64)
    fleet.aim(foresee(fleet, manifest(USUAL)))
    assert fleet.ledger.numbers.foreseen == 1
    put(fleet, 0, WARMING)
    settle(fleet, 0, cost, None, 0)
    assert (sum_of(fleet).cost, fleet.ledger.numbers.foreseen) == (cost, 0)
    assert fleet.ledger.numbers.fits == sum_of(fleet).plan().fits
    put(fleet, 1, WARMING)
    settle(fleet, 1, cpu_cost(150 * MIB), None, 0)
    assert sum_of(fleet).cost == cost
    settle(fleet, 1, cpu_cost(700 * MIB), None, 0)
    assert sum_of(fleet).cost == cpu_cost(700 * MIB)


def test_a_kill_amid_the_boot_is_not_forgotten_by_the_first_measurement(machine: Machine) -> None:
    """Foreseen, killed, measured: 7268 / 433.4 = 16 fit, in the numbers as in the sum."""
    fleet = fleet_of("auto", cores=64)
    fleet.aim(foresee(fleet, manifest(USUAL)))
    learn_from_oom(fleet, 1)
    put(fleet, 0, WARMING)
    settle(fleet, 0, USUAL, None, 0)
    assert (sum_of(fleet).plan().fits, numbers(fleet)) == (16, (16, 16))


# ---------------------------------------------------------------------------------------------
# Devices


def others_of(fleet: Fleet) -> list[float]:
    """Return the GiB of others on each device."""
    return [room.others / GIB for room in sum_of(fleet).devices]


def test_a_worker_tells_of_its_own_device_and_the_rest_is_as_seen_last(machine: Machine) -> None:
    """Before the first fork 2 and 3 GiB were in use; then each worker corrects its own device's."""
    fleet = fleet_of("auto", (A, B), readings={A: reading(80 * GIB, 2 * GIB), B: reading(40 * GIB, 3 * GIB)})
    put(fleet, 0, WARMING)
    settle(fleet, 0, ON_GPU, device(), 5 * GIB)
    assert sum_of(fleet).devices == (
        Room(A, 80 * GIB, 0.9, others=5 * GIB),
        Room(B, 40 * GIB, 0.9, others=3 * GIB),
    )
    assert sum_of(fleet).cores is None
    put(fleet, 1, WARMING)
    settle(fleet, 1, ON_GPU, device(total=40 * GIB), GIB)
    assert others_of(fleet) == [5, 1]
    settle(fleet, 0, ON_GPU, device(), 9 * GIB)
    assert others_of(fleet) == [9, 1]
    assert machine.asked == []


def test_what_others_of_a_device_use_may_waver(machine: Machine) -> None:
    """64 MiB more or less than known are noise; beyond that the plan follows, in both directions."""
    machine.host = HostReading(1024 * GIB, "RAM", 2 * GIB)
    fleet = fleet_of("auto", (A,))
    put(fleet, 0, WARMING)
    found = []
    for others in (GIB, GIB + 64 * MIB, GIB + 65 * MIB, 30 * GIB, 0):
        settle(fleet, 0, ON_GPU, device(), others)
        found.append((sum_of(fleet).devices[0].others, fleet.ledger.numbers.fits))
    assert found == [(GIB, 10), (GIB, 10), (GIB + 65 * MIB, 10), (30 * GIB, 6), (0, 10)]


def test_what_others_gave_back_meanwhile_is_no_reason_to_forget_the_dearest(machine: Machine) -> None:
    """A cheaper worker on a device that has moved: the room is new, the cost is not."""
    fleet = fleet_of("auto", (A,))
    put(fleet, 0, WARMING)
    settle(fleet, 0, ON_GPU, device(), 30 * GIB)
    settle(fleet, 0, replace(ON_GPU, batch=GIB), device(), 0)
    assert (sum_of(fleet).cost, others_of(fleet)) == (ON_GPU, [0])


def test_a_device_of_which_nobody_tells_is_like_this_ones(machine: Machine) -> None:
    """As large as CUDA says of the own device, and free; the limit holds there too."""
    fleet = fleet_of("auto", (A, B), gpu_memory_limit="20GiB", gpu_memory_utilization=0.5)
    put(fleet, 0, WARMING)
    settle(fleet, 0, ON_GPU, device(total=48 * GIB), 0)
    assert sum_of(fleet).devices == tuple(Room(name, 48 * GIB, 0.5, limit=20 * GIB) for name in (A, B))


@pytest.mark.parametrize("read", [True, False], ids=["read before the fork", "not read"])
@pytest.mark.parametrize("foreseen", [True, False], ids=["foreseen", "anew"])
def test_siblings_that_load_on_other_devices_are_not_others(
    machine: Machine, *, read: bool, foreseen: bool
) -> None:
    """Four GPUs, each with a worker that has 42 of 80 GiB and is not measured yet: four fit, not one."""
    tokens = ("GPU-0", "GPU-1", "GPU-2", "GPU-3")
    idle = {token: reading(80 * GIB, 0) for token in tokens}
    machine.host = HostReading(1024 * GIB, "RAM", 2 * GIB)
    machine.gpus = dict(idle)
    cost = WorkerCost(context=GIB // 2, weights=20 * GIB, batch=20 * GIB, host=300 * MIB)
    fleet = fleet_of("auto", tokens, readings=idle if read else {})
    if foreseen:
        fleet.aim(foresee(fleet, manifest(cost)))
    before = {}
    for slot in range(4):
        put(fleet, slot, WARMING)
        before[slot] = Before.load(fleet, slot)
    assert set(before.values()) == {Before(0, 0)}
    machine.gpus = {token: reading(80 * GIB, 42 * GIB) for token in tokens}
    for slot in (2, 0, 3, 1):
        found = settle(fleet, slot, cost, device(free=38 * GIB, reserved=41 * GIB), before[slot].others)
        assert (found.fits, numbers(fleet), others_of(fleet)) == (4, (4, 4), [0] * 4)


# ---------------------------------------------------------------------------------------------
# Shares


def gpu_plan(fleet: Fleet, cost: WorkerCost, **room: Any) -> Plan:
    entry = Sum(
        cost, Room("host", 1024 * GIB, 0.9), (Room(A, **{"total": 80 * GIB, "utilization": 0.9} | room),)
    )
    fleet.ledger.write(entry)
    return entry.plan()


def test_a_worker_may_allocate_its_part_of_the_device(machine: Machine) -> None:
    """72 GiB for 10 workers are 7.2 each, of which its context is not torch's to give: 6.7."""
    fleet = fleet_of("auto", (A,))
    put(fleet, 0, WARMING)
    found = gpu_plan(fleet, ON_GPU)
    share = share_of(fleet, 0, found)
    assert (found.fits, share) == (10, pytest.approx(6.7 * GIB, rel=1e-6))
    assert share is not None
    assert share >= ON_GPU.weights + ON_GPU.batch


def test_where_there_is_no_sum_for_a_device_there_is_no_share(machine: Machine) -> None:
    """On a CPU, on a device that holds no worker, and on one of which nobody knows."""
    cpu = fleet_of("auto")
    put(cpu, 0, WARMING)
    assert share_of(cpu, 0, settle(cpu, 0, USUAL, None, 0)) is None
    gpu = fleet_of("auto", (A, B))
    for slot in (0, 1):
        put(gpu, slot, WARMING)
    assert share_of(gpu, 0, gpu_plan(gpu, ON_GPU, total=4 * GIB)) is None
    assert share_of(gpu, 1, gpu_plan(gpu, ON_GPU)) is None


def test_the_fence_stands_before_the_first_batch(machine: Machine) -> None:
    """A later worker has its share, the first one what the budget leaves beside its context."""
    fleet = fleet_of("auto", (A,))
    put(fleet, 0, WARMING)
    backend = Device(device(total=80 * GIB, free=60 * GIB, reserved=7 * GIB))
    fence_first(fleet, 0, backend, Before(12 * GIB, 12 * GIB))  # type: ignore[arg-type]  # context 1, others 12 of 72
    gpu_plan(fleet, ON_GPU)
    fence_first(fleet, 0, backend, Before(12 * GIB, 12 * GIB))  # type: ignore[arg-type]
    assert backend.fences == [59 * GIB, pytest.approx(6.7 * GIB, rel=1e-6)]


def test_the_first_fence_knows_the_neighbours_and_the_limit(machine: Machine) -> None:
    """Without a reading: 20 used, 9 by a neighbour, 7 reserved, so 4 context; at most 10: 6 are left."""
    fleet = fleet_of("auto", (A,), gpu_memory_limit="10GiB")
    for slot in (0, 1):
        put(fleet, slot, WARMING)
    fleet.board.note_memory(1, device_reserved=8 * GIB, device_context=GIB)
    backend = Device(device(free=60 * GIB))
    fence_first(fleet, 0, backend, Before.load(fleet, 0))  # type: ignore[arg-type]
    assert backend.fences == [6 * GIB]


def test_a_full_device_is_fenced_at_nothing_and_a_cpu_not_at_all(machine: Machine) -> None:
    """No fence is below 0 bytes; without a device there is nothing to fence."""
    fleet = fleet_of("auto", (A,))
    put(fleet, 0, WARMING)
    full, none = Device(device(free=GIB, reserved=GIB)), Device()
    fence_first(fleet, 0, full, Before(77 * GIB, 77 * GIB))  # type: ignore[arg-type]
    fence_first(fleet, 0, none, Before())  # type: ignore[arg-type]
    assert (full.fences, none.fences) == ([0], [])


def grown(mine: int, *others: int, planned: int = 4, **settings: Any) -> str:
    """Return what is said of worker 0 of so many MiB, in a fleet that has 7268 MiB for workers."""
    fleet = fleet_of("auto", cores=64, **settings)
    put(fleet, 0, READY)
    settle(fleet, 0, USUAL, None, 0)
    fleet.ledger.numbers.planned = planned
    for slot, size in enumerate((mine, *others)):
        put(fleet, slot, READY)
        fleet.board.note_memory(slot, uss=size * MIB)
    return outgrown(fleet, 0)


@pytest.mark.parametrize(
    ("sizes", "planned"),
    [
        pytest.param((7268,), 4, id="far beyond its part, where there is room"),
        pytest.param((1818, 1817, 1817, 1816), 4, id="all have just what there is"),
        pytest.param((1817, 1817, 1817, 9000), 4, id="another is the one that has grown"),
        pytest.param((400, 9000), 18, id="within the part of one of eighteen"),
    ],
)
def test_a_worker_that_hurts_nobody_may_grow(machine: Machine, sizes: tuple[int, ...], planned: int) -> None:
    """7268 MiB are 1817 each for 4, and 403 for 18."""
    assert grown(*sizes, planned=planned) == ""


def test_a_worker_has_outgrown_its_part_when_the_fleet_has_too_much(machine: Machine) -> None:
    """One MiB more than its part, and one more than there are; where that is only told, it stays."""
    text = (
        "it has grown to 1.78 GiB of private memory, its part is 1.77 GiB, "
        "and all workers together have more than the 7.10 GiB there are for them"
    )
    assert grown(1818, 1817, 1817, 1817) == text
    assert grown(1818, 1817, 1817, 1817, budget_policy="refuse") == text
    assert grown(1818, 1817, 1817, 1817, budget_policy="warn") == ""


def test_before_anything_is_planned_nobody_has_outgrown_it(machine: Machine) -> None:
    """There is no part to exceed; nor has a worker that has not measured itself grown."""
    fleet = fleet_of("auto", cores=64)
    put(fleet, 0, READY)
    fleet.board.note_memory(0, uss=1 << 50)
    assert outgrown(fleet, 0) == ""
    put(fleet, 1, READY)
    settle(fleet, 0, USUAL, None, 0)
    assert outgrown(fleet, 0) != ""
    assert outgrown(fleet, 1) == ""
    fleet.ledger.numbers.planned = 0
    assert outgrown(fleet, 0) == ""


def test_two_workers_that_are_warm_at_once_settle_one_after_another(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another holds the plan permit a worker waits; it is given back, whatever happened."""
    fleet = fleet_of("auto", cores=64, budget_policy="refuse")
    put(fleet, 0, WARMING)
    answers, naps = [None, None, 0], []
    given: list[int] = []
    permit: Any = fleet.plan_permit
    monkeypatch.setattr(permit, "try_acquire", lambda: answers.pop(0))
    monkeypatch.setattr(permit, "release", given.append)
    monkeypatch.setattr(planner.time, "sleep", naps.append)
    with pytest.raises(BudgetError):
        settle(fleet, 0, cpu_cost(8 * GIB), None, 0)
    assert (naps, answers, given) == ([planner.POLL_S] * 2, [], [0])
