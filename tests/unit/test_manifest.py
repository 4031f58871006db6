# SPDX-License-Identifier: Apache-2.0
"""What a boot leaves for the next one, and that nothing in its place can stop a boot."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.budget import WorkerCost
from service.learned import HALF_LIFE_S, LearnedShape, ShapeHistogram
from service.manifest import (
    FORMAT,
    MATTERS,
    MOST_BYTES,
    TRIES,
    Manifest,
    dump,
    eta,
    fingerprint,
    key_of,
    parse,
    path_of,
    read,
    slower,
    stamp,
    update,
    write,
)
from service.settings import Settings
from service.slots import ShapeTimes

if TYPE_CHECKING:
    from collections.abc import Callable

# Settings that change none of the measurements, with what stands for them in the key where something does.
DOES_NOT_MATTER = {
    *("model_id", "hub_cache", "hf_token"),  # the fingerprint: a model may move
    *("workers", "max_workers", "ready_quorum", "ready_floor", "concurrent_loads"),  # numbers of workers
    *("budget_policy", "host_memory_utilization"),  # the sum is done anew at every boot
    "learn_shapes",  # what was learned is kept while it is off
    *("device", "devices", "threads"),  # device_names; threads, resolved
    *("export_cache", "compile_cache", "cache_dir", "metrics_dir"),  # places
    *("bind", "ops_bind"),
    *("spawn_timeout", "download_timeout", "load_timeout", "warmup_timeout", "boot_attempts", "cold_hold"),
    *("max_client_batch_size", "max_body_bytes", "auto_truncate", "request_timeout"),
    *("api_key", "api_key_file", "served_model_name", "check_model", "cors_origins"),
    *("forward_timeout", "drain_grace", "graceful_timeout", "heartbeat_timeout", "keepalive"),
    *("log_format", "log_level", "te_metrics"),
    *("access_log", "otlp_endpoint", "otlp_headers", "otlp_sample"),
}
KEY: dict[str, Any] = {"model": "abc", "cores": 2, "versions": {"torch": "2.11"}, "revision": None}
COST = WorkerCost(context=0, weights=0, batch=0, host=100 << 20)
MANIFEST = Manifest(
    written_at=stamp(1_800_000_000),
    key=KEY,
    stage_seconds={"import": 3.0, "load": 1.5, "warmup": 2.0},
    boot_seconds=7.25,
    shapes=(ShapeTimes(texts=2, tokens=256, rounds=4, first_s=0.3, steady_s=0.2, converged=True),),
    max_batch_tokens=512,
    cost=COST,
    workers=2,
    learned=(LearnedShape(texts=3, tokens=90, count=1.5, seconds=0.75),),
    learned_at=1_800_000_000.0,
)

COUNTS = st.integers(0, (1 << 63) - 1)
SIDES = st.integers(1, 1 << 50)
SECONDS = st.floats(0, 1e15)
PLAIN = st.characters(exclude_categories=["Cs"])  # no half of a surrogate pair
NAMES = st.text(PLAIN, max_size=10)
MANIFESTS = st.builds(
    Manifest,
    written_at=st.datetimes(timezones=st.just(UTC)).map(lambda time: time.isoformat()),
    key=st.dictionaries(NAMES, st.none() | st.booleans() | st.integers(-9, 9) | NAMES | st.lists(NAMES)),
    stage_seconds=st.dictionaries(NAMES, SECONDS),
    boot_seconds=SECONDS,
    shapes=st.lists(st.builds(ShapeTimes, SIDES, SIDES, COUNTS, SECONDS, SECONDS, st.booleans())).map(tuple),
    max_batch_tokens=SIDES,
    cost=st.builds(WorkerCost, COUNTS, COUNTS, COUNTS, COUNTS, st.floats(1, 100)),
    workers=st.integers(1, 256),
    learned=st.lists(st.builds(LearnedShape, SIDES, SIDES, SECONDS, SECONDS)).map(tuple),
    learned_at=SECONDS,
)
GARBAGE = st.binary(max_size=200) | st.builds(
    lambda data, at, junk: data[:at] + junk + data[at + len(junk) :],
    st.just(dump(MANIFEST)),
    st.integers(0, len(dump(MANIFEST))),
    st.binary(max_size=4),
)

ADD = """
import sys
from dataclasses import replace
from pathlib import Path
from service.learned import ShapeHistogram
from service.manifest import update

