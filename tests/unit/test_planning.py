# SPDX-License-Identifier: Apache-2.0
"""What `warmfleet plan` tries, how it sums up, and what it says: the parts that need no boot."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import yaml as pyyaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from service.budget import Room, WorkerCost
from service.commands import planning
from service.commands.forecast import (
    Bar,
    ForecastError,
    Machine,
    Row,
    as_json,
    bars,
    chosen,
    fits_in,
    fitted,
    forecast,
    further,
    parts_of,
)
from service.commands.helm_values import (
    LOCAL,
    PLACES,
    POD_BYTES,
    SECRET,
    boot_seconds,
    camel,
    others,
    probe,
    secrets,
    size_text,
    top,
    values,
    worker,
    yaml,
)
from service.commands.options import DTYPES, SIZE, TOKENS
from service.commands.plan_text import FILLS, WIDTH, chart, fill, table
from service.commands.planning import PlanError, Sweep, report, show
from service.commands.scouting import (
    Combination,
    Failed,
    Scouted,
    environment,
    measured,
    problem_of,
    stage_of,
)
from service.errors import WarmfleetError
from service.ledger import Sum
from service.settings import Settings, load

GIB, MIB = 1 << 30, 1 << 20
ON_CPU = Sum(
    WorkerCost(context=0, weights=0, batch=0, host=100 * MIB),
    Room("host", 8 * GIB, 0.9, others=GIB, shared=512 * MIB, source="RAM"),
)
ON_GPUS = Sum(
    WorkerCost(context=500 * MIB, weights=GIB, batch=GIB, host=GIB),
    Room("host", 64 * GIB, 0.9, others=2 * GIB, shared=GIB, source="RAM"),
    (Room("GPU-a", 24 * GIB, 0.9, others=GIB), Room("GPU-b", 24 * GIB, 0.9)),
)
OWN = Combination("auto", None)
STAGES = {"import": 4.0, "load": 1.0, "to_device": 0.5, "warmup": 1.5}


def scouted(entry: Sum = ON_CPU, asked: Combination = OWN, tokens: int = 512) -> Scouted:
    return Scouted(asked, entry, "float32", tokens, 256, 10.0, STAGES)


def row(entry: Sum = ON_CPU, machine: Machine | None = None) -> Row:
    return forecast(scouted(entry), machine or Machine(), Settings(), cores=4, longest=256)


NO_ROOM = Failed(OWN, "no room for a batch of 512 tokens: CUDA out of memory")
BROKEN = Failed(OWN, "the model has no weights")

# What is tried


def test_by_default_half_and_twice_the_tokens_are_tried() -> None:
    """The service's own default first, then the two beside it; on a CPU in one precision."""
    assert further(scouted(), (), (), cuda=False) == [Combination("auto", 256), Combination("auto", 1024)]


def test_on_cuda_float32_is_tried_too() -> None:
    """All budgets in both precisions, unless float32 is the user's own."""
    budgets = (None, 256, 1024)
    expected = [Combination("auto", 256), Combination("auto", 1024)]
    assert further(scouted(), (), (), cuda=True) == expected + [Combination("float32", b) for b in budgets]
    own = Combination("float32", None)
    assert {one.dtype for one in further(scouted(asked=own), (), (), cuda=True)} == {"float32"}


def test_what_warm_up_lowered_is_not_tried_doubled() -> None:
    """1024 tokens had no room, 512 had: half of these is of interest, twice of them is known."""
    own = scouted(asked=Combination("auto", 1024), tokens=512)
    assert further(own, (), (), cuda=False) == [Combination("auto", 256)]


def test_after_a_boot_without_room_only_less_is_tried() -> None:
    """Half the tokens if there is a number to halve; the default has none, and warm-up halves it itself."""
    asked = Combination("float32", 1024)
    assert further(replace(NO_ROOM, asked=asked), (), (), cuda=False) == [Combination("float32", 512)]
    assert further(NO_ROOM, (), (), cuda=False) == []


