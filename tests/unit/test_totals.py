# SPDX-License-Identifier: Apache-2.0
"""Sums of the counter files: what a scrape says, and never less than before."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from service.metrics import SECONDS
from service.totals import STAGES, SUMS, Totals, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Count = Callable[..., None]

HISTOGRAMS = ("request_stage_seconds", "batch_texts", "batch_tokens", "batch_seconds")
NOTHING = dict.fromkeys(SUMS, 0) | {
    "requests": {},
    "stages": {
        "le": list(SECONDS),
        "counts": {stage: [0] * (len(SECONDS) + 1) for stage in STAGES},
        "sums": dict.fromkeys(STAGES, 0.0),
    },
    "by_slot": {},
}


@pytest.fixture
def count(tmp_path: Path) -> Iterator[Count]:
    """Add to an entry of a slot's file, as prometheus_client does."""
    files: dict[Path, MmapedDict] = {}

    def add(name: str, value: float, slot: int = 0, **labels: str) -> None:
        metric = name.removesuffix("_total").removesuffix("_sum").removesuffix("_bucket")
        path = tmp_path / f"{'histogram' if metric in HISTOGRAMS else 'counter'}_s{slot}.db"
        if path not in files or not path.exists():
            if path in files:
                files[path].close()
            files[path] = MmapedDict(str(path))
        every = {"slot": f"s{slot}"} | labels
        key = mmap_key(f"warmfleet_{metric}", f"warmfleet_{name}", list(every), list(every.values()), "help")
        files[path].write_value(key, files[path].read_value(key)[0] + value, 0.0)

    yield add
    for file in files.values():
        file.close()


def test_before_the_first_request_everything_is_0(tmp_path: Path) -> None:
    """With no file, and with one that nothing was written to yet."""
    totals = Totals(tmp_path)
    assert totals.read() == NOTHING
    MmapedDict(str(tmp_path / "counter_s0.db")).close()
    (tmp_path / "histogram_s0.db").touch()
    (tmp_path / "notes.txt").write_text("not ours", encoding="utf-8")
    assert totals.read() == NOTHING


def test_entries_are_summed_over_slots_and_labels(tmp_path: Path, count: Count) -> None:
    """Requests by status, drops over reasons, stages by class, and by slot what a page shows of each."""
    for slot in (0, 2, 10):
        count("texts_total", 10, slot)
        count("tokens_total", 70, slot)
        count("requests_total", 3, slot, endpoint="/embed", status="200")
        count("requests_total", 2, slot, endpoint="/v1/embeddings", status="200")
        count("requests_total", 1, slot, endpoint="/embed", status="429")
        count("dropped_texts_total", 1, slot, reason="deadline")
        count("dropped_texts_total", 2, slot, reason="abandoned")
        count("rejected_texts_total", 4, slot)
        count("padding_tokens_total", 5, slot)
        count("out_of_memory_total", 1, slot)
        count("batch_seconds_bucket", 2, slot, le="0.01")
        count("batch_seconds_bucket", 1, slot, le="+Inf")
        count("batch_seconds_sum", 0.5, slot)
        count("batch_texts_sum", 10, slot)
        count("batch_tokens_sum", 75, slot)
        count("request_stage_seconds_bucket", 4, slot, stage="queue", le="0.0005")
        count("request_stage_seconds_bucket", 6, slot, stage="queue", le="+Inf")
        count("request_stage_seconds_sum", 1.25, slot, stage="queue")
    found = Totals(tmp_path).read()
    counts = NOTHING["stages"]["counts"] | {"queue": [12] + [0] * (len(SECONDS) - 1) + [18]}
    assert found == {
        "texts": 30,
        "tokens": 210,
        "padding_tokens": 15,
        "rejected_texts": 12,
        "dropped_texts": 9,
        "out_of_memory": 3,
        "batches": 9,
        "batch_texts": 30,
        "batch_tokens": 225,
        "batch_seconds": 1.5,
        "requests": {"200": 15, "429": 3},
        "stages": {
            "le": list(SECONDS),
            "counts": counts,
            "sums": NOTHING["stages"]["sums"] | {"queue": 3.75},
        },
        "by_slot": {slot: {"texts": 10, "tokens": 70, "requests": 6} for slot in ("0", "2", "10")},
    }
    assert list(found["by_slot"]) == ["0", "2", "10"]


