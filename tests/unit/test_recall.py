# SPDX-License-Identifier: Apache-2.0
"""What a boot finds of the last one, what it leaves for the next, and that neither can harm it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from households import cpu_cost, reading

from service import manifest, recall
from service.backends.caches import choose
from service.learned import ShapeHistogram
from service.lifecycle import State
from service.recall import Recall, cpu_name, versions
from service.settings import Settings
from service.slots import ShapeTimes, SlotRecord

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from service.gpu_memory import DeviceReading

GIB = 1 << 30
NOW = 1_800_000_000.0
COST = cpu_cost(300 << 20)
SHAPES = (ShapeTimes(2, 256, 4, 0.5, 0.25, converged=True),)
FAST = {"import": 3.0, "load": 1.0, "warmup": 2.0}
SLOW = {"import": 3.0, "load": 4.0, "warmup": 2.5}


def row(slot: int, stage_seconds: dict[str, float], **others: Any) -> SlotRecord:
    values: dict[str, Any] = {"max_batch_tokens": 512, "shapes": SHAPES} | others
    return SlotRecord(slot, 1, State.READY, 0.0, 0.0, stage_seconds=stage_seconds, **values)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall.time, "time", lambda: NOW)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(backend="stub", cache_dir=str(tmp_path / "kept"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the folder of a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def look(
    settings: Settings, model: Path | None, readings: Collection[DeviceReading] = (), **others: Any
) -> Recall:
    return Recall.look(settings, model, readings, **{"cores": 2, "threads": 1} | others)


def test_the_first_boot_finds_nothing_and_makes_nothing(settings: Settings, model: Path) -> None:
    """It knows where it will write; the folder is not made before there is something to keep."""
    found = look(settings, model)
    assert (found.folder, found.last) == (choose(settings.cache_dir, "manifests"), None)
    assert found.folder is not None
    assert not found.folder.exists()
    assert found.key["model"] == manifest.fingerprint(model)
    assert found.key["device_names"] == [cpu_name()]
    assert found.key["versions"] == versions()


def test_the_next_boot_finds_what_the_last_one_kept(
    settings: Settings, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The stages and shapes of the slowest warm-up, the fleet's cost, number and boot time, unlogged."""
    rows = [row(0, FAST, shapes=()), row(1, SLOW), row(2, FAST, shapes=())]
    look(settings, model).keep(rows, COST, boot_seconds=9.5)
    found = look(settings, model)
    assert found.last == manifest.Manifest(
        written_at=manifest.stamp(NOW),
        key=found.key,
        stage_seconds=SLOW,
        boot_seconds=9.5,
        shapes=SHAPES,
        max_batch_tokens=512,
        cost=COST,
        workers=3,
    )
    assert caplog.text == ""


def test_the_slowest_is_who_was_longest_in_its_warm_up(settings: Settings, model: Path) -> None:
    """Not who waited longest for its turn: that depends on how many there are, and is not kept."""
    waited = {"wait": 90.0, "load": 9.0, "warmup": 1.0}
    rows = [row(0, waited, shapes=()), row(1, {"wait": 0.5, **SLOW}), row(2, {}, shapes=())]
    look(settings, model).keep(rows, COST, boot_seconds=99.0)
    last = look(settings, model).last
    assert last is not None
    assert (last.stage_seconds, last.shapes) == (SLOW, SHAPES)


def test_what_oom_kills_have_taught_is_not_kept(settings: Settings, model: Path) -> None:
    """The cost is as it was measured: the next boot is another one, perhaps with more memory."""
    look(settings, model).keep([row(0, FAST)], replace(COST, raised=1.21), boot_seconds=1.0)
    last = look(settings, model).last
    assert last is not None
    assert last.cost == COST