def test_lists_replace_the_defaults_and_repeat_nothing() -> None:
    """Whoever names tokens or precisions gets these, each pair once, their own not again."""
    own = scouted(asked=Combination("float32", 512))
    tried = further(own, (512, 1024, 512), ("float32", "bfloat16"), cuda=True)
    pairs = [("float32", 1024), ("bfloat16", 512), ("bfloat16", 1024)]
    assert tried == [Combination(*pair) for pair in pairs]


def boots(monkeypatch: pytest.MonkeyPatch, *results: Scouted | Failed) -> list[Combination]:
    """Let scouts return these, one after the other; return what they are asked."""
    asked, left = [], list(results)

    def scout(command: Any, one: Combination, show: Any) -> Scouted | Failed:
        show(0.5, "warming")
        asked.append(one)
        return replace(left.pop(0), asked=one)

    monkeypatch.setattr(planning, "scout", scout)
    return asked


def test_own_combination_that_cannot_boot_ends_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the model or a setting is so with any number of tokens."""
    asked = boots(monkeypatch, BROKEN)
    with pytest.raises(PlanError, match="the model has no weights"):
        planning.measure([], Settings(), Sweep(), cuda=False)
    assert asked == [OWN]


def test_a_combination_without_room_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are booted all the same, and any failure of theirs is theirs alone."""
    asked = boots(monkeypatch, NO_ROOM, scouted(), BROKEN)
    found = planning.measure([], Settings(), Sweep((512, 256, 128)), cuda=False)
    assert [one.max_batch_tokens for one in asked] == [512, 256, 128]
    assert [isinstance(one, Failed) for one in found] == [True, False, True]


# The boot of a scout


def test_a_scout_is_the_users_service_on_places_of_its_own() -> None:
    """Settings stay, by any name; number, ports and folders are the scout's, limits it cannot meet go."""
    user = {
        "MODEL_ID": "org/name",
        "WARMFLEET_WORKERS": "8",
        "WARMFLEET_READY_QUORUM": "8",
        "WARMFLEET_READY_FLOOR": "4",
        "WARMFLEET_MAX_WORKERS": "9",
        "WARMFLEET_METRICS_DIR": "/precious",
        "WARMFLEET_CACHE_DIR": "/precious",
        "WARMFLEET_SKIP_WARMUP": "true",
        "API_KEY": "secret",
        "MAX_BATCH_TOKENS": "64",
        "PATH": "/bin",
    }
    asked = Combination("float32", 128)
    made = environment(user, asked, ("127.0.0.1:1", "127.0.0.1:2"), Path("/of-ours"))
    ours = {name.removeprefix("WARMFLEET_"): value for name, value in made.items() if "WARMFLEET_" in name}
    assert ours == {
        "WORKERS": "1",
        "BUDGET_POLICY": "warn",
        "BOOT_ATTEMPTS": "1",
        "SKIP_WARMUP": "false",
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "warning",
        "BIND": "127.0.0.1:1",
        "OPS_BIND": "127.0.0.1:2",
        "CACHE_DIR": "/of-ours/manifests",
        "METRICS_DIR": "/of-ours/metrics",
        "DTYPE": "float32",
        "MAX_BATCH_TOKENS": "128",
    }
    others = {name: value for name, value in made.items() if "WARMFLEET_" not in name}
    assert others == {"MODEL_ID": "org/name", "PATH": "/bin", "MAX_BATCH_TOKENS": "64", "TMPDIR": "/of-ours"}


def test_a_scouts_environment_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No combination of settings that a user may have is refused once it is a scout's."""
    user = {"WARMFLEET_WORKERS": "auto", "WARMFLEET_MAX_WORKERS": "9", "WARMFLEET_READY_QUORUM": "3"}
    for name, value in environment(user, OWN, ("127.0.0.1:1", "127.0.0.1:2"), Path("/of-ours")).items():
        monkeypatch.setenv(name, value)
    found = load()
    assert (found.workers, found.max_batch_tokens, found.dtype) == (1, None, "auto")


