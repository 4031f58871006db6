# SPDX-License-Identifier: Apache-2.0
"""How many workers fit: sums as one does them on paper, and what holds for every sum.

The first examples are those of docs/budget.md.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.budget import (
    GIB,
    HOST_BUSY,
    MIB,
    Constraint,
    Plan,
    Room,
    Verdict,
    WorkerCost,
    describe,
    judge,
    line_of,
    plan,
    render,
    size,
)

if TYPE_CHECKING:
    from typing import Literal

    Policy = Literal["clamp", "refuse", "warn"]


def gib(number: float) -> int:
    return int(number * GIB)


FLOAT32 = WorkerCost(context=gib(0.5), weights=gib(1.25), batch=gib(3.6), host=600 * MIB)
BFLOAT16 = WorkerCost(context=gib(0.5), weights=gib(0.63), batch=gib(1.8), host=600 * MIB)
DEMO = WorkerCost(context=0, weights=0, batch=0, host=50 * MIB)
CARD = Room("GPU-0", 80 * GIB, 0.9)
BIG_HOST = Room("host", 1024 * GIB, 0.9)
SMALL_HOST = Room("host", 24 * GIB, 0.9, shared=gib(0.55))


# ---------------------------------------------------------------------------------------------
# Worked examples


@pytest.mark.parametrize(
    ("cost", "price", "fits"),
    [
        pytest.param(FLOAT32, 0.5 + 1.25 + 3.6 + 0.05 * 4.85, 12, id="float32"),
        pytest.param(BFLOAT16, 0.5 + 0.63 + 1.8 + 0.05 * 2.43, 23, id="bfloat16"),
    ],
)
def test_an_80_gib_card_with_bge_large_in_two_dtypes(cost: WorkerCost, price: float, fits: int) -> None:
    """80 * 0.9 = 72 GiB. 72 / 5.5925 = 12.9 workers in float32, 72 / 3.0515 = 23.6 in bfloat16."""
    found = plan(cost, host=BIG_HOST, devices=[CARD])
    assert (found.fits, found.binding, found.by_device) == (fits, "GPU-0", {"GPU-0": fits})
    line = line_of(found)
    assert (line.budget, line.price) == (72 * GIB, pytest.approx(price * GIB, rel=1e-6))


def test_a_host_limit_of_24_gib() -> None:
    """24 * 0.9 - 0.55 = 21.05 GiB. A worker is 1.1 * 50 + 96 = 151 MiB; 21555 / 151 = 142.7."""
    found = plan(DEMO, host=SMALL_HOST)
    assert (found.fits, found.binding, found.by_device) == (142, "host", {})
    assert found.constraints[0].budget == pytest.approx(21.05 * GIB, rel=1e-6)
    assert found.constraints[0].price == pytest.approx(151 * MIB, abs=1)


def test_weights_that_each_worker_holds_for_itself_make_the_difference() -> None:
    """The same 0.5 GiB in every worker instead of once: 1.1 * 562 + 96 = 714 MiB, and 22067 / 714 = 30.9."""
    naive = replace(DEMO, host=DEMO.host + 512 * MIB)
    assert plan(naive, host=replace(SMALL_HOST, shared=gib(0.05))).fits == 30


def test_cores_bind_on_a_cpu_long_before_its_memory() -> None:
    """16 cores hold 16 workers of one thread, 5 of three; fewer cores than threads hold one all the same."""
    fits = [plan(DEMO, host=SMALL_HOST, cores=16, threads=threads) for threads in (1, 3, 32)]
    assert [(found.fits, found.binding) for found in fits] == [(16, "cores"), (5, "cores"), (1, "cores")]


def test_two_mig_slices_of_different_size() -> None:
    """20 * 0.9 = 18 GiB and 10 * 0.9 = 9 GiB, at 3.0515: 5.9 and 2.9, so 5 + 2 = 7 workers."""
    slices = [Room("MIG-a", 20 * GIB, 0.9), Room("MIG-b", 10 * GIB, 0.9)]
    found = plan(BFLOAT16, host=BIG_HOST, devices=slices)
    assert (found.fits, found.by_device, found.binding) == (7, {"MIG-a": 5, "MIG-b": 2}, "MIG-b")


def test_a_card_of_which_others_use_30_gib() -> None:
    """72 - 30 = 42 GiB: 42 / 5.5925 = 7.5 workers; the others' bytes are theirs, not a share of the card."""
    assert plan(FLOAT32, host=BIG_HOST, devices=[replace(CARD, others=30 * GIB)]).fits == 7


