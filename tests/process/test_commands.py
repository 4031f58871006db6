# SPDX-License-Identifier: Apache-2.0
"""`warmfleet plan`, `check`, `scale` and `roll` against real services: what they say, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import PATIENCE_S, ROOT, SCENARIOS, Service, processes, runs, until
from test_cli import CLI, busy_port, descendants, pickled, read_until

STUB = ["--backend", "stub", "--device", "cpu"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for temporary files and caches, so that what is left behind is seen."""
    for name in ("temporary", "caches"):
        (tmp_path / name).mkdir()
    return tmp_path


def environ_of(place: Path, **ours: str) -> dict[str, str]:
    """Return an environment with these settings alone, and temporary files in their place."""
    plain = {name: value for name, value in Service().environ.items() if not name.startswith("WARMFLEET_")}
    return plain | {"TMPDIR": str(place / "temporary"), "XDG_CACHE_HOME": str(place / "caches")} | ours


def run(place: Path, *arguments: str, **ours: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line to its end."""
    return subprocess.run(
        [*CLI, *arguments],
        cwd=ROOT,
        env=environ_of(place, **ours),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def left_over(place: Path) -> list[Path]:
    """Return what a command has left in its temporary folder and its caches."""
    return [path for path in place.rglob("*") if path.parent != place]


def scouts(place: Path) -> list[int]:
    """Return the processes whose temporary folder is this one."""
    found = []
    for one in processes():
        with contextlib.suppress(OSError):
            if str(place).encode() in Path(f"/proc/{one.pid}/environ").read_bytes():
                found.append(one.pid)
    return found


def assert_nothing_is_left(place: Path) -> None:
    assert left_over(place) == []
    until(lambda: not scouts(place), what="no process is left")


# plan


def test_plan_as_data(place: Path) -> None:
    """Three budgets are measured by real boots; stdout is JSON, stderr silent, and nothing is left behind."""
    done = run(
        place, "plan", *STUB, "--json", "--stub-memory-mb", "100", "--cores", "64", "--host-memory", "2Gi"
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    tried = told["combinations"]
    assert [one["max_batch_tokens"] for one in tried] == [512, 256, 1024]
    for one in tried:
        assert one["cost"]["host"] > 100e6
        assert (one["binding"], one["note"]) == ("host", "")
        host = next(line for line in one["constraints"] if line["name"] == "host")
        assert one["fits"] == host["budget"] // host["price"] < 2**31 // 100e6
        assert one["ready_seconds"] > sum(one["stage_seconds"].get(stage, 0) for stage in ("load", "warmup"))
    assert told["workers"] == tried[0]["fits"]
    assert told["values"]["workers"] == told["workers"]
    assert told["values"]["gpu"] == {"enabled": False}
    assert told["values"]["settings"] == {"backend": "stub", "stubMemoryMb": 100.0, "maxBatchTokens": 512}
    assert told["values"]["startupProbe"] == {"periodSeconds": 5, "failureThreshold": 12}
    assert_nothing_is_left(place)


def test_plan_in_words_beside_a_running_service(place: Path) -> None:
    """It shares nothing with a service of the same settings: ports, counters and limits are its own."""
    with Service(workers=2, metrics_dir=str(place / "counters"), ready_floor=2) as service:
        service.wait_ready()
        before = service.pids()
        counters = sorted((place / "counters").iterdir())
        settings = {name: value for name, value in service.environ.items() if name.startswith("WARMFLEET_")}
        done = run(
            place, "plan", "--max-batch-tokens", "512,128", "--workers", "3", "--cores", "2", **settings
        )
        assert (done.returncode, done.stderr) == (0, "")
        for part in ("float32", "512", "128", "cuts texts, of which the model takes 256 tokens"):
            assert part in done.stdout
        assert "3 workers are wanted, 2 fit: 2 cores / 1 thread a worker; 2 run" in done.stdout
        assert "memory with 2 workers at their worst batch:\nhost |" in done.stdout
        assert "\nworkers: 2\ngpu:\n  enabled: false\n" in done.stdout
        assert (service.pids(), sorted((place / "counters").iterdir())) == (before, counters)
    until(lambda: not scouts(place / "temporary"), what="no process is left")
    assert list((place / "temporary").iterdir()) == []


def test_plan_of_the_real_model(place: Path) -> None:
    """One boot of MiniLM: its weights are the arbiter's, shared; a worker's own pages are far less."""
    done = run(place, "plan", "--device", "cpu", "--max-batch-tokens", "512", "--json", HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stderr) == (0, "")
    (only,) = json.loads(done.stdout)["combinations"]
    assert (only["dtype"], only["max_batch_tokens"]) == ("float32", 512)
    assert only["shared"] > 100e6
    assert 1e6 < only["cost"]["host"] < only["shared"]
    assert only["fits"] >= 1
    assert_nothing_is_left(place)


def test_a_combination_without_room_is_a_row(place: Path) -> None:
    """Warm-up finds room for 256 tokens alone, and says so beside the figures of what it found."""
    scenario = str(SCENARIOS / "oom_above_256_tokens.toml")
    done = run(place, "plan", *STUB, "--max-batch-tokens", "512,256", "--stub-scenario", scenario, "--json")
    assert done.returncode == 0
    rows = [(one["max_batch_tokens"], one["note"]) for one in json.loads(done.stdout)["combinations"]]
    assert rows == [(256, "lowered from 512: no room for more"), (256, "")]


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        ("oom_warm", "does not fit: no room for a batch of 256 tokens: scripted out of memory in warm"),
        ("kill_load", "does not fit: killed by SIGKILL, perhaps out of memory"),
    ],
)
def test_a_model_that_fits_nowhere_is_a_table_all_the_same(place: Path, scenario: str, said: str) -> None:
    """Each combination says why; there are no values, and the exit code is 1."""
    path = str(SCENARIOS / f"{scenario}.toml")
    done = run(place, "plan", *STUB, "--max-batch-tokens", "512,256", "--stub-scenario", path, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    assert [one["problem"] for one in told["combinations"]] == [said] * 2
    assert (told["workers"], told["values"]) == (None, None)
    assert_nothing_is_left(place)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--stub-scenario", str(SCENARIOS / "fail_load.toml")], 1, "warmfleet: scripted error in load\n"),
        (
            ["--backend", "torch", "--model-id", "/no/such"],
            1,
            "warmfleet: model /no/such: /no/such does not exist;",
        ),
        (["--workers", "0"], 1, "warmfleet: WARMFLEET_WORKERS=0: "),
        (["--gpus", "4"], 1, "warmfleet: the model runs on the CPU here; what it takes of a GPU has to be"),
        (["--gpu-memory", "80"], 2, "'80' is not a size of 1 MiB or more; write 80GiB, 80Gi or 80GB"),
        (["--max-batch-tokens", "512,some"], 2, "'some' is not a valid integer range"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_is_said_in_one_line(
    place: Path, arguments: list[str], code: int, said: str
) -> None:
    """Exit code 1, or 2 for the command line itself; no table, and nothing left behind."""
    done = run(place, "plan", *STUB, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert code == 2 or len(done.stderr.splitlines()) == 1
    assert_nothing_is_left(place)


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)],
    ids=["Ctrl-C", "SIGTERM"],
)
@pytest.mark.parametrize("scenario", ["hang_load", "hold_gil_load_once"])
def test_a_plan_that_is_stopped_leaves_nothing(
    place: Path, signum: signal.Signals, code: int, scenario: str
) -> None:
    """On a terminal, amid a load: child, workers and folder are gone, even if the load does not listen."""
    screen, terminal = pty.openpty()
    arguments = ["plan", *STUB, "--stub-scenario", str(SCENARIOS / f"{scenario}.toml")]
    plan = subprocess.Popen(
        [*CLI, *arguments],
        cwd=ROOT,
        env=environ_of(place, TERM="xterm", COLUMNS="120"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        # A background job of a shell is born deaf to Ctrl-C, and so would be what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    )
    os.close(terminal)
    children: list[int] = []
    try:
        text = read_until(screen, "loading" if scenario == "hang_load" else "starting")
        assert "1: auto, default tokens a batch" in text
        until(lambda: len(descendants(plan.pid)) == 2, what="the arbiter and its worker run")
        children = descendants(plan.pid)
        plan.send_signal(signum)
        text = read_until(screen, None)
        assert plan.wait(PATIENCE_S) == code
        assert "Traceback" not in text
        until(lambda: not any(runs(child) for child in children), what="no process is left")
        assert_nothing_is_left(place)
    finally:
        plan.kill()
        for child in children:
            if runs(child):
                os.kill(child, signal.SIGKILL)
        plan.wait()
        os.close(screen)


# check


def test_check_says_what_a_start_would_do(place: Path) -> None:
    """Settings, slots, memory and listeners, with nothing measured yet; torch is never imported."""
    shim, mark = place / "shim", place / "torch-was-imported"
    shim.mkdir()
    (shim / "torch.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise ImportError('too early')\n")
    with busy_port() as busy:
        done = run(
            place,
            *("check", "--device", "cpu", "--workers", "2", "--api-key", "hunter2", "--bind", busy),
            PYTHONPATH=f"{shim}:{ROOT}",
        )
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "  WARMFLEET_API_KEY=***",
        "  slot 0 on cpu, slot 1 on cpu",
        f"  bind {busy}: address already in use",
        "  not measured yet: `warmfleet plan` measures",
        "  2 workers start, as far as they fit",
    ):
        assert line in done.stdout.splitlines()
    assert "hunter2" not in done.stdout
    assert not mark.exists()


def test_check_as_data_knows_the_running_service(place: Path) -> None:
    """Its sum is that of the service on its ops listener, which is named; the fleet does not notice."""
    with Service(workers=2) as service:
        service.wait_ready()
        settings = {name: value for name, value in service.environ.items() if name.startswith("WARMFLEET_")}
        done = run(place, "check", "--json", **settings)
        assert (done.returncode, done.stderr) == (0, "")
        told = json.loads(done.stdout)
        assert told["listeners"]["ops_bind"].endswith(
            f"in use, by a warmfleet with arbiter {service.arbiter}"
        )
        assert told["budget"][0] == "as the running service measured it"
        assert (told["workers"], told["verdict"]) == (2, "2 workers would run")
        assert service.embed().ok


@pytest.mark.parametrize("data", [[], ["--json"]], ids=["text", "data"])
def test_check_refuses_what_a_start_refuses(place: Path, data: list[str]) -> None:
    """Exit code 1 and the same one line."""
    done = run(place, "check", "--model-id", str(pickled(place / "model")), *data)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("warmfleet: ")
    assert "as a pickle (pytorch_model.bin), not as safetensors" in line


# scale and roll


@pytest.fixture
def control(place: Path) -> Any:
    """Run a command against a service."""

    def call(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(place, *arguments, "--ops-bind", service.ops_bind)

    return call


def test_scale_up_and_down(control: Any) -> None:
    """Two to four workers and back to one, each said in a line; the fleet follows."""
    with Service(workers=2) as service:
        service.wait_ready()
        done = control(service, "scale", "4")
        assert (done.returncode, done.stdout, done.stderr) == (0, "2 -> 4 workers\n", "")
        service.wait(lambda: list(service.states().values()) == ["ready"] * 4, what="four are ready")
        done = control(service, "scale", "1")
        assert (done.returncode, done.stdout) == (0, "4 -> 1 workers\n")
        service.wait(lambda: list(service.states().values()) == ["ready"], what="one is left")
        done = control(service, "scale", "1")
        assert (done.returncode, done.stdout) == (0, "1 workers, as before\n")
        assert service.embed().ok


def test_scale_stops_where_the_budget_does(control: Any) -> None:
    """`auto` grows to its cap of two; four are refused with the sum, and exit code 1."""
    with Service(workers="auto", max_workers=2, threads=1) as service:
        service.wait(lambda: list(service.states().values()) == ["ready"] * 2, what="two are ready")
        done = control(service, "scale", "4")
        assert (done.returncode, done.stderr) == (1, "")
        first, *rest = done.stdout.splitlines()
        assert first == "2 -> 2 workers, not 4: the budget allows no more"
        assert rest[-1].endswith("allows no more")
        assert service.get("/workers").json()["target"] == 2
        done = control(service, "scale", "1")
        assert (done.returncode, done.stdout) == (0, "2 -> 1 workers\n")


def test_roll_and_wait_for_fresh_workers(control: Any) -> None:
    """Every process is another one afterwards, and no request was lost meanwhile."""
    with Service(workers=2) as service:
        service.wait_ready()
        before = service.pids()
        with service.load(clients=2) as load:
            done = control(service, "roll", "--wait")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "rolling restart: epoch 1\n2 workers are ready in epoch 1\n"
        assert not set(before.values()) & set(service.pids().values())
        assert load.lost == []


def test_roll_without_waiting(control: Any) -> None:
    """It says that the roll has begun; that goes on without it."""
    with Service(workers=1) as service:
        service.wait_ready()
        (before,) = service.pids().values()
        done = control(service, "roll")
        assert (done.returncode, done.stdout) == (0, "rolling restart: epoch 1\n")
        service.wait(lambda: service.pids() and before not in service.pids().values(), what="a fresh worker")


def test_roll_that_is_not_over_in_time_says_who_is_missing(control: Any) -> None:
    """Exit code 1; the roll goes on."""
    with Service(workers=1, stub_scenario="slow_respawn") as service:
        service.wait_ready()
        done = control(service, "roll", "--wait", "--timeout", "0.5")
        assert done.returncode == 1
        assert "warmfleet: the rolling restart is not over after 0.5 s: " in done.stderr


@pytest.mark.parametrize("command", [["scale", "2"], ["roll"]], ids=["scale", "roll"])
def test_nobody_there_is_said_in_one_line(place: Path, command: list[str]) -> None:
    """Exit code 3, as of every command that asks a service."""
    with busy_port() as bind:
        pass
    done = run(place, *command, "--ops-bind", bind)
    assert (done.returncode, done.stdout) == (3, "")
    port = bind.rpartition(":")[2]
    assert done.stderr == (
        f"warmfleet: nobody answers on http://localhost:{port}; "
        "is the service running, and is that its ops listener?\n"
    )


@pytest.mark.parametrize("workers", ["0", "257", "many"])
def test_a_number_that_cannot_be_is_a_wrong_command_line(place: Path, workers: str) -> None:
    """Exit code 2, before anybody is asked."""
    done = run(place, "scale", workers)
    assert (done.returncode, done.stdout) == (2, "")