def record(message: str, level: str = "error", logger: str = "warmfleet") -> str:
    return json.dumps({"level": level, "logger": logger, "message": message})


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (["warmfleet: model /x: /x does not exist"], 1, "model /x: /x does not exist"),
        ([record("slot 0 failed while loading: boom"), record("Shutting down", "info")], 3, "boom"),
        ([record("no worker can become ready; stopping: boom")], 3, "boom"),
        ([record("boom"), record("Worker failed to boot.", logger="gunicorn.error")], 3, "boom"),
        ([record("Worker failed to boot.", logger="gunicorn.error")], 3, "Worker failed to boot."),
        (["Traceback (most recent call last):", "ImportError: no torch", ""], 1, "ImportError: no torch"),
        (["", "[1, 2]", '"text"', "null"], 1, "null"),
        ([record("a warning", "warning")], -9, "killed by SIGKILL, perhaps out of memory"),
        ([], 5, "the service ended with exit code 5 and no word"),
    ],
    ids=lambda value: "",
)
def test_the_reason_is_found_in_the_log(lines: list[str], code: int, said: str) -> None:
    """Our own last error is the best, then Gunicorn's, then whatever was written last."""
    assert problem_of("\n".join(lines), code) == said


@pytest.mark.parametrize(
    ("problem", "no_room"),
    [
        ("no room for a batch of 64 tokens: x", True),
        ("CUDA out of memory. Tried to allocate", True),
        ("killed by SIGKILL, perhaps out of memory", True),
        ("the model has no weights", False),
    ],
)
def test_want_of_memory_is_told_from_other_failures(problem: str, *, no_room: bool) -> None:
    """The first is a row of the table, the others end the plan."""
    assert Failed(OWN, problem).no_room is no_room


ANSWER: dict[str, Any] = {
    "budget": {
        "sum": {"cost": {"context": 0, "weights": 0, "batch": 0, "host": 5}, "host": {"name": "host"}}
    },
    "workers": [{"max_batch_tokens": 512, "stage_seconds": STAGES}],
}
ANSWER["budget"]["sum"] |= {"host": {"name": "host", "total": 9, "utilization": 0.9}, "devices": []}


def test_a_measurement_is_what_the_listeners_say() -> None:
    """The sum and the stages by /workers, precision and longest text by /info, which may be silent."""
    info = {"model_dtype": "bfloat16", "max_input_length": 256}
    found = measured(OWN, ANSWER, info, 3.5)
    expected = Sum(WorkerCost(0, 0, 0, 5), Room("host", 9, 0.9))
    assert found == Scouted(OWN, expected, "bfloat16", 512, 256, 3.5, STAGES)
    assert measured(OWN, ANSWER, {}, 3.5) == Scouted(OWN, expected, "auto", 512, 0, 3.5, STAGES)


def test_a_worker_that_measured_nothing_is_a_failure() -> None:
    """Ready without a sum: said, not guessed."""
    found = measured(OWN, ANSWER | {"budget": {"text": []}}, {}, 1.0)
    assert isinstance(found, Failed)
    assert "did not measure itself" in found.problem


@pytest.mark.parametrize(
    ("state", "progress", "doing", "expected"),
    [
        ("loading", 0.0, None, (0.1, "loading")),
        ("warming", 0.0, "batch 1x8", (0.3, "warming batch 1x8")),
        ("warming", 1.0, "", (1.0, "warming")),
        ("ready", 1.0, "", (1.0, "ready")),
    ],
)
def test_a_bar_follows_the_state(
    state: str, progress: float, doing: str | None, expected: tuple[float, str]
) -> None:
    """The state's share of a boot, and within warm-up its own progress."""
    done, said = stage_of({"state": state, "progress": progress, "doing": doing})
    assert (round(done, 6), said) == expected


# What fits


def test_a_machine_one_does_not_have_is_empty() -> None:
    """Totals are as asked and nobody else uses them; shares, and what the arbiter takes, stay."""
    made = fitted(ON_GPUS, Machine(80 * GIB, 3, 256 * GIB), 4, None)
    assert [(room.name, room.total, room.others) for room in made.devices] == [
        (f"gpu{nth}", 80 * GIB, 0) for nth in range(3)
    ]
    assert (made.host.total, made.host.others, made.host.shared) == (256 * GIB, 0, GIB)
    assert {room.utilization for room in (*made.devices, made.host)} == {0.9}