folder, texts = Path(sys.argv[1]), int(sys.argv[2])
for _ in range(25):
    fresh = ShapeHistogram()
    fresh.add(texts, texts, 1.0)
    while not update(folder, {"model": "abc"}, lambda old: old.learn(fresh, old.learned_at)):
        pass
"""


def put(folder: Path, data: bytes) -> None:
    """Write a file where the manifest of `KEY` is looked for."""
    path_of(folder, KEY).write_bytes(data)


def altered(**fields: Any) -> bytes:
    """Return the file of `MANIFEST` with other fields."""
    return json.dumps({"format": FORMAT} | asdict(MANIFEST) | fields).encode()


# The file


@given(MANIFESTS)
def test_json_gives_back_the_manifest(manifest: Manifest) -> None:
    """Every field, of the same type."""
    found = parse(dump(manifest))
    assert found == manifest
    assert list(found.stage_seconds) == list(manifest.stage_seconds)


def test_what_was_written_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a folder that is the user's alone, with nothing beside the file and no word said."""
    folder = tmp_path / "deep" / "manifests"
    assert read(folder, KEY) is None
    assert write(folder, MANIFEST)
    assert write(folder, replace(MANIFEST, workers=3))
    assert read(folder, KEY) == replace(MANIFEST, workers=3)
    assert [path.name for path in folder.iterdir()] == [path_of(folder, KEY).name]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert caplog.text == ""


