# SPDX-License-Identifier: Apache-2.0
"""`--kubectl`, `--open` and completion: what they would run, without running it."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from service.browser import can_show
from service.cli import main
from service.commands import kubectl
from service.commands.kubectl import Target, arguments_of


def test_a_command_is_run_in_the_pod_by_kubectl_and_no_shell() -> None:
    """Arguments stay apart, whatever is in them; a terminal is passed on."""
    assert Target("deploy/warmfleet").command(["scale", "4"], terminal=False) == (
        ["kubectl", "exec", "deploy/warmfleet", "--", "warmfleet", "scale", "4"]
    )
    assert Target("pod-0", "a b", "ctx", "main").command(["roll"], terminal=True) == [
        *("kubectl", "exec", "--context=ctx", "--namespace=a b", "--container=main"),
        *("--stdin", "--tty", "pod-0", "--", "warmfleet", "roll"),
    ]


@pytest.mark.parametrize(
    ("given", "there"),
    [
        ("scale 4 --wait --timeout 30", "scale --wait --timeout=30.0 4"),
        ("scale 4 localhost:9100", "scale 4 localhost:9100"),
        ("roll --ops-bind http://0.0.0.0:9100/ops", "roll --ops-bind=http://0.0.0.0:9100/ops"),
        ("status --json", "status --json"),
        ("wait", "wait"),
        ("top", "top"),
    ],
)
def test_the_pod_is_told_what_was_said_here(monkeypatch: pytest.MonkeyPatch, given: str, there: str) -> None:
    """Everything that was on the command line, but for what leads to the pod."""
    told: list[tuple[Target, list[str]]] = []
    monkeypatch.setattr(
        kubectl, "run_there", lambda target, context: told.append((target, arguments_of(context)))
    )
    done = CliRunner().invoke(main, [*given.split(), "--kubectl", "deploy/warmfleet", "--namespace", "ml"])
    assert done.exit_code == 0, done.output
    assert told == [(Target("deploy/warmfleet", "ml"), there.split())]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("status --namespace ml", "--namespace, --context and --container belong to --kubectl"),
        ("status a:1 --ops-bind b:2", "ADDRESS and --ops-bind are the same; give one of them"),
        ("status nonsense", "'nonsense' is no address; write host:port or http://host:port"),
        ("bench --seconds 0", "0.0 is not in the range"),
        ("top", "top needs a terminal; `warmfleet status` prints the same once"),
    ],
)
def test_a_wrong_command_line_is_said(given: str, said: str) -> None:
    """Exit code 2, and nothing is asked or run."""
    done = CliRunner().invoke(main, given.split())
    assert done.exit_code == 2
    assert said in done.output.replace("\n", " ")


def test_without_kubectl_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, with what to do."""
    monkeypatch.setenv("PATH", "/nowhere")
    done = CliRunner().invoke(main, ["roll", "--kubectl", "deploy/warmfleet"])
    assert done.exit_code == 1
    assert done.output == (
        "warmfleet: kubectl is not on PATH; install it, or run this command in the pod itself\n"
    )


@pytest.mark.parametrize(
    ("environ", "platform", "expected"),
    [
        ({}, "linux", False),
        ({"DISPLAY": ":0"}, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
        ({"BROWSER": "firefox"}, "linux", True),
        ({}, "darwin", True),
    ],
)
def test_a_browser_is_opened_only_where_it_gets_a_window(
    environ: dict[str, str], platform: str, *, expected: bool
) -> None:
    """One for text would take over the terminal that shows the boot."""
    assert can_show(environ, platform) is expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_asks_us(shell: str) -> None:
    """It names the program and the variable that click answers to."""
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert "_WARMFLEET_COMPLETE" in done.output