def test_without_overrides_the_machine_is_as_it_was_measured() -> None:
    """On a CPU its cores bind, on GPUs only cores that are asked for."""
    assert fitted(ON_GPUS, Machine(), 4, None) == ON_GPUS
    assert fitted(ON_CPU, Machine(), 4, None) == replace(ON_CPU, cores=4)
    assert fitted(ON_CPU, Machine(cores=9), 4, 3) == replace(ON_CPU, cores=9, max_workers=3)
    assert fitted(ON_GPUS, Machine(cores=9), 4, None) == replace(ON_GPUS, cores=9)


@pytest.mark.parametrize("machine", [Machine(gpu_memory=GIB), Machine(gpus=1)])
def test_gpus_cannot_be_planned_from_a_cpu(machine: Machine) -> None:
    """Nobody knows what the model takes of a GPU: refused in one sentence."""
    with pytest.raises(ForecastError, match="has to be measured on a machine that has one"):
        fitted(ON_CPU, machine, 4, None)


def test_a_worked_example_of_an_80_gib_gpu() -> None:
    """0.9 x 80 GiB / (500 MiB + 2 GiB + 5 % of these 2) = 27 on each; 256 GiB of host hold more."""
    found = row(ON_GPUS, Machine(80 * GIB, 2, 256 * GIB))
    assert found.plan
    assert (fits_in(found)["device"], int(fits_in(found)["host"]) > 150) == ("27", True)
    assert (found.plan.fits, found.plan.binding) == (54, "gpu0")


def test_devices_that_differ_are_listed() -> None:
    """A GPU that others use has room for fewer."""
    assert fits_in(row(ON_GPUS))["device"] == "7, 8"


def test_a_row_says_what_is_not_as_asked() -> None:
    """Lowered tokens, texts that are cut, and what does not fit at all."""
    lowered = scouted(asked=Combination("auto", 512), tokens=128)
    note = forecast(lowered, Machine(), Settings(), 4, 256).note
    assert note == "lowered from 512: no room for more; cuts texts, of which the model takes 256 tokens"
    assert row().note == ""
    assert forecast(NO_ROOM, Machine(), Settings(), 4, 256).note.startswith(
        "does not fit: no room for a batch"
    )
    assert forecast(BROKEN, Machine(), Settings(), 4, 256).note == "the model has no weights"


@pytest.mark.parametrize(
    ("wanted", "workers", "said"),
    [
        ({}, 4, ""),
        ({"workers": "auto"}, 4, ""),
        ({"workers": "auto", "max_workers": 3}, 3, ""),
        ({"workers": 2}, 2, ""),
        ({"workers": 9}, 4, "9 workers are wanted, 4 fit: 4 cores / 1 thread a worker; 4 run"),
    ],
)
def test_planned_workers_are_the_wanted_ones_that_fit(
    wanted: dict[str, Any], workers: int, said: str
) -> None:
    """A number that was set is kept as far as it fits; the default is nobody's wish."""
    settings = Settings(**wanted)
    found = forecast(scouted(), Machine(), settings, 4, 256)
    assert found.plan
    assert chosen(settings, found.plan) == (workers, said)


def test_where_not_one_fits_none_is_planned() -> None:
    """Whatever is wanted; the sentence has the sum."""
    found = row(machine=Machine(host_memory=600 * MIB))
    assert found.plan
    assert chosen(Settings(), found.plan) == (0, "")
    workers, said = chosen(Settings(workers=2), found.plan)
    assert workers == 0
    assert said.startswith("not one worker fits: host: 600 MiB * 0.9")


# Bars