@pytest.mark.parametrize(
    ("others", "fits"),
    [
        pytest.param(0, 3, id="20 / 5.5925 = 3.6"),
        pytest.param(30, 3, id="42 are free, and 20 may be taken"),
        pytest.param(60, 2, id="12 are free: 12 / 5.5925 = 2.1"),
        pytest.param(75, 0, id="nothing is free"),
    ],
)
def test_a_limit_on_a_shared_card_is_a_cap_and_no_promise(others: int, fits: int) -> None:
    """`gpu_memory_limit` 20 GiB: all workers together have that or what is free, whichever is less."""
    room = replace(CARD, others=others * GIB, limit=20 * GIB)
    assert plan(FLOAT32, host=BIG_HOST, devices=[room]).fits == fits


@pytest.mark.parametrize(("kills", "on_host"), [(0, 142), (1, 129), (2, 117)])
def test_each_oom_kill_makes_a_worker_a_tenth_dearer_on_the_host(kills: int, on_host: int) -> None:
    """On the host 151, 166.1 and 182.7 MiB of 21555; of a card's memory the kernel's kill says nothing."""
    raised = 1.1**kills
    assert plan(replace(DEMO, raised=raised), host=SMALL_HOST).fits == on_host
    assert plan(replace(FLOAT32, raised=raised), host=BIG_HOST, devices=[CARD]).fits == 12


def test_a_worker_under_load_takes_more_than_a_warm_one() -> None:
    """Even a worker without a page of its own is given 96 MiB on the host, and more if it was raised."""
    nothing = WorkerCost(0, 0, 0, 0)
    assert (nothing.on_host, nothing.on_device) == (HOST_BUSY, 0) == (96 * MIB, 0)
    assert replace(nothing, raised=1.5).on_host == 144 * MIB
    assert plan(nothing, host=Room("host", 960 * MIB, 1.0)).fits == 10


def test_the_host_may_bind_on_a_machine_with_large_cards() -> None:
    """Two cards hold 24; a host of 8 GiB holds 7.2 GiB / (1.1 * 600 + 96 MiB) = 9.8."""
    cards = [CARD, replace(CARD, name="GPU-1")]
    found = plan(FLOAT32, host=replace(BIG_HOST, total=8 * GIB), devices=cards)
    assert (found.fits, found.binding) == (9, "host")


def test_a_setting_may_bind() -> None:
    """`max_workers` is a line of the sum as any other; of two that allow the same the first is named."""
    found = plan(FLOAT32, host=BIG_HOST, devices=[CARD], max_workers=3)
    assert (found.fits, found.binding) == (3, "max_workers")
    assert plan(FLOAT32, host=BIG_HOST, devices=[CARD], max_workers=12).binding == "GPU-0"


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (Room("host", 1000, 0.9), 900),
        (Room("host", 1000, 0.9, others=100, shared=200), 600),
        (Room("host", 1000, 0.9, others=100, shared=200, limit=500), 300),
        (Room("host", 1000, 0.9, others=100, limit=0), 0),
        (Room("host", 1000, 0.9, others=800, shared=200), 0),
        (Room("host", 1000, 0.9, others=2000, limit=500), 0),
        (Room("host", 0, 0.9), 0),
    ],
)
def test_what_a_room_has_for_workers(room: Room, expected: int) -> None:
    """Others come off first, then the cap, then what all share; it is never less than nothing."""
    assert room.budget == expected


# ---------------------------------------------------------------------------------------------
# What holds for every sum

BYTES = st.integers(0, 200 * GIB)
SHARES = st.floats(0.05, 1.0)
COSTS = st.builds(
    WorkerCost,
    context=st.integers(0, GIB),
    weights=st.integers(0, 20 * GIB),
    batch=st.integers(0, 20 * GIB),
    host=st.integers(0, 4 * GIB),
    raised=st.floats(1.0, 4.0),
)
LIMITS = st.none() | st.integers(MIB, 200 * GIB)
HOSTS = st.builds(
    Room, st.just("host"), BYTES, SHARES, others=st.integers(0, 50 * GIB), shared=st.integers(0, 20 * GIB)
)
DEVICES = st.lists(
    st.builds(Room, st.just(""), BYTES, SHARES, others=st.integers(0, 90 * GIB), limit=LIMITS), max_size=4
).map(lambda rooms: [replace(room, name=f"GPU-{number}") for number, room in enumerate(rooms)])
CAPS = st.none() | st.integers(1, 300)


