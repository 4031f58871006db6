# SPDX-License-Identifier: Apache-2.0
"""Commands about a running service, against real ones: `status`, `wait`, `top`, `scale`, `roll`, `bench`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import PATIENCE_S, ROOT, Service, free_port, until
from screens import Terminal
from test_cli import CLI, run

if TYPE_CHECKING:
    from collections.abc import Iterator

BIN = Path(sys.executable).parent
HEAVY = re.compile(r"\b(torch|transformers|fastapi|starlette|uvicorn|gunicorn|prometheus_client)\b")
LEAVES_THE_ALTERNATE_SCREEN = b"\x1b[?1049l"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Service]:
    """Two workers that are ready; tests that change a service have one of their own."""
    with Service(workers=2, stub_forward_ms=2, api_key="hunter2") as service:
        service.wait_ready()
        yield service


def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    """Start a command that waits."""
    return subprocess.Popen(
        [*CLI, *arguments],
        cwd=ROOT,
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def nobody() -> str:
    """Return an address that nobody answers on."""
    return f"127.0.0.1:{free_port()}"


# status


def test_status_says_how_it_is(fleet: Service) -> None:
    """The verdict, a row for each worker, the budget; exit code 0, as it is ready."""
    done = run([*CLI, "status", fleet.ops_bind])
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "serving: 2 of 2 ready"
    assert f"arbiter {fleet.arbiter} " in lines[1]
    heads = lines.index(next(line for line in lines if line.startswith("slot")))
    assert [line.split()[:2] for line in lines[heads + 1 : heads + 3]] == [["0", "ready"], ["1", "ready"]]
    assert "\x1b" not in done.stdout
    assert "hunter2" not in done.stdout


def test_status_as_data_is_the_document(fleet: Service) -> None:
    """The one of /status; the address may be in the settings, too."""
    done = run([*CLI, "status", "--json"], WARMFLEET_OPS_BIND=fleet.ops_bind)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout).keys() == fleet.get("/status").json().keys()


def test_status_of_a_cold_service_is_not_ready() -> None:
    """Exit code 1, and the first line says why; also `wait` gives up in time, with the same."""
    with Service(workers=1, stub_load_ms=60_000) as service:
        service.wait_state(0, "loading")
        done = run([*CLI, "status", service.ops_bind])
        assert (done.returncode, done.stderr) == (1, "")
        assert "0 of 1 ready" in done.stdout.splitlines()[0]
        done = run([*CLI, "wait", "--timeout", "0.2", service.ops_bind])
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1].startswith("warmfleet: not ready after 0.2 s: ")


@pytest.mark.parametrize(
    "command", [["status"], ["wait", "--timeout", "0"], ["scale", "2"], ["roll"], ["bench"]]
)
def test_nobody_there_has_an_exit_code_of_its_own(command: list[str]) -> None:
    """3, and one line that names the address."""
    address = nobody()
    done = run([*CLI, *command, address])
    assert (done.returncode, done.stdout) == (3, "")
    *_, line = done.stderr.splitlines()
    assert line.startswith(
        f"warmfleet: nobody answers on http://localhost:{address.rpartition(':')[2]}; is the"
    )


def test_the_api_is_not_the_ops_listener(fleet: Service) -> None:
    """The likeliest mistake has a sentence."""
    done = run([*CLI, "status", fleet.bind])
    assert (done.returncode, done.stdout) == (3, "")
    assert "but not with the status of a warmfleet; is it the ops listener, not the API?" in done.stderr


@pytest.mark.parametrize("command", ["status", "wait", "scale 2", "roll", "top"])
def test_no_command_loads_what_the_service_needs(fleet: Service, command: str) -> None:
    """Neither torch nor a web framework: a command answers at once."""
    address = fleet.ops_bind if command in ("status", "wait") else nobody()
    done = run([sys.executable, "-X", "importtime", "-m", "service", *command.split(), address])
    assert done.returncode in (0, 2, 3)
    loaded = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line]
    assert len(loaded) > 50
    assert [name for name in loaded if HEAVY.search(name)] == []


@pytest.mark.parametrize("command", ["settings", "status ADDRESS", "status --json ADDRESS"])
def test_a_reader_who_has_read_enough_sees_no_traceback(fleet: Service, command: str) -> None:
    """`| head -1` closes the pipe."""
    line = f"{sys.executable} -m service {command.replace('ADDRESS', fleet.ops_bind)} | head -1"
    done = run(["bash", "-c", line])
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_for_terminals_that_want_them(
    fleet: Service, environ: dict[str, str], *, coloured: bool
) -> None:
    """NO_COLOR is heeded."""
    with Terminal([*CLI, "status", fleet.ops_bind], os.environ | environ) as terminal:
        assert terminal.wait_end() == 0
        assert "serving: 2 of 2 ready" in terminal.text
        assert (b"\x1b[1;32m" in terminal.raw) is coloured


# wait


def test_wait_may_begin_before_the_service() -> None:
    """It says each step on stderr, and the verdict at the end on stdout."""
    service = Service(workers=1, stub_load_ms=500)
    waiting = start("wait", "--timeout", str(PATIENCE_S), service.ops_bind)
    with service:
        said, steps = waiting.communicate(timeout=PATIENCE_S)
        assert (waiting.returncode, said) == (0, "serving: 1 of 1 ready\n")
        assert service.ready()[0] == 200
        assert "Traceback" not in steps


def test_wait_ends_with_a_service_that_ends() -> None:
    """Exit code 4, long before the time is over: it was seen, and its arbiter is no more."""
    with Service(workers=1, stub_load_ms=60_000) as service:
        service.wait_state(0, "loading")
        waiting = start("wait", service.ops_bind)
        assert waiting.stderr
        assert "0 of 1 ready" in waiting.stderr.readline()
        service.signal(signal.SIGKILL)
        said, problem = waiting.communicate(timeout=PATIENCE_S)
        assert (waiting.returncode, said) == (4, "")
        assert problem.splitlines()[-1].startswith("warmfleet: the service has ended before it was ready; ")
        service.wait_end()
        until(lambda: not service.survivors(), what="its worker has noticed")


# scale and roll


def test_scale_waits_until_so_many_are_ready() -> None:
    """Up, and down to where no other is left."""
    with Service(workers=1) as service:
        service.wait_ready()
        for wanted, said in (
            ("2", "1 -> 2 workers\n2 workers are ready\n"),
            ("1", "2 -> 1 workers\n1 workers are ready\n"),
        ):
            done = run([*CLI, "scale", wanted, "--wait", service.ops_bind])
            assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
            assert list(service.states().values()) == ["ready"] * int(wanted)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_scale_ends_with_a_service_that_ends_meanwhile(signum: signal.Signals) -> None:
    """Exit code 1 and a clear sentence, whether it was told to stop or killed."""
    with Service(workers=1, stub_load_ms=60_000) as service:
        service.wait_state(0, "loading")
        scaling = start("scale", "2", "--wait", service.ops_bind)
        assert scaling.stdout
        assert scaling.stdout.readline() == "1 -> 2 workers\n"
        service.signal(signum)
        said, problem = scaling.communicate(timeout=PATIENCE_S)
        assert (scaling.returncode, said) == (1, "")
        assert re.fullmatch(
            r"warmfleet: (there are not 2 workers: the service is stopping"
            r"|the service has ended meanwhile; its log says why)\n",
            problem,
        )
        service.wait_end()
        until(lambda: not service.survivors(), what="its workers have noticed")


def test_roll_shows_each_worker_on_a_terminal() -> None:
    """Bars while it lasts, and the same two lines as elsewhere at the end."""
    with Service(workers=2, stub_load_ms=200) as service:
        service.wait_ready()
        with Terminal([*CLI, "roll", "--wait", service.ops_bind], os.environ) as terminal:
            assert terminal.wait_end() == 0
            assert "rolling restart: epoch 1\n2 workers are ready in epoch 1" in terminal.text
            assert b"slot 0" in terminal.raw
            assert b"slot 1" in terminal.raw
        assert [row["epoch"] for row in service.workers().values()] == [1, 1]


FAKE_KUBECTL = """#!/bin/sh
printf '%s\\n' "$@" > "$KUBECTL_WAS_TOLD"
while [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""


def test_kubectl_runs_the_command_in_the_pod(tmp_path: Path) -> None:
    """Its arguments arrive one by one, its output and its exit code come back."""
    kubectl, told = tmp_path / "kubectl", tmp_path / "told"
    kubectl.write_text(FAKE_KUBECTL)
    kubectl.chmod(0o755)
    with Service(workers=1) as service:
        service.wait_ready()
        environ = {
            "PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}",
            "KUBECTL_WAS_TOLD": str(told),
            "WARMFLEET_OPS_BIND": service.ops_bind,
        }
        there = ["--kubectl", "deploy/warmfleet", "--namespace", "ml"]
        done = run([*CLI, "scale", "2", "--wait", *there], **environ)
        assert (done.returncode, done.stdout, done.stderr) == (0, "1 -> 2 workers\n2 workers are ready\n", "")
        assert told.read_text().splitlines() == [
            *("exec", "--namespace=ml", "deploy/warmfleet", "--", "warmfleet", "scale", "--wait", "2")
        ]
        done = run([*CLI, "status", *there], **environ)
        assert done.stdout.startswith("serving: 2 of 2 ready\n")
    done = run([*CLI, "status", *there], **environ)
    assert done.returncode == 3


# top


def test_top_shows_a_service_its_going_and_its_coming_back() -> None:
    """Live on the alternate screen, in the size that the window has; `q` gives the terminal back."""
    with Service(workers=2) as service:
        service.wait_ready()
        with Terminal([*CLI, "top", service.ops_bind], os.environ) as terminal:
            terminal.wait_for("serving: 2 of 2 ready", "live", "q leaves", "1  ready", "texts/s", "fits")
            assert not terminal.echoes
            for _ in range(3):
                assert service.embed().ok
            terminal.wait_for("with 200")
            terminal.resize(60, 12)
            terminal.wait_for("serving: 2 of 2 ready", "1  ready")
            terminal.resize(120, 40)
            service.stop()
            terminal.wait_for("nobody has answered for", "trying again")
            successor = Service(workers=1, bind=service.bind, ops_bind=service.ops_bind)
            with successor:
                terminal.wait_for("serving: 1 of 1 ready", f"arbiter {successor.arbiter}")
                terminal.type("q")
                assert terminal.wait_end() == 0
            assert LEAVES_THE_ALTERNATE_SCREEN in terminal.raw
            assert terminal.echoes
            assert b"Traceback" not in terminal.raw


@pytest.mark.parametrize("key", ["\x03", "\x04", "Q"], ids=["Ctrl-C", "Ctrl-D", "Q"])
def test_top_before_the_service_says_so_and_can_be_left(key: str) -> None:
    """It waits for a service, not for ever."""
    with Terminal([*CLI, "top", nobody()], os.environ) as terminal:
        terminal.wait_for("is the service running")
        terminal.type(key)
        assert terminal.wait_end() == 0
        assert terminal.echoes
        assert b"Traceback" not in terminal.raw


def test_top_that_is_ended_gives_the_terminal_back() -> None:
    """Also by a signal."""
    with Terminal([*CLI, "top", nobody()], os.environ) as terminal:
        terminal.wait_for("is the service running")
        terminal.process.terminate()
        assert terminal.wait_end() == 128 + signal.SIGTERM
        assert LEAVES_THE_ALTERNATE_SCREEN in terminal.raw
        assert terminal.echoes


# bench


def test_bench_measures_and_saves(fleet: Service, tmp_path: Path) -> None:
    """Figures in the terminal and in two files; the key is used, and shown nowhere."""
    data, page = tmp_path / "bench.json", tmp_path / "bench.html"
    files = ["--json", str(data), "--html", str(page)]
    load = ["--seconds", "1", "--clients", "2", "--texts", "3"]
    done = run([*CLI, "bench", fleet.bind, *load, *files], WARMFLEET_API_KEY="hunter2")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(data.read_text())
    replies = told["statuses"]["200"]
    assert list(told["statuses"]) == ["200"]
    assert sum(bucket["count"] for bucket in told["histogram"]) == replies > 0
    assert told["texts_per_second"] == pytest.approx(3 * told["requests_per_second"])
    assert 0.002 <= told["server"]["forward"] <= told["latency"]["mean"]
    assert list(told["server"]) == ["tokenize", "queue", "forward"]
    assert f"replies: {replies} with 200" in done.stdout
    for text in (done.stdout, data.read_text(), page.read_text()):
        assert "hunter2" not in text
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("key", "ops", "said"),
    [
        ("", False, "answers 401: "),
        ("hunter2", True, "answers 404: "),
    ],
    ids=["no key", "the ops listener"],
)
def test_bench_says_what_keeps_it_from_measuring(fleet: Service, key: str, said: str, *, ops: bool) -> None:
    """One line and exit code 1, and no statistics of errors."""
    done = run(
        [*CLI, "bench", fleet.ops_bind if ops else fleet.bind], **({"WARMFLEET_API_KEY": key} if key else {})
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert said in line
    assert "hunter2" not in line


def test_bench_goes_on_through_overload_and_a_roll() -> None:
    """Refusals are counted and remarked; connections that the service closes are opened again."""
    with Service(workers=1, stub_forward_ms=50, max_concurrent_requests=2, max_batch_requests=1) as service:
        service.wait_ready()
        load = start("bench", service.bind, "--seconds", "2", "--clients", "8")
        service.wait(
            lambda: service.get("/workers").json()["workers"][0]["load"] > 0, what="it is under load"
        )
        service.signal(signal.SIGHUP)
        said, problem = load.communicate(timeout=PATIENCE_S)
        assert (load.returncode, problem) == (1, "")
        assert "refused with 429: this is overload" in said
        assert " lost" not in said


def test_ctrl_c_ends_a_bench_early_with_what_it_has() -> None:
    """The figures of the time until then."""
    with Service(workers=1) as service:
        service.wait_ready()
        with Terminal([*CLI, "bench", service.bind, "--seconds", "600"], os.environ) as terminal:
            terminal.wait_for("texts/s; Ctrl-C ends it early")
            terminal.type("\x03")
            assert terminal.wait_end() == 0
            assert b"latency" in terminal.raw
            assert b"Traceback" not in terminal.raw


# The shell, the browser


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("stat", "status"), ("status --js", "status --json"), ("completion f", "completion fish")],
    ids=["a command", "an option", "a choice"],
)
def test_completion_works_in_a_real_bash(typed: str, completed: str) -> None:
    """Whoever types the beginning and Tab gets the rest."""
    environ = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PS1": "> ", "INPUTRC": "/dev/null"}
    with Terminal(["bash", "--norc", "--noprofile", "-i"], environ) as terminal:
        terminal.type('eval "$(warmfleet completion bash)"; echo do"ne"\n')
        terminal.wait_for("\ndone")
        terminal.type(f"warmfleet {typed}\t")
        terminal.wait_for(f"> warmfleet {completed}")


def test_serve_opens_the_status_page(tmp_path: Path) -> None:
    """As soon as ops answers, which is before the service is ready."""
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    service = Service(workers=1, stub_load_ms=60_000)
    with Terminal([*CLI, "serve", "--open"], service.environ | {"BROWSER": str(browser)}) as terminal:
        terminal.wait_for("slot 0")
        until(lambda: opened.exists() and opened.read_text().strip(), what="the browser was called")
        assert opened.read_text() == f"http://localhost:{service.ops_bind.rpartition(':')[2]}/\n"
        terminal.type("\x03")
        terminal.wait_end()


def test_serve_off_a_terminal_says_where_the_page_is() -> None:
    """And starts all the same: what cannot work later ends it as ever."""
    done = run([*CLI, "serve", "--open", "--model-id", "/no/such/folder"])
    first, second = done.stderr.splitlines()
    assert first.startswith("warmfleet: --open needs a terminal; the status page is http://localhost:")
    assert "/no/such/folder does not exist" in second