def test_bars_add_up_to_the_memory() -> None:
    """Others, shared, workers, free and kept are all there is; slots take the devices in turns."""
    found = row(ON_GPUS)
    assert found.entry
    assert found.plan
    first, second, host = bars(found.entry, found.plan, 3)
    price = ON_GPUS.cost.on_device
    assert (first.workers, second.workers, host.workers) == (2 * price, price, 3 * ON_GPUS.cost.on_host)
    for bar in (first, second, host):
        assert bar.others + bar.shared + bar.workers + bar.free + bar.kept == bar.total


@given(st.lists(st.integers(0, 1 << 40), min_size=5, max_size=5), st.integers(0, 1 << 41))
def test_a_bar_has_its_width_and_its_order(parts: list[int], total: int) -> None:
    """Whatever the sizes, 40 characters, each part once and in order."""
    text = fill(Bar("host", total, *parts))
    assert len(text) == WIDTH
    order = "".join(FILLS.values())
    assert [order.index(one) for one in text] == sorted(order.index(one) for one in text)


def test_a_chart_says_it_without_colour() -> None:
    """Each part by a character of its own, the figures beside it, a legend beneath."""
    bar = Bar("host", 8 * GIB, GIB, GIB, 2 * GIB, 3 * GIB, GIB)
    first, legend = chart([bar]).splitlines()
    assert first == f"host |{'░' * 5}{'▒' * 5}{'█' * 10}{'·' * 15}{' ' * 5}| 4.00 GiB of 8.00 GiB"
    assert legend.startswith("░ others")
    assert chart([replace(bar, total=3 * GIB)]).splitlines()[0].endswith("MORE THAN THERE IS")


# The Helm values


def pod_memory(made: dict[str, Any], workers: int, share: float) -> int:
    """Return the memory limit as the chart sums it up, without /dev/shm."""
    host, base = (int(made[name].removesuffix("Mi")) * MIB for name in ("hostMemory", "baseMemory"))
    return math.ceil((base + workers * host) / share / (64 * MIB)) * 64 * MIB


@given(
    workers=st.integers(1, 256),
    host=st.integers(MIB, 64 * GIB),
    shared=st.integers(0, 64 * GIB),
    share=st.floats(0.05, 1),
)
def test_a_pod_holds_the_workers_it_was_made_for(workers: int, host: int, shared: int, share: float) -> None:
    """The budget's own sum, done in a pod of that size beside what the pod itself is charged for."""
    room = Room("host", 0, share, shared=shared)
    entry = Sum(WorkerCost(0, 0, 0, host), room)
    total = pod_memory(worker(entry), workers, share)
    assert replace(entry, host=replace(room, total=total, others=POD_BYTES - MIB)).plan().fits >= workers


@pytest.mark.parametrize(("boot_s", "patience_s"), [(0.5, 60), (20, 60), (21, 65), (100, 300)])
def test_a_startup_probe_waits_three_boots_or_a_minute(boot_s: float, patience_s: float) -> None:
    """Period times threshold, rounded up to the period."""
    numbers = probe(boot_s)
    assert numbers["periodSeconds"] * numbers["failureThreshold"] == patience_s


def test_loads_that_wait_for_each_other_make_a_boot_longer() -> None:
    """Five workers on two GPUs load in three turns; the first is in the measured boot."""
    assert boot_seconds(Settings(), scouted(ON_GPUS), ON_GPUS, 2) == 10.0
    assert boot_seconds(Settings(), scouted(ON_GPUS), ON_GPUS, 5) == 10.0 + 2 * 3.0
    assert boot_seconds(Settings(concurrent_loads=5), scouted(ON_GPUS), ON_GPUS, 5) == 10.0


