# SPDX-License-Identifier: Apache-2.0
"""The status document of a running service: a boot to its end, a death, and every worker tells the same."""

from __future__ import annotations

import os
from itertools import pairwise
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import TYPE_CHECKING, Any

import pytest
from harness import Service, assert_invariants

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRETS = {"HF_TOKEN": "hidden-hub-token", "DATABASE_PASSWORD": "hidden-password"}
MOVING = {"uptime_seconds", "answered_by"}
"""Fields of the service that differ from one answer to the next."""


def status(service: Service) -> dict[str, Any]:
    """Return the document; it is there in every state of the fleet."""
    reply = service.ask("/status")
    assert (reply.status_code, reply.headers["cache-control"]) == (200, "no-store")
    assert reply.headers["content-type"] == "application/json"
    found: dict[str, Any] = reply.json()
    return found


@pytest.fixture(scope="module")
def booted() -> Iterator[tuple[Service, list[dict[str, Any]]]]:
    """A fleet whose first loads fail, and every document of its boot."""
    with Service(workers=2, stub_scenario="fail_load_once", environ=SECRETS) as service:
        seen: list[dict[str, Any]] = []

        def ready() -> bool:
            seen.append(status(service))
            return bool(seen[-1]["fleet"]["ready"])

        service.wait(ready, what="the document says ready")
        yield service, seen
        assert_invariants(service)


def test_a_boot_is_told_to_its_end(booted: tuple[Service, list[dict[str, Any]]]) -> None:
    """Not ready until it is; each slot has a boot that failed and one that serves, stage by stage."""
    _, seen = booted
    assert not any(document["fleet"]["ready"] for document in seen[:-1])
    assert {document["fleet"]["status"] for document in seen[:-1]} <= {"starting"}
    last = seen[-1]
    assert last["fleet"]["verdict"] == "serving: 2 of 2 ready"
    assert [slot["state"] for slot in last["slots"]] == ["ready", "ready"]
    for slot in last["slots"]:
        failed, serves = slot["boots"]
        assert [failed["outcome"], serves["outcome"]] == ["failed", "ready"]
        assert [failed["generation"], serves["generation"]] == [1, 2]
        assert [stage["stage"] for stage in failed["stages"]] == ["wait", "load"]
        assert [stage["stage"] for stage in serves["stages"]] == ["wait", "load", "to_device", "warmup"]
        moments = [serves["began"], *(stage["at"] for stage in serves["stages"]), serves["ready_at"]]
        assert failed["began"] <= failed["ended_at"] <= serves["began"]
        assert all(before <= after for before, after in pairwise(moments)), moments
        assert serves["ready_at"] <= last["service"]["uptime_seconds"]
        assert slot["failures_by_reason"] == {"load": 1}
        assert slot["last_error"]["state"] == "loading"


def test_documents_of_a_boot_only_add(booted: tuple[Service, list[dict[str, Any]]]) -> None:
    """Time goes on, boots and shapes are added, and no worker forgets what another told."""
    _, seen = booted
    for before, after in pairwise(seen):
        assert before["service"]["uptime_seconds"] <= after["service"]["uptime_seconds"]
        for old, new in zip(before["slots"], after["slots"], strict=True):
            assert old["generation"] <= new["generation"]
            assert [boot["began"] for boot in old["boots"]] == [
                boot["began"] for boot in new["boots"][: len(old["boots"])]
            ]


def test_warm_up_is_told_pass_by_pass(booted: tuple[Service, list[dict[str, Any]]]) -> None:
    """The shapes and what they took are those of /workers, with the passes besides."""
    service, _ = booted
    rows = service.workers()
    for slot in status(service)["slots"]:
        shapes = rows[slot["slot"]]["warmup_shapes"]
        assert [(shape["texts"], shape["tokens"], shape["rounds"]) for shape in slot["warmup"]] == [
            (shape["texts"], shape["tokens"], shape["rounds"]) for shape in shapes
        ]
        assert shapes
        for told, known in zip(slot["warmup"], shapes, strict=True):
            assert len(told["passes"]) == min(20, told["rounds"])
            assert told["first_s"] == pytest.approx(known["first_s"], abs=1e-5)
            assert told["steady_s"] == pytest.approx(known["steady_s"], abs=1e-5)


