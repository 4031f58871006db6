# SPDX-License-Identifier: Apache-2.0
"""The log of a real fleet: one format whoever writes, ids on records and on replies, the access log."""

from __future__ import annotations

import json
import re
import socket
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

import pytest
from harness import DEADLINE_S, Service, new_client, until

from service.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
STATES = {state.label for state in State}
ARBITER_STATES = {"importing", "running", "stopping"}
TEXT = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<level>[A-Z]+) +(?P<slot>arbiter|s\d+) +"
    r"(?P<state>[a-z]+) +(?P<request_id>\S+) (?P<trace_id>[0-9a-f]{32}|-) (?P<message>.*)"
)

# Others that write to the log: Python's warnings, a library, and one that brings a handler of its own.
CONF = r"""
from gunicorn_conf import *

import logging
import warnings
from service import hooks

def post_worker_init(worker):
    warnings.warn("planted warning", stacklevel=1)
    logging.getLogger("somelib").warning("planted by a library,\nin two lines")
    logging.getLogger("ownlib").addHandler(logging.StreamHandler())
    logging.getLogger("ownlib").propagate = False
    hooks.post_worker_init(worker)
    logging.getLogger("ownlib").warning("planted by one with a handler")
"""
BROKEN = '[[fault]]\nstage = "forward"\nkind = "error"\ntext = "broken"\n'


def records(log: str, log_format: str) -> list[dict[str, Any]]:
    """Return the records of a log, of which every line must be one, or in text belong to one."""
    if log_format == "json":
        found = [json.loads(line) for line in log.splitlines()]
        return [{"request_id": "-", "trace_id": "-"} | one for one in found]
    found = []
    for line in log.splitlines():
        if line.startswith("    "):
            found[-1]["message"] += "\n" + line
        else:
            match = TEXT.fullmatch(line)
            assert match, line
            found.append(match.groupdict())
    return found