def test_a_file_that_grows_is_followed(tmp_path: Path, count: Count) -> None:
    """New values at known places, new entries behind them, and new files."""
    totals = Totals(tmp_path)
    seen = []
    for step in range(4):
        count("texts_total", 1)
        count("requests_total", 1, endpoint="/embed", status=str(200 + step))
        count("texts_total", 1, slot=step)
        found = totals.read()
        seen.append((found["texts"], found["requests"]))
    assert seen == [(2 * n, dict.fromkeys([str(200 + step) for step in range(n)], 1)) for n in range(1, 5)]


def test_a_file_of_many_pages_is_read_whole(tmp_path: Path, count: Count) -> None:
    """Hundreds of entries, more than prometheus_client's first mapping holds."""
    totals = Totals(tmp_path)
    for number in range(900):
        count("requests_total", 1, endpoint=f"/{number:0100}", status="200")
        if number % 300 == 0:
            totals.read()
    assert totals.read()["requests"] == {"200": 900}
    count("requests_total", 1, endpoint=f"/{0:0100}", status="200")
    assert totals.read()["requests"] == {"200": 901}


DAMAGE: dict[str, Any] = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"\x10"),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 16),
    "an entry beyond the end": lambda path: path.write_bytes(struct.pack("iii", 64, 0, 999) + bytes(100)),
    "more used than there is": lambda path: path.write_bytes(struct.pack("i", 1 << 30) + bytes(100)),
    "gone": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_counts_what_it_did(
    tmp_path: Path, count: Count, damage: Callable[[Path], Any]
) -> None:
    """No sum falls, and the other files count on."""
    totals = Totals(tmp_path)
    count("texts_total", 5, slot=0)
    count("texts_total", 7, slot=1)
    assert totals.read()["texts"] == 12
    damage(tmp_path / "counter_s0.db")
    count("texts_total", 1, slot=1)
    found = totals.read()
    assert (found["texts"], found["by_slot"]["0"]["texts"]) == (13, 5)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_was_always_damaged_is_skipped(
    tmp_path: Path, count: Count, damage: Callable[[Path], Any]
) -> None:
    """It counts nothing, and hides nothing."""
    count("texts_total", 5, slot=0)
    count("texts_total", 7, slot=1)
    damage(tmp_path / "counter_s0.db")
    assert Totals(tmp_path).read()["texts"] == 7


def test_a_file_that_a_new_worker_begins_is_added(tmp_path: Path, count: Count) -> None:
    """It drops the damaged one and counts from 0 again; what its predecessor counted stays in the sums."""
    totals = Totals(tmp_path)
    count("texts_total", 5)
    assert totals.read()["texts"] == 5
    kept = tmp_path / "kept"
    (tmp_path / "counter_s0.db").rename(kept)  # its inode stays taken
    for expected in (6, 7):
        count("texts_total", 1)
        assert totals.read()["texts"] == expected


@pytest.mark.parametrize("endpoint", ["/embed", "/other"])
def test_a_new_file_may_have_the_inode_of_the_old_one(tmp_path: Path, count: Count, endpoint: str) -> None:
    """Some file systems give it out again at once; with as many entries as before, or with fewer."""
    totals = Totals(tmp_path)
    count("texts_total", 1)
    count("requests_total", 1, endpoint="/embed", status="200")
    begun_anew = (tmp_path / "counter_s0.db").read_bytes()
    count("texts_total", 4)
    count("requests_total", 4, endpoint=endpoint, status="200")
    assert totals.read()["texts"] == 5
    (tmp_path / "counter_s0.db").write_bytes(begun_anew)
    found = totals.read()
    assert (found["texts"], found["requests"], found["by_slot"]["0"]["requests"]) == (6, {"200": 6}, 6)


@pytest.mark.parametrize(("value", "expected"), [(3.0, 3), (0.1234567, 0.123457), (0.0, 0)])
def test_numbers_are_short(value: float, expected: float) -> None:
    """Counts are integers, seconds are told to the microsecond."""
    assert whole(value) == expected
    assert isinstance(whole(value), type(expected))