def test_totals_are_those_of_a_scrape(booted: tuple[Service, list[dict[str, Any]]]) -> None:
    """Of all workers, at once."""
    service, _ = booted
    answered = status(service)["totals"]["requests"].get("200", 0) + 8
    texts = 2 * answered
    for _ in range(8):
        assert service.embed(["hello", "world"]).ok

    def counted() -> dict[str, Any] | None:
        """Each counter by itself: a worker may be held up between two of them."""
        found: dict[str, Any] = status(service)["totals"]
        done = (found["requests"].get("200"), sum(found["stages"]["counts"]["total"]), found["batch_texts"])
        return found if done == (answered, answered, texts) else None

    totals = service.wait(counted, what="the last request is counted")
    metrics = service.metrics()
    assert totals["texts"] == metrics.total("warmfleet_texts_total") == texts
    assert totals["tokens"] == metrics.total("warmfleet_tokens_total")
    assert totals["requests"] == {"200": answered}
    assert metrics.total("warmfleet_batch_texts_sum") == texts
    assert totals["batches"] == metrics.total("warmfleet_batch_texts_count")
    assert sum(row["texts"] for row in totals["by_slot"].values()) == texts


def test_any_worker_tells_the_same(booted: tuple[Service, list[dict[str, Any]]]) -> None:
    """All that does not move by itself is the same in the words of either, while the other is stopped."""
    service, _ = booted
    said: dict[int, Any] = {}
    for slot in (0, 1):
        pid = service.kill(1 - slot, SIGSTOP)
        try:
            document = service.wait(
                lambda slot=slot: (found := status(service))["service"]["answered_by"] == slot and found,
                what=f"slot {slot} answers",
            )
        finally:
            os.kill(pid, SIGCONT)
        said[slot] = (
            {name: value for name, value in document["service"].items() if name not in MOVING},
            [(row["slot"], row["pid"], row["boots"], row["warmup"]) for row in document["slots"]],
            document["budget"]["text"],
            document["totals"],
        )
    assert said[0] == said[1]


def test_rooms_show_the_workers_that_are_there(booted: tuple[Service, list[dict[str, Any]]]) -> None:
    """Each worker with what it has measured, below the limit of the host."""
    service, _ = booted
    (room,) = status(service)["budget"]["rooms"]
    assert (room["name"], [worker["slot"] for worker in room["workers"]]) == ("host", [0, 1])
    used = room["others_bytes"] + room["shared_bytes"] + sum(worker["bytes"] for worker in room["workers"])
    assert room["headroom_bytes"] == max(0, room["limit_bytes"] - used)
    assert sum(room["next_worker"]["parts"].values()) == room["next_worker"]["bytes"]


def test_no_secret_is_told(booted: tuple[Service, list[dict[str, Any]]]) -> None:
    """Neither a setting that is one nor anything else of the environment."""
    service, seen = booted
    assert service.environ.items() >= SECRETS.items()
    assert "hidden" not in service.ask("/status").text
    assert not any("hidden" in str(document) for document in seen)


def test_a_killed_worker_leaves_its_boot(booted: tuple[Service, list[dict[str, Any]]]) -> None:
    """It was ready and is gone; its successor's boot stands beside it, and no total falls."""
    service, _ = booted
    before = status(service)
    generation = before["slots"][0]["generation"]
    service.kill(0, SIGKILL)

    def returned() -> dict[str, Any] | None:
        found = status(service)
        slot = found["slots"][0]
        return found if slot["state"] == "ready" and slot["generation"] > generation else None

    after = service.wait(returned, what="slot 0 is ready again")
    gone, serves = after["slots"][0]["boots"][-2:]
    assert (gone["outcome"], serves["outcome"]) == ("gone", "ready")
    assert gone["ready_at"] <= gone["ended_at"] <= serves["began"]
    kills = [document["slots"][0]["failures_by_reason"].get("killed", 0) for document in (before, after)]
    assert kills[1] == kills[0] + 1
    for name in ("texts", "tokens", "batches", "batch_seconds"):
        assert after["totals"][name] >= before["totals"][name]