def test_another_model_machine_or_limit_finds_nothing(
    settings: Settings, model: Path, tmp_path: Path
) -> None:
    """What a boot measured is about this model, on this machine, at these limits."""
    look(settings, model).keep([row(0, FAST)], COST, boot_seconds=1.0)
    other = settings.model_copy(update={"max_batch_tokens": 64})
    assert look(settings, model).last is not None
    assert [look(settings, model, cores=4).last, look(other, model).last, look(settings, None).last] == [
        None
    ] * 3
    shutil.copytree(model, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{ }", encoding="utf-8")
    assert look(settings, tmp_path / "other").last is None


def test_a_boot_that_was_slower_is_told_stage_by_stage(
    settings: Settings, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Load took four times as long; warm-up a quarter longer, which is noise. The new times are kept."""
    look(settings, model).keep([row(0, FAST)], COST, boot_seconds=6.0)
    look(settings, model).keep([row(0, SLOW)], COST, boot_seconds=9.5)
    assert [record.getMessage() for record in caplog.records] == [
        "this boot was slower than the last: load took 4.0 s, 1.0 s last time"
    ]
    found = look(settings, model).last
    assert found is not None
    assert found.stage_seconds == SLOW


def test_shapes_of_traffic_are_kept_across_boots(settings: Settings, model: Path) -> None:
    """What workers hand in adds up, and a boot after that measures anew without forgetting it."""
    first = look(settings, model)
    first.keep([row(0, FAST)], COST, boot_seconds=1.0)
    for texts in (1, 2):
        seen = ShapeHistogram()
        seen.add(texts, 100, 0.5)
        first.learn(seen)
        assert len(seen) == 0
    look(settings, model).keep([row(0, FAST)], replace(COST, host=7), boot_seconds=1.0)
    last = look(settings, model).last
    assert last is not None
    assert [(shape.texts, shape.tokens, shape.count) for shape in last.learned] == [
        (1, 100, 1.0),
        (2, 100, 1.0),
    ]
    assert (last.learned_at, last.cost.host) == (NOW, 7)


def test_shapes_wait_in_their_worker_until_there_is_a_manifest(settings: Settings, model: Path) -> None:
    """Before every worker was ready there is nothing to add to: nothing is written, nothing is lost."""
    found = look(settings, model)
    seen = ShapeHistogram()
    seen.add(3, 90, 0.5)
    found.learn(seen)
    assert found.folder is not None
    assert (len(seen), found.folder.exists()) == (1, False)
    found.keep([row(0, FAST)], COST, boot_seconds=1.0)
    found.learn(seen)
    last = look(settings, model).last
    assert last is not None
    assert (len(seen), [shape.texts for shape in last.learned]) == (0, [3])


def test_without_traffic_nothing_is_written(settings: Settings, model: Path) -> None:
    """An idle worker's empty table does not touch the file, nor weigh what is in it."""
    found = look(settings, model)
    found.keep([row(0, FAST)], COST, boot_seconds=1.0)
    assert found.folder is not None
    path = manifest.path_of(found.folder, found.key)
    before = path.stat().st_ino
    found.learn(ShapeHistogram())
    assert path.stat().st_ino == before


def test_shapes_that_could_not_be_written_are_kept_for_later(
    settings: Settings, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk costs no count: with what came meanwhile they go out at the next time."""
    found = look(settings, model)
    found.keep([row(0, FAST)], COST, boot_seconds=1.0)
    seen = ShapeHistogram()
    seen.add(3, 90, 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", lambda *_: False)
        found.learn(seen)
    seen.add(3, 90, 0.5)
    found.learn(seen)
    last = look(settings, model).last
    assert last is not None
    assert [(shape.texts, shape.count) for shape in last.learned] == [(3, 2.0)]


@pytest.mark.parametrize("broken", ["a file is in its place", "its name is too long", "it is below a file"])
def test_a_folder_that_cannot_be_used_costs_nothing(
    broken: str, tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Boot and service go on as if there were no manifest; a line in the log says why nothing is kept."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    folder = {
        "a file is in its place": tmp_path / "file",
        "its name is too long": tmp_path / ("x" * 300),
        "it is below a file": tmp_path / "file" / "below",
    }[broken]
    found = look(Settings(backend="stub", cache_dir=str(folder)), model)
    seen = ShapeHistogram()
    seen.add(3, 90, 0.5)
    caplog.clear()
    found.keep([row(0, FAST)], COST, boot_seconds=1.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    found.learn(seen)
    assert (found.last, len(seen), len(caplog.records)) == (None, 1, 1)


def test_rubbish_in_its_place_is_ignored_and_replaced(
    settings: Settings, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says so; this boot's measurements take its place."""
    first = look(settings, model)
    assert first.folder is not None
    first.folder.mkdir()
    manifest.path_of(first.folder, first.key).write_bytes(b"{")
    assert look(settings, model).last is None
    assert "is ignored" in caplog.text
    first.keep([row(0, FAST)], COST, boot_seconds=1.0)
    assert look(settings, model).last is not None


def test_without_a_folder_nothing_is_kept() -> None:
    """A fleet that was given no place, such as a test's, keeps nothing and asks for nothing."""
    seen = ShapeHistogram()
    seen.add(3, 90, 0.5)
    nowhere = Recall()
    nowhere.keep([row(0, FAST)], COST, boot_seconds=1.0)
    nowhere.learn(seen)
    assert (nowhere.last, nowhere.key, len(seen)) == (None, {}, 1)


# ---------------------------------------------------------------------------------------------
# What the key says of the machine


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC 9B14\n\nprocessor\t: 1\nmodel name\t: other\n",
            "AMD EPYC 9B14",
        ),
        ("model name : Xeon: the second\n", "Xeon: the second"),
        ("processor : 0\nBogoMIPS : 50.00\n", "cpu"),
        ("", "cpu"),
        ("model name\t: caf\udce9\n", "caf\N{REPLACEMENT CHARACTER}"),
    ],
    ids=["x86", "colon", "arm", "empty", "no utf-8"],
)
def test_a_cpu_is_known_by_its_model(text: str, expected: str, tmp_path: Path) -> None:
    """The first `model name` of the kernel's list; where there is none, it is a CPU."""
    file = tmp_path / "cpuinfo"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert cpu_name(file) == expected


def test_a_kernel_that_lists_no_cpus_has_one(tmp_path: Path) -> None:
    """No /proc is no error."""
    assert cpu_name(tmp_path / "none") == "cpu"


def test_gpus_are_known_by_model_and_size(settings: Settings, model: Path) -> None:
    """Not by UUID, nor by what is in use there: a pod that moves to a like machine finds its manifest."""
    here, there = ([replace(reading(80 * GIB, used), uuid=name)] * 2 for used, name in ((7, "a"), (9, "b")))
    found = look(settings, model, here)
    assert found.key["device_names"] == [f"NVIDIA H100 80GB HBM3 {80 * GIB}"] * 2
    found.keep([row(0, FAST)], COST, boot_seconds=1.0)
    assert look(settings, model, there).last is not None
    assert [look(settings, model, other).last for other in (there[:1], [reading(40 * GIB, 7)] * 2, ())] == [
        None
    ] * 3


def test_versions_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not there has none."""
    monkeypatch.setattr(recall, "PACKAGES", ("gunicorn", "no-such-package"))
    assert list(versions()) == ["gunicorn"]