@given(cost=COSTS, host=HOSTS, devices=DEVICES, cores=CAPS, threads=st.integers(1, 8), most=CAPS)
def test_what_fits_is_the_least_that_any_constraint_allows(
    cost: WorkerCost, host: Room, devices: list[Room], cores: int | None, threads: int, most: int | None
) -> None:
    """All devices together are one constraint; the one that is named allows no more."""
    found = plan(cost, host=host, devices=devices, cores=cores, threads=threads, max_workers=most)
    allowed = [line.fits for line in found.constraints if line.kind != "device"]
    if devices:
        allowed.append(sum(found.by_device.values()))
    assert found.fits == min(allowed)
    assert [line.name for line in found.constraints] == [
        *(room.name for room in devices),
        "host",
        *(["cores"] if cores else []),
        *(["max_workers"] if most else []),
    ]
    if line_of(found).kind == "device":
        assert found.fits == sum(found.by_device.values())
    else:
        assert found.fits == line_of(found).fits


@given(cost=COSTS, host=HOSTS, devices=DEVICES)
def test_the_workers_that_fit_are_never_over_a_budget(
    cost: WorkerCost, host: Room, devices: list[Room]
) -> None:
    """Prices, shared pages and others add up to no more than may be used, or than the cap."""
    found = plan(cost, host=host, devices=devices)
    for room in devices:
        taken = found.by_device[room.name] * cost.on_device
        if taken:
            assert taken + room.others <= room.total * room.utilization
            assert room.limit is None or taken <= room.limit
    if found.fits:
        assert found.fits * cost.on_host + host.shared + host.others <= host.total * host.utilization


@given(
    cost=COSTS,
    host=HOSTS,
    devices=DEVICES,
    more=st.integers(0, 50 * GIB),
    part=st.sampled_from(["total", "others", "limit"]),
)
def test_more_memory_never_fits_fewer_workers(
    cost: WorkerCost, host: Room, devices: list[Room], more: int, part: str
) -> None:
    """A larger device or host, fewer bytes of others, a higher cap: as many workers, or more."""

    def grown(room: Room) -> Room:
        if part == "total":
            return replace(room, total=room.total + more)
        if part == "others":
            return replace(room, others=max(0, room.others - more))
        return replace(room, limit=None if room.limit is None else room.limit + more)

    before = plan(cost, host=host, devices=devices).fits
    assert plan(cost, host=grown(host), devices=[grown(room) for room in devices]).fits >= before


@given(
    cost=COSTS,
    host=HOSTS,
    devices=DEVICES,
    part=st.sampled_from(["context", "weights", "batch", "host", "raised"]),
    more=st.integers(1, 8),
)
def test_a_dearer_worker_never_fits_more_often(
    cost: WorkerCost, host: Room, devices: list[Room], part: str, more: int
) -> None:
    """Whichever part of its cost has risen."""
    step = more if part == "raised" else more * GIB
    dearer = replace(cost, **{part: getattr(cost, part) + step})
    before = plan(cost, host=host, devices=devices)
    after = plan(dearer, host=host, devices=devices)
    assert after.fits <= before.fits
    assert all(after.by_device[name] <= fits for name, fits in before.by_device.items())


@given(cost=COSTS, host=HOSTS, devices=DEVICES)
def test_a_sum_is_data_and_text(cost: WorkerCost, host: Room, devices: list[Room]) -> None:
    """Any sum can be written as JSON, and as one line for each constraint and one for the result."""
    found = plan(cost, host=host, devices=devices, cores=4, max_workers=9)
    written = json.loads(json.dumps(found.as_json()))
    assert (written["fits"], written["binding"]) == (found.fits, found.binding)
    assert [line["terms"] for line in written["constraints"]] == [dict(x.terms) for x in found.constraints]
    assert len(render(found).splitlines()) == len(found.constraints) + 1


@pytest.mark.parametrize(
    ("workers", "a", "b"), [(0, 0, 0), (1, 1, 0), (3, 2, 1), (4, 2, 2), (5, 3, 2), (7, 5, 2), (9, 5, 4)]
)
def test_devices_hold_workers_in_turns_and_the_host_all(workers: int, a: int, b: int) -> None:
    """5 of 4 GiB fit on the one, 2 on the other, which gets no more while there is room elsewhere."""
    cost = WorkerCost(context=0, weights=0, batch=int(4 * GIB / 1.05), host=MIB)
    devices = [Room("MIG-a", 20 * GIB, 1.0), Room("MIG-b", 10 * GIB, 1.0)]
    found = plan(cost, host=BIG_HOST, devices=devices, max_workers=20)
    assert found.by_device == {"MIG-a": 5, "MIG-b": 2}
    assert found.held(workers) == {"MIG-a": a, "MIG-b": b, "host": workers}