def test_values_have_settings_but_no_secrets_and_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs from the defaults goes along, as numbers, booleans and lists; secrets are only named."""
    monkeypatch.setenv("API_KEY", "hunter2")
    settings = Settings(
        cors_origins="https://a, https://b",  # type: ignore[arg-type]
        check_model=True,
        bind="127.0.0.1:1234",
        cache_dir="/home/me",
        api_key_file="/home/me/keys",
        warmup_budget=2.5,
        max_body_bytes=3_000_000,
        workers=7,
        gpu_memory_limit="20GiB",  # type: ignore[arg-type]
    )
    assert others(settings, scouted()) == {
        "corsOrigins": ["https://a", "https://b"],
        "checkModel": True,
        "warmupBudget": 2.5,
        "maxBodyBytes": 3_000_000,
        "maxBatchTokens": 512,
    }
    assert secrets(settings) == ["WARMFLEET_API_KEY", "WARMFLEET_API_KEY_FILE"]
    tried = scouted(asked=Combination("bfloat16", None), tokens=64)
    assert others(Settings(), tried) == {"dtype": "bfloat16", "maxBatchTokens": 64}


def test_each_setting_has_one_place_in_the_chart() -> None:
    """Its own, or one below `settings`; secrets are never printed, nor what is true here alone."""
    assert set(PLACES) | LOCAL <= set(Settings.model_fields)
    assert not set(PLACES) & LOCAL
    secret = {name for name, field in Settings.model_fields.items() if "Secret" in str(field.annotation)}
    assert secret < {name for name, place in PLACES.items() if place in SECRET}
    names = [camel(name) for name in Settings.model_fields]
    assert len(set(names)) == len(names)
    assert (camel("workers"), camel("max_batch_tokens")) == ("workers", "maxBatchTokens")


def test_values_of_the_budget_are_at_the_top() -> None:
    """Only those that differ; and no quorum that the planned workers could never reach."""
    assert top(Settings(), 2) == {}
    settings = Settings(
        workers=8,
        ready_quorum=6,
        ready_floor=2,
        budget_policy="refuse",
        gpu_memory_utilization=0.8,
        gpu_memory_limit="20GiB",  # type: ignore[arg-type]
        host_memory_utilization=0.7,
    )
    assert top(settings, 4) == {
        "budgetPolicy": "refuse",
        "readyQuorum": 4,
        "readyFloor": 2,
        "gpuMemoryUtilization": 0.8,
        "gpuMemoryLimit": "20GiB",
        "hostMemoryUtilization": 0.7,
    }


@pytest.mark.parametrize(
    ("count", "text"),
    [(20 * GIB, "20GiB"), (1536 * MIB, "1536MiB"), (20 * 10**9, "20GB"), (MIB + 1, "1MiB")],
)
def test_sizes_are_texts_that_the_service_reads(count: int, text: str) -> None:
    """A multiple of a unit is exact, and nothing becomes more than it was."""
    assert size_text(count) == text
    read = Settings(gpu_memory_limit=text).gpu_memory_limit  # type: ignore[arg-type]
    assert read == (count if count % 10**6 == 0 or count % MIB == 0 else count - 1)


def test_values_are_yaml_as_helm_reads_it() -> None:
    """The text means what the data says, whatever characters the settings have."""
    settings = Settings(model_id='a "b": {c}\nü #', revision="v1", warmup_shapes="2x8,1x16")  # type: ignore[arg-type]
    made = values(settings, scouted(ON_GPUS), ON_GPUS, 4)
    assert pyyaml.safe_load(yaml(made)) == made
    assert pyyaml.safe_load(yaml({"a": {}, "b": 1})) == {"a": {}, "b": 1}


def test_values_on_gpus_and_on_a_cpu() -> None:
    """The whole of it: as few values as say what was measured, and where it shall run."""
    assert values(Settings(), scouted(ON_GPUS), ON_GPUS, 4) == {
        "workers": 4,
        "gpu": {"enabled": True, "count": 2},
        "worker": {"hostMemory": "1223Mi", "baseMemory": "1088Mi", "cpu": 1},
        "settings": {"maxBatchTokens": 512},
        "startupProbe": {"periodSeconds": 5, "failureThreshold": 12},
    }
    two = replace(ON_CPU, threads=2)
    made = values(Settings(model_id="org/name"), scouted(two), two, 3)
    assert made["model"] == {"id": "org/name"}
    assert made["gpu"] == {"enabled": False}
    assert made["worker"] == {"hostMemory": "206Mi", "baseMemory": "576Mi", "cpu": 2}


# What is said


def printed(rows: list[Row], settings: Settings) -> str:
    console = Console(width=160, highlight=False, color_system=None)
    with console.capture() as capture:
        show(settings, rows, console)
    return capture.get()


def test_data_and_text_say_the_same() -> None:
    """The sum, the workers, the bars' names and the values are in both."""
    rows = [row(ON_GPUS), forecast(NO_ROOM, Machine(), Settings(), 4, 256)]
    told = json.loads(json.dumps(report(Settings(), rows)))
    text = printed(rows, Settings())
    assert told["workers"] == 15
    assert all(line in text for line in told["text"])
    assert yaml(told["values"]) in text
    assert [bar["name"] for bar in told["memories"]] == ["GPU-a", "GPU-b", "host"]
    first, second = told["combinations"]
    assert (first["fits"], first["binding"], first["max_batch_tokens"]) == (15, "GPU-a", 512)
    assert (second["fits"], second["problem"]) == (None, rows[1].note)
    assert "does not fit: no room for a batch" in text


