# SPDX-License-Identifier: Apache-2.0
"""What a person at a terminal meets: one clear line for what cannot work, progress for what can."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import fakecuda
import pytest
from harness import PATIENCE_S, ROOT, Service, free_port, process, runs, until
from rich.console import Console

import service as package
from service.ops_client import Address, ask
from service.progress import _copy_log
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

fake_libraries, fake_driver = fakecuda.fake_libraries, fakecuda.fake_driver  # fixtures

CLI = [sys.executable, "-m", "service"]
STARTS = {
    "warmfleet serve": [*CLI, "serve"],
    "gunicorn": [sys.executable, "-m", "gunicorn", "-c", "gunicorn_conf.py"],
}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself, in an environment without other settings than these."""
    plain = Service().environ
    for name in [name for name in plain if name.startswith("WARMFLEET_") and not name.endswith("BIND")]:
        del plain[name]
    return subprocess.run(
        command, cwd=ROOT, env=plain | environ, capture_output=True, text=True, timeout=60, check=False
    )


# What cannot work


@pytest.fixture
def torch_mark(tmp_path: Path) -> Path:
    """A file that exists once somebody has imported torch; put its folder on PYTHONPATH."""
    shim, mark = tmp_path / "shim", tmp_path / "torch-was-imported"
    shim.mkdir()
    (shim / "torch.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise ImportError('too early')\n")
    return mark


def pickled(folder: Path) -> Path:
    """Make a model folder whose weights are a pickle."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


@contextmanager
def busy_port() -> Iterator[str]:
    """Hold a port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"MODEL_ID": "/no/such/folder"}, "model /no/such/folder: /no/such/folder does not exist;"),
        ({"MODEL_ID": "package:no_such_model/model"}, "package no_such_model is not installed"),
        ({"MODEL_ID": "PICKLED"}, "holds weights as a pickle (pytorch_model.bin), not as safetensors"),
        ({"WORKRES": "2"}, "unknown setting WARMFLEET_WORKRES; did you mean WARMFLEET_WORKERS?"),
        ({"WORKERS": "many"}, "WARMFLEET_WORKERS=many: "),
        ({"BIND": "BUSY"}, "Address already in use; stop what uses it or choose another address"),
        ({"OPS_BIND": "BUSY"}, "Address already in use; stop what uses it or choose another address"),
        ({"BIND": "127.0.0.1:PORT", "OPS_BIND": "0.0.0.0:PORT"}, "cannot listen on 0.0.0.0:"),
        ({"BIND": "unix:/no/such/folder/api"}, "the folder /no/such/folder does not exist; make it first"),
        ({"DEVICE": "cuda"}, "device is cuda but no CUDA device is visible: the driver lists none;"),
        ({"DEVICES": "7", "FAKE": "2"}, "WARMFLEET_DEVICES names GPU 7, but the driver lists 2;"),
        ({"DEVICES": "GPU-9", "FAKE": "2"}, "WARMFLEET_DEVICES names 'GPU-9', which fits 0 of"),
        ({"DEVICE": "cpu", "DTYPE": "float16"}, "dtype float16 on device cpu is about 100 times slower;"),
        ({"DTYPE": "bfloat16"}, "no GPU is visible, and dtype bfloat16 on CPU is about 100 times slower;"),
    ],
    ids=lambda value: ",".join(map("=".join, value.items())) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_in_one_line(
    start: list[str],
    environ: dict[str, str],
    said: str,
    torch_mark: Path,
    fake_driver: dict[str, str],
) -> None:
    """Either entry point ends with exit code 1 and one line that says why, before torch is imported."""
    environ = dict(environ)
    driver = fake_driver | {"FAKECUDA_NDEV": environ.pop("FAKE", "0")}
    with busy_port() as busy:
        folder = pickled(torch_mark.parent / "model")
        words = {"PICKLED": str(folder), "BUSY": busy}
        port = str(free_port())
        ours = {
            f"WARMFLEET_{name}": words.get(value, value.replace("PORT", port))
            for name, value in environ.items()
        }
        done = run(start, PYTHONPATH=str(torch_mark.parent / "shim"), **driver, **ours)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("warmfleet: ")
    assert said in line
    assert not torch_mark.exists()