def test_on_a_cpu_the_host_holds_all() -> None:
    """Cores and caps hold nobody."""
    assert plan(DEMO, host=SMALL_HOST, cores=4, max_workers=3).held(3) == {"host": 3}


# ---------------------------------------------------------------------------------------------
# The verdict


def plan_of(fits: int) -> Plan:
    return Plan(fits, "max_workers", (Constraint("max_workers", "max_workers", fits, 1, fits, {}),))


@pytest.mark.parametrize("policy", ["clamp", "refuse", "warn"])
@pytest.mark.parametrize("wanted", [1, 3])
def test_what_fits_runs_under_every_policy(policy: Policy, wanted: int) -> None:
    """Up to the last worker that fits there is nothing to say."""
    assert judge(plan_of(3), wanted, policy) == Verdict(wanted, refused=False, text="")


HINT = "give more memory, lower the limits, or set budget_policy to clamp"


@pytest.mark.parametrize(
    ("fits", "policy", "expected"),
    [
        (3, "clamp", Verdict(3, text="4 workers are wanted, 3 fit: max_workers 3; 3 run")),
        (3, "refuse", Verdict(0, refused=True, text=f"4 workers are wanted, 3 fit: max_workers 3; {HINT}")),
        (3, "warn", Verdict(4, text="4 workers are wanted, 3 fit: max_workers 3")),
        (0, "clamp", Verdict(1, text="4 workers are wanted, 0 fit: max_workers 0; one runs all the same")),
        (0, "refuse", Verdict(0, refused=True, text=f"4 workers are wanted, 0 fit: max_workers 0; {HINT}")),
        (0, "warn", Verdict(4, text="4 workers are wanted, 0 fit: max_workers 0")),
    ],
)
def test_what_does_not_fit_is_clamped_refused_or_told(fits: int, policy: Policy, expected: Verdict) -> None:
    """Where none fits, clamped to one: it has run, or else nobody could have measured it."""
    assert judge(plan_of(fits), 4, policy) == expected


# ---------------------------------------------------------------------------------------------
# For people


def test_the_sum_is_told_line_by_line_and_the_result_last() -> None:
    """A person can do the sum again from the text: every term is in it, in its order."""
    cost = WorkerCost(context=512 * MIB, weights=GIB, batch=3 * GIB, host=500 * MIB)
    found = plan(
        cost,
        host=Room("host", 64 * GIB, 0.5, others=2 * GIB, shared=GIB),
        devices=[Room("GPU-0", 80 * GIB, 0.9), Room("GPU-1", 40 * GIB, 0.5, others=GIB, limit=10 * GIB)],
        cores=8,
        threads=3,
        max_workers=6,
    )
    price = "a worker takes 4.70 GiB (context 512 MiB, weights 1.00 GiB, batch 3.00 GiB, slack 205 MiB)"
    assert render(found).splitlines() == [
        f"GPU-0: 80.00 GiB * 0.9 = 72.00 GiB; {price}: 15 fit",
        f"GPU-1: 40.00 GiB * 0.5 - 1.00 GiB of others, at most 10.00 GiB = 10.00 GiB; {price}: 2 fit",
        (
            "host: 64.00 GiB * 0.5 - 2.00 GiB of others - 1.00 GiB shared by all = 29.00 GiB; "
            "a worker takes 646 MiB (private 500 MiB, busy 96 MiB, slack 50 MiB): 45 fit"
        ),
        "8 cores / 3 threads a worker: 2 fit",
        "max_workers 6: 6 fit",
        "2 workers fit; cores allows no more",
    ]


def test_what_is_nothing_is_left_out_and_what_was_raised_is_told() -> None:
    """A term of 0 bytes says nothing; a factor does, behind the parts it multiplies."""
    found = plan(WorkerCost(0, 0, 0, 0, raised=1.25), host=Room("host", GIB, 1.0))
    assert describe(found.constraints[0]) == (
        "host: 1.00 GiB * 1 = 1.00 GiB; a worker takes 120 MiB (busy 96 MiB) * 1.25"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 MiB"),
        (MIB, "1 MiB"),
        (GIB - MIB, "1023 MiB"),
        (GIB, "1.00 GiB"),
        (gib(5.594), "5.59 GiB"),
        (2048 * GIB, "2048.00 GiB"),
    ],
)
def test_sizes_are_told_in_the_unit_that_people_use(count: int, text: str) -> None:
    """MiB below one GiB, GiB from there on."""
    assert size(count) == text