def test_file_is_named_by_the_key_alone(tmp_path: Path) -> None:
    """The order of its parts is no part of it; another value is another file."""
    turned = dict(reversed(KEY.items()))
    assert path_of(tmp_path, turned) == path_of(tmp_path, KEY)
    assert path_of(tmp_path, KEY | {"cores": 4}) != path_of(tmp_path, KEY)
    assert len(path_of(tmp_path, KEY).stem) == 24


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "Expecting value"),
        (b'"\xff"', "can't decode"),
        (b"[]", f"it is not of format {FORMAT}"),
        (altered(format=FORMAT + 1), f"it is not of format {FORMAT}"),
        (b"[" * 500_000, "nested too deeply|not of format|Expecting value"),
        (b"{}" + b" " * MOST_BYTES, f"it is larger than {MOST_BYTES} bytes"),
        (altered(workers="2"), "workers: Input should be a valid integer"),
        (altered(workers=True), "workers: Input should be a valid integer"),
        (altered(workers=0), "a number is below 1"),
        (altered(max_batch_tokens=0), "a number is below 1"),
        (altered(cost=asdict(COST) | {"raised": 0.5}), "a number is below 1"),
        (altered(cost=asdict(COST) | {"host": -1}), "a number is negative, or not finite"),
        (altered(cost=asdict(COST) | {"host": 10**30}), "a number is negative, or not finite"),
        (altered(boot_seconds=float("nan")), "a number is negative, or not finite"),
        (altered(boot_seconds=float("inf")), "a number is negative, or not finite"),
        (altered(stage_seconds={"load": -0.5}), "a number is negative, or not finite"),
        (altered(stage_seconds={"two\nlines": "x"}), "stage_seconds.two lines: Input should be a valid num"),
        (altered(learned=[{"texts": 0, "tokens": 1, "count": 1, "seconds": 1}]), "a number is below 1"),
        (altered(shapes=[[1, 2]]), r"shapes\.0: "),
        (altered(written_at="yesterday"), "Invalid isoformat"),
        (altered(key=KEY | {"cores": 4}), "it is foreign"),
    ],
)
def test_what_is_of_no_use_is_ignored_with_one_line(
    data: bytes, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The line names the file and the reason; the next boot's manifest takes the place."""
    put(tmp_path, data)
    assert read(tmp_path, KEY) is None
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith(f"the manifest {path_of(tmp_path, KEY)} is ignored: ")
    assert "\n" not in line
    assert re.search(why, line)
    caplog.clear()
    assert write(tmp_path, MANIFEST)
    assert read(tmp_path, KEY) == MANIFEST
    assert caplog.text == ""


@given(GARBAGE)
def test_garbage_is_refused_in_words(data: bytes) -> None:
    """Whatever the bytes, they are a manifest that could have been written, or a ValueError."""
    try:
        found = parse(data)
    except ValueError:
        return
    assert parse(dump(found)) == found


def test_unreadable_file_is_ignored_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Here a folder, which also cannot be replaced; nothing is left beside it."""
    path_of(tmp_path, KEY).mkdir()
    assert read(tmp_path, KEY) is None
    assert not write(tmp_path, MANIFEST)
    assert [record.getMessage().rpartition(" is ")[2] for record in caplog.records] == [
        "ignored: Is a directory",
        "not written: Is a directory",
    ]
    assert list(tmp_path.iterdir()) == [path_of(tmp_path, KEY)]


def test_unwritable_folder_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither writing nor changing raises; `change` is not called for nothing."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "manifests"
    assert not write(folder, MANIFEST)
    assert not update(folder, KEY, lambda before: pytest.fail("there is no lock"))
    assert ["Not a directory" in record.getMessage() for record in caplog.records] == [True, True]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a cache that is mounted read-only."""
    tmp_path.chmod(0o500)
    assert not write(tmp_path, MANIFEST)
    assert len(caplog.records) == 1


def test_infinity_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The manifest that was there stays."""
    assert write(tmp_path, MANIFEST)
    assert not write(tmp_path, replace(MANIFEST, boot_seconds=float("inf")))
    assert "is not written" in caplog.text
    assert read(tmp_path, KEY) == MANIFEST


# Several processes


def test_concurrent_updates_lose_nothing(tmp_path: Path) -> None:
    """Two processes add to the same manifest, each again and again."""
    key = {"model": "abc"}
    write(tmp_path, replace(MANIFEST, key=key, learned=()))
    commands = [[sys.executable, "-c", ADD, tmp_path, texts] for texts in ("1", "64")]
    adders = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for command in commands]
    assert [adder.wait(60) for adder in adders] == [0, 0]
    found = read(tmp_path, key)
    assert found is not None
    assert sorted(found.learned, key=lambda shape: shape.texts) == [
        LearnedShape(1, 1, 25.0, 25.0),
        LearnedShape(64, 64, 25.0, 25.0),
    ]


def test_lock_that_is_held_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a bounded number of tries, with one line, and nothing changed."""
    slept: list[float] = []
    with path_of(tmp_path, KEY).with_suffix(".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not update(tmp_path, KEY, lambda before: MANIFEST, sleep=slept.append)
    assert len(slept) == TRIES
    assert "is given up: Resource temporarily unavailable" in caplog.text
    assert len(caplog.records) == 1
    assert update(tmp_path, KEY, lambda before: MANIFEST, sleep=slept.append)
    assert read(tmp_path, KEY) == MANIFEST


def test_change_to_none_leaves_the_file(tmp_path: Path) -> None:
    """A worker whose fleet has no manifest yet writes none."""
    seen: list[Manifest | None] = []
    keep: Callable[[Manifest | None], None] = seen.append
    assert not update(tmp_path, KEY, keep)
    write(tmp_path, MANIFEST)
    assert not update(tmp_path, KEY, keep)
    assert seen == [None, MANIFEST]
    assert read(tmp_path, KEY) == MANIFEST


# What traffic taught


def test_a_new_boot_keeps_what_was_learned() -> None:
    """All else is what it measured itself."""
    fresh = replace(MANIFEST, workers=4, learned=(), learned_at=0.0)
    assert fresh.after(MANIFEST) == replace(MANIFEST, workers=4)
    assert fresh.after(None) == fresh


def test_what_was_learned_fades_by_its_own_age() -> None:
    """Half after the half-life, however often it was written meanwhile."""
    start = MANIFEST.learned_at
    fresh = ShapeHistogram()
    fresh.add(1, 8, 0.25)
    once = MANIFEST.learn(fresh, start + HALF_LIFE_S)
    assert once.learned == (LearnedShape(3, 90, 0.75, 0.375), LearnedShape(1, 8, 1.0, 0.25))
    assert once.learned_at == start + HALF_LIFE_S
    often = MANIFEST
    for part in range(1, 5):
        often = often.learn(ShapeHistogram(), start + part * HALF_LIFE_S / 4)
    assert often.learned[0].seconds == pytest.approx(once.learned[0].seconds)


# The key


def key(settings: Settings, **others: Any) -> dict[str, Any]:
    """Return a key, all but the given at some value."""
    facts = {"model": "m", "device_names": ["cpu"], "cores": 2, "threads": 1, "versions": {"torch": "2.11"}}
    return key_of(settings, **(facts | others))


def test_every_setting_is_in_the_key_or_known_not_to_matter() -> None:
    """A new setting must be put into one of the two."""
    assert set(MATTERS) <= set(key(Settings()))
    assert set(MATTERS) | DOES_NOT_MATTER == set(Settings.model_fields)
    assert not set(MATTERS) & DOES_NOT_MATTER


def test_key_holds_no_secret_and_survives_json() -> None:
    """It is shown to people, and compared with what was read back."""
    settings = Settings(api_key="hush", hf_token="hush", warmup_shapes="2x256,64x8", backend="stub")
    found = key(settings)
    assert "hush" not in json.dumps(found)
    assert json.loads(json.dumps(found)) == found
    assert found["warmup_shapes"] == ["2x256", "64x8"]


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"device_names": ["cpu", "cpu"]},
        {"cores": 3},
        {"threads": 2},
        {"versions": {"torch": "2.12"}},
    ],
)
def test_each_fact_makes_another_key(other: dict[str, Any]) -> None:
    """The machine, the model and the versions."""
    assert key(Settings(), **other) != key(Settings())