def test_torch_mark_can_be_left(torch_mark: Path) -> None:
    """Positive control: a start that nothing refuses does import torch, and the mark shows it."""
    done = run(STARTS["gunicorn"], PYTHONPATH=str(torch_mark.parent / "shim"), WARMFLEET_DEVICE="cpu")
    assert done.returncode
    assert torch_mark.exists()


def test_unknown_option_is_a_wrong_command_line() -> None:
    """An option that does not exist ends with exit code 2; one with a wrong value is a wrong setting: 1."""
    done = run([*CLI, "serve", "--workres", "2"])
    assert done.returncode == 2
    assert "No such option" in done.stderr
    done = run([*CLI, "serve", "--workers", "0"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("warmfleet: WARMFLEET_WORKERS=0: ")
    assert len(done.stderr.splitlines()) == 1


# What can


def test_serve_without_a_terminal_becomes_the_arbiter() -> None:
    """Off a terminal `warmfleet serve` becomes Gunicorn's arbiter, as PID 1 must; SIGTERM ends it with 0."""
    prefix = ("sh", "-c", '"$0" -m service serve --workers 2; exit $?')
    with Service(prefix=prefix) as service:
        service.wait_ready()
        assert b"gunicorn" in Path(f"/proc/{service.arbiter}/cmdline").read_bytes()
        workers = [process(pid) for pid in service.pids().values()]
        assert [worker and worker.parent for worker in workers] == [service.arbiter] * 2
        assert service.stop(signal.SIGTERM) == 0


def test_options_override_the_environment() -> None:
    """`--workers 1` wins over WARMFLEET_WORKERS=2, and the workers are told."""
    with Service(prefix=("sh", "-c", '"$0" -m service serve --workers 1; exit $?'), workers=2) as service:
        service.wait_ready()
        assert list(service.workers()) == [0]
        assert service.get("/workers").json()["target"] == 1


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_on_a_terminal_shows_progress(stop: signal.Signals) -> None:
    """On a terminal there is a bar for each slot, then the line to try it with; Ctrl-C ends it with 0."""
    service = Service(workers=2, stub_load_ms=800)
    screen, terminal = pty.openpty()
    serve = subprocess.Popen(
        [*CLI, "serve"],
        cwd=ROOT,
        env=service.environ | {"TERM": "xterm", "COLUMNS": "120"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    children: list[int] = []
    try:
        text = read_until(screen, "status, probes and metrics")
        assert "importing" in text
        assert all(f"slot {slot}" in text for slot in (0, 1))
        assert "loading" in text
        assert "2 of 2 workers are ready" in text
        port = service.bind.rpartition(":")[2]
        assert f"curl -s http://localhost:{port}/embed -d '[\"hello\"]'" in text
        assert "Traceback" not in text
        children = descendants(serve.pid)
        assert len(children) == 3  # the arbiter and two workers
        os.kill(serve.pid, stop)
        text = read_until(screen, None)
        assert serve.wait(PATIENCE_S) == 0
        assert "Traceback" not in text
        until(lambda: not any(runs(child) for child in children), what="nothing is left")
    finally:
        serve.kill()
        for child in children:
            if runs(child):
                os.kill(child, signal.SIGKILL)
        serve.wait()
        os.close(screen)


@pytest.mark.parametrize("ready", [False, True], ids=["while it boots", "once it is ready"])
def test_a_closed_terminal_leaves_no_orphan(*, ready: bool) -> None:
    """Whoever closes the terminal, in a boot or later, ends the service and every worker."""
    service = Service(workers=2, stub_load_ms=200 if ready else 30_000)
    screen, terminal = pty.openpty()
    serve = subprocess.Popen(  # the terminal is its own, so that closing it means SIGHUP
        ["setsid", "--ctty", *CLI, "serve"],
        cwd=ROOT,
        env=service.environ | {"TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    children: list[int] = []
    try:
        try:
            read_until(screen, "status, probes and metrics" if ready else "loading")
            until(lambda: len(descendants(serve.pid)) == 3, what="the arbiter and two workers run")
            children = descendants(serve.pid)
        finally:
            os.close(screen)
        serve.wait(PATIENCE_S)
        until(lambda: not any(runs(child) for child in children), what="nothing is left")
    finally:
        serve.kill()
        for child in children:
            if runs(child):
                os.kill(child, signal.SIGKILL)
        serve.wait()


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`http_proxy` is for the world outside; the service's own listener is asked directly."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with Service(workers=1) as service:
        service.wait_ready()
        answer = ask(Address.parse(service.ops_bind), "/ready")
        assert answer
        assert answer["status"] == "ready"


def test_log_is_drained_when_the_terminal_is_gone() -> None:
    """Writing fails, reading goes on: a full pipe would block Gunicorn."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    flood = [sys.executable, "-c", "import sys; print('x' * 1_000_000, file=sys.stderr)"]
    with subprocess.Popen(flood, stderr=subprocess.PIPE, text=True) as talker:
        _copy_log(talker, Console(file=Gone()))
        assert talker.wait(PATIENCE_S) == 0


def test_serve_on_a_terminal_passes_the_exit_code_on() -> None:
    """On a terminal too, a service that can never become ready ends with 3."""
    service = Service(workers=1, stub_scenario="fail_load", boot_attempts=1)
    screen, terminal = pty.openpty()
    serve = subprocess.Popen(
        [*CLI, "serve"],
        cwd=ROOT,
        env=service.environ | {"TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    try:
        text = read_until(screen, None)
        assert serve.wait(PATIENCE_S) == 3
        assert "scripted error in load" in text
    finally:
        serve.kill()
        serve.wait()
        os.close(screen)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], ["serve", "settings", "diagram", "Examples:"]),
        (["serve", "--help"], ["--model-id", "--stub-forward-ms", "Exit codes: 0 stopped as asked"]),
        (["--version"], [f"warmfleet, version {package.__version__}"]),
        (["settings"], [f"WARMFLEET_{name.upper()}" for name in Settings.model_fields]),
        (["diagram"], ["stateDiagram-v2", "warming --> ready"]),
    ],
    ids=lambda value: " ".join(value) if len(value) < 3 else "",
)
def test_commands_that_only_print(arguments: list[str], said: list[str], torch_mark: Path) -> None:
    """They print to stdout, end with 0, and import no torch."""
    done = run([*CLI, *arguments], PYTHONPATH=str(torch_mark.parent / "shim"))
    assert (done.returncode, done.stderr) == (0, "")
    assert [part for part in said if part not in done.stdout] == []
    assert not torch_mark.exists()


# Helpers


def read_until(screen: int, text: str | None) -> str:
    """Read a terminal until a text appears, or to its end; return all without its escape sequences."""
    end, raw = time.monotonic() + PATIENCE_S, b""
    while True:
        seen = ESCAPES.sub("", raw.decode(errors="replace"))
        if text is not None and text in seen:
            return seen
        readable, _, _ = select.select([screen], [], [], max(0.0, end - time.monotonic()))
        assert readable, f"not on the screen within {PATIENCE_S:g} s: {text}\n{seen}"
        try:
            chunk = os.read(screen, 65536)
        except OSError:  # everybody has closed the terminal
            chunk = b""
        if not chunk:
            assert text is None, f"ended without {text}:\n{seen}"
            return seen
        raw += chunk


def descendants(pid: int) -> list[int]:
    """Return the children of a process, and theirs."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    children = [int(child) for child in listed.split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]