def test_without_a_worker_there_are_no_values() -> None:
    """What fits nowhere gets a table with the reason, and no values to paste."""
    told = report(Settings(), [forecast(NO_ROOM, Machine(), Settings(), 4, 0)])
    assert (told["workers"], told["values"], told["memories"]) == (None, None, [])
    none = row(machine=Machine(host_memory=600 * MIB))
    assert (report(Settings(), [none])["workers"], report(Settings(), [none])["values"]) == (0, None)
    assert "Helm" not in printed([none], Settings())
    assert "Helm" not in printed([forecast(NO_ROOM, Machine(), Settings(), 4, 0)], Settings())


def test_secrets_are_named_beside_the_values() -> None:
    """The reader is told what to pass on, and nobody the value."""
    text = printed([row()], Settings(api_key="hunter2"))  # type: ignore[arg-type]
    assert "# WARMFLEET_API_KEY: from a Secret" in text
    assert "hunter2" not in text


def test_parts_of_the_cost_are_columns() -> None:
    """On a GPU all four, on a CPU the only one there is."""
    assert list(parts_of(row(ON_GPUS))) == ["context", "weights", "batch", "host"]
    assert list(parts_of(row())) == ["host"]
    heads = [column.header for column in table([row(ON_GPUS)]).columns]
    assert heads == [
        *("dtype", "batch tokens", "context", "weights", "batch", "host"),
        *("a GPU", "the host", "workers", "because of"),
    ]


def test_a_row_as_data_has_cost_and_constraints() -> None:
    """What a program needs to do the sum again."""
    told = as_json(row(ON_GPUS))
    assert told["cost"]["on_device"] == ON_GPUS.cost.on_device
    assert [line["name"] for line in told["constraints"]] == ["GPU-a", "GPU-b", "host"]
    assert (told["ready_seconds"], told["stage_seconds"]) == (10.0, STAGES)


# Options


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * GIB), ("24Gi", 24 * GIB), ("80GB", 80 * 10**9), ("512Mi", 512 * MIB), ("1048576", MIB)],
)
def test_sizes_are_read_as_people_and_kubernetes_write_them(text: str, size: int) -> None:
    """Binary and decimal units, with or without the B behind the binary ones."""
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "many", "80", "-1GiB", "1KiB", "80 GiBs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """Among it a bare 80, which would be bytes."""
    with pytest.raises(click.BadParameter, match="write 80GiB, 80Gi or 80GB"):
        SIZE.convert(text, None, None)


def test_lists_are_read_with_commas_between() -> None:
    """Spaces do not matter; each value is checked as if alone."""
    assert TOKENS.convert("512, 1024", None, None) == (512, 1024)
    assert DTYPES.convert("float32,bfloat16", None, None) == ("float32", "bfloat16")
    for kind, text in ((TOKENS, "512,many"), (TOKENS, "7"), (TOKENS, ","), (DTYPES, "float32,int8")):
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)


def test_errors_are_written_for_people() -> None:
    """The command line prints all of them as one line."""
    assert issubclass(PlanError, WarmfleetError)
    assert issubclass(ForecastError, WarmfleetError)