def test_order_of_devices_is_no_part_of_the_key() -> None:
    """The same cards behind other indices."""
    names = ["NVIDIA H100", "NVIDIA A10"]
    assert key(Settings(), device_names=names) == key(Settings(), device_names=names[::-1])


def test_number_of_workers_and_ports_are_no_part_of_the_key() -> None:
    """What one worker costs does not depend on them."""
    assert key(Settings(workers=7, bind="127.0.0.1:1")) == key(Settings())


def test_fingerprint_is_of_the_files_and_not_of_their_place(tmp_path: Path) -> None:
    """A moved model is the same one; a changed, added or touched file makes another."""
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json"):
        (model / name).write_text("{}", encoding="utf-8")
    first = fingerprint(model)
    model = model.rename(tmp_path / "moved")
    (model / ".git").mkdir()
    (model / ".git" / "index").touch()
    (model / "broken.json").symlink_to("nowhere")
    assert fingerprint(model) == first
    found = [first]
    os.utime(model / "model.safetensors", ns=(1, 1))
    found.append(fingerprint(model))
    before = (model / "config.json").stat()
    (model / "config.json").write_text("[]", encoding="utf-8")
    os.utime(model / "config.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    found.append(fingerprint(model))
    (model / "2_Dense").mkdir()
    (model / "2_Dense" / "config.json").touch()
    found.append(fingerprint(model))
    assert len(set(found)) == 4


def test_fingerprint_of_no_folder_raises_nothing(tmp_path: Path) -> None:
    """The stub has none, and one that vanished is for others to complain about."""
    assert fingerprint(None) != fingerprint(tmp_path / "gone")


# This boot against the last one


def test_slower_stages_are_told() -> None:
    """By the factor and by a second; new stages have nothing to be held against."""
    before = {"import": 3.0, "load": 0.1, "warmup": 2.04, "wait": 10.0}
    now = {"import": 3.9, "load": 0.9, "warmup": 6.12, "wait": 12.0, "compile": 90.0}
    assert slower(before, now) == ["warmup took 6.1 s, 2.0 s last time"]
    assert slower(before, now, factor=1.1, least_s=0.5) == [
        "import took 3.9 s, 3.0 s last time",
        "load took 0.9 s, 0.1 s last time",
        "warmup took 6.1 s, 2.0 s last time",
        "wait took 12.0 s, 10.0 s last time",
    ]


@pytest.mark.parametrize(
    ("stage", "seconds", "left"),
    [
        ("import", 0.0, 6.5),
        ("import", 1.0, 5.5),
        ("load", 9.0, 2.0),
        ("warmup", 1.5, 0.5),
        ("warmup", 60.0, 0.0),
        ("wait", 0.0, None),
    ],
)
def test_eta_is_what_the_last_boot_still_took(stage: str, seconds: float, left: float | None) -> None:
    """A stage that takes longer than last time takes nothing from those after it."""
    assert eta(MANIFEST.stage_seconds, stage, seconds) == left


def test_eta_is_unknown_without_a_last_boot() -> None:
    """Rather than a guess."""
    assert eta({}, "load", 1.0) is None