def of(found: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the records with this text in their message."""
    return [one for one in found if text in one["message"]]


def say(service: Service, raw: bytes) -> bytes:
    """Send bytes to the API on a connection of its own; return what comes back until it is closed."""
    host, port = service.bind.split(":")
    with socket.create_connection((host, int(port)), DEADLINE_S) as connection:
        connection.sendall(raw)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
        return found


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_whoever_writes_writes_in_one_format(tmp_path: Path, log_format: str) -> None:
    """Gunicorn, uvicorn, libraries, warnings and we: a line has time, slot, state and its request's ids."""
    (tmp_path / "conf.py").write_text(CONF, encoding="utf-8")
    (tmp_path / "broken.toml").write_text(BROKEN, encoding="utf-8")
    with (
        Service(
            workers=1,
            log_format=log_format,
            access_log="all",
            stub_scenario=tmp_path / "broken.toml",
            prefix=("sh", "-c", f'"$0" -m gunicorn -c {tmp_path}/conf.py; exit $?'),
        ) as service,
        new_client() as client,
    ):
        service.wait_ready()

        def post(name: str, text: str) -> int:
            reply = client.post(f"{service.url}/embed", json=[text], headers={"x-request-id": name} | PARENT)
            assert reply.headers["x-request-id"] == name
            return reply.status_code

        assert post("request-well", "hello") == 200
        assert post("request-broken", "broken") >= 500
        assert b" 400 " in say(service, b"NOT HTTP AT ALL\r\n\r\n")
        service.kill(0, SIGKILL)
        service.wait_state(0, "ready", generation=2)
        service.stop()
        found = records(service.log, log_format)
    for one in found:
        assert one["slot"] == "s0" or one["slot"] == "arbiter", one
        assert one["state"] in (ARBITER_STATES if one["slot"] == "arbiter" else STATES), one
    # One of each: who wrote it, and where it was.
    assert {one["state"] for one in of(found, "Starting gunicorn")} == {"importing"}
    assert {one["state"] for one in of(found, "Handling signal: term")} <= {"running", "stopping"}
    assert {one["state"] for one in of(found, "Shutting down")} == {"stopping"}
    assert [one["slot"] for one in of(found, "Booting worker")] == ["s0", "s0"]
    assert {one["slot"] for one in of(found, "slot 0 failed")} == {"arbiter"}
    assert {one["state"] for one in of(found, "ready on cpu")} == {"ready"}
    for text in ("planted warning", "planted by a library", "planted by one with", "Invalid HTTP request"):
        (one, *_) = of(found, text)
        assert (one["slot"], one["request_id"], one["trace_id"]) == ("s0", "-", "-")
    # The records of a request, on the event loop and on the model's thread, and no others.
    for name, status in (("request-well", 200), ("request-broken", 500)):
        (access,) = of(found, f"POST /embed {status}")
        assert (access["request_id"], access["trace_id"], access["state"]) == (name, TRACE, "ready")
    theirs = [one["message"].splitlines()[0] for one in found if one["request_id"] == "request-broken"]
    assert "a forward pass failed for 1 of its requests" in theirs
    assert {one["request_id"] for one in found} == {"-", "request-well", "request-broken"}
    if log_format == "json":
        names = {one["logger"] for one in found}
        assert {"gunicorn.error", "uvicorn.error", "warmfleet", "py.warnings", "somelib", "ownlib"} <= names
        assert any("scripted error in forward" in one.get("exception", "") for one in found)


def test_every_reply_has_an_id_and_errors_have_a_line() -> None:
    """Also those of a cold worker, on both listeners; `errors` leaves out what went well."""
    with (
        Service(workers=1, log_format="json", access_log="errors", stub_load_ms=4000) as service,
        new_client() as client,
    ):
        service.wait(lambda: service.states() == {0: "loading"})
        cold = client.post(f"{service.url}/embed", json=["hello"], headers={"x-request-id": "request-cold"})
        assert (cold.status_code, cold.headers["x-request-id"]) == (503, "request-cold")
        service.wait_ready()
        ops = f"http://{service.ops_bind}"
        asked: list[tuple[str, Callable[[dict[str, str]], Any], int]] = [
            ("well", lambda own: client.post(f"{service.url}/embed", json=["a"], headers=own), 200),
            ("unknown", lambda own: client.get(f"{service.url}/nope?key=hunter2", headers=own), 404),
            ("method", lambda own: client.delete(f"{service.url}/embed", headers=own), 405),
            ("body", lambda own: client.post(f"{service.url}/embed", content=b"{", headers=own), 422),
            ("probe", lambda own: client.get(f"{ops}/ready", headers=own), 200),
            ("ops", lambda own: client.get(f"{ops}/nope", headers=own), 404),
        ]
        for name, ask, status in asked:
            reply = ask({"x-request-id": f"request-{name}"})
            assert (reply.status_code, reply.headers["x-request-id"]) == (status, f"request-{name}")
        wrong = client.get(f"{service.url}/nope", headers={"x-request-id": "not one id"})
        assert re.fullmatch("[0-9a-f]{24}", wrong.headers["x-request-id"])
        service.stop()
        found = [one for one in records(service.log, "json") if one["logger"] == "warmfleet.access"]
        assert "hunter2" not in service.log
    lines = {one["request_id"]: (one["method"], one["path"], one["status"]) for one in found}
    assert lines == {
        "request-cold": ("POST", "/embed", 503),
        "request-unknown": ("GET", "/nope", 404),
        "request-method": ("DELETE", "/embed", 405),
        "request-body": ("POST", "/embed", 422),
        wrong.headers["x-request-id"]: ("GET", "/nope", 404),
    }
    assert all(one["bytes"] > 0 and one["seconds"] > 0 and one["client"] == "127.0.0.1" for one in found)


def test_there_is_no_access_log_unless_asked_for() -> None:
    """By default requests leave numbers only."""
    with Service(workers=1, log_format="json") as service:
        service.wait_ready()
        assert service.embed().ok
        assert service.get("/nope", ops=False).status_code == 404
        until(lambda: service.metrics().total("warmfleet_requests_total") == 2, what="both are counted")
        service.stop()
        assert not [one for one in records(service.log, "json") if one["logger"] == "warmfleet.access"]
