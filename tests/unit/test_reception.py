# SPDX-License-Identifier: Apache-2.0
"""The door: an id on every reply, a line for those that are wanted, a journey for those that are traced."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest
from client import KEY, app_with, post, send

from service.api import openai
from service.logging import SlotFilter
from service.ops import create_ops_app
from service.reception import LONGEST, Reception
from service.trail import TRAIL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Counters
    from fastapi import FastAPI

    from service.engine import Engine
    from service.tracing import Visit

ID = {"x-request-id": "a-client's-own-id"}
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Kept:
    """Takes what traced requests leave behind."""

    ratio = 1.0

    def __init__(self) -> None:
        self.visits: list[Visit] = []
        self.leave = self.visits.append


@pytest.fixture
def lines() -> Iterator[list[logging.LogRecord]]:
    """The access records, as a handler of the real configuration would see them."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.addFilter(SlotFilter())
    handler.emit = found.append  # type: ignore[method-assign]
    logger = logging.getLogger("warmfleet.access")
    logger.addHandler(handler)
    before, logger.level, logger.propagate = (logger.level, logger.propagate), logging.INFO, False
    yield found
    logger.removeHandler(handler)
    logger.level, logger.propagate = before


@pytest.fixture
def make_app(counters: Counters, make_engine: Callable[..., Engine]) -> Callable[..., FastAPI]:
    return lambda **settings: app_with(counters.slot, make_engine(), **settings)


REQUESTS = [
    ("POST", "/embed", {"json": ["a"]}, 200),
    ("POST", "/embed", {"json": ["a"] * 9}, 413),
    ("POST", "/embed", {"content": b"{"}, 422),
    ("GET", "/embed", {}, 405),
    ("GET", "/nope", {}, 404),
    ("GET", "/v1/models", {}, 200),
    ("GET", "/v1/models/nope", {}, 404),
    ("GET", "/health", {}, 200),
    ("GET", "/ready", {}, 503),
    ("GET", "/openapi.json", {}, 200),
]


@pytest.mark.parametrize(("method", "path", "request_", "status"), REQUESTS)
@pytest.mark.parametrize("settings", [{}, {"cors_origins": "*"}], ids=["plain", "cors"])
def test_every_reply_has_the_id(
    make_app: Callable[..., FastAPI],
    method: str,
    path: str,
    request_: dict[str, Any],
    status: int,
    settings: dict[str, Any],
) -> None:
    """The client's own where it sent one, else one of ours; exactly one, whoever made the reply."""
    app = make_app(check_model=True, **settings)
    reply = send(app, method, path, headers=ID, **request_)
    fresh = send(app, method, path, **request_)
    assert (reply.status_code, reply.headers.get_list("x-request-id")) == (status, [ID["x-request-id"]])
    assert [len(one) for one in fresh.headers.get_list("x-request-id")] == [24]


def test_replies_that_refuse_have_it_too(
    counters: Counters, make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold, without a key, a preflight of CORS, and an error of ours that nobody foresaw."""
    app = make_app(cors_origins="https://a", api_key=KEY)

    preflight = {"origin": "https://a", "access-control-request-method": "POST"}
    found = [
        post(app_with(counters.slot), "/embed", ["a"], headers=ID),
        post(app, "/embed", ["a"], headers=ID),
        send(app, "OPTIONS", "/embed", headers=ID | preflight),
    ]
    monkeypatch.setattr(openai, "list_models", lambda *_: 1 / 0)
    found.append(send(make_app(), "GET", "/v1/models", headers=ID))
    assert [one.status_code for one in found] == [503, 401, 200, 500]
    assert {one.headers["x-request-id"] for one in found} == {ID["x-request-id"]}


@pytest.mark.parametrize("path", ["/health", "/ready", "/nope"])
def test_the_ops_listener_has_it_too(counters: Counters, path: str) -> None:
    """Probes, and paths that do not exist."""
    fleet = app_with(counters.slot).state.fleet
    reply = send(Reception(create_ops_app(fleet, {}, None, None)), "GET", path, headers=ID)  # type: ignore[arg-type]
    assert reply.headers["x-request-id"] == ID["x-request-id"]


# The access log


@pytest.mark.parametrize(("which", "logged"), [("off", []), ("errors", [404, 422]), ("all", [200, 404, 422])])
def test_the_setting_says_which_replies_get_a_line(
    make_app: Callable[..., FastAPI], lines: list[logging.LogRecord], which: str, logged: list[int]
) -> None:
    """None, those with 400 or more, or all; the replies are the same."""
    app = make_app(access_log=which)
    post(app, "/embed", ["a"])
    send(app, "GET", "/nope")
    post(app, "/embed", content=b"{")
    assert [one.args["status"] for one in lines if isinstance(one.args, dict)] == logged


def test_a_line_says_who_asked_what_and_what_became_of_it(
    make_app: Callable[..., FastAPI], lines: list[logging.LogRecord]
) -> None:
    """In words, and as fields; with the ids of the request."""
    headers = ID | {"user-agent": "curl/8", "traceparent": f"00-{TRACE}-{SPAN}-01"}
    reply = post(make_app(access_log="all"), "/embed", ["a"], headers=headers)
    [line] = lines
    fields = dict(line.args)  # type: ignore[arg-type]
    assert 0 < fields.pop("seconds") < 60
    assert fields == {
        "method": "POST",
        "path": "/embed",
        "status": 200,
        "bytes": len(reply.content),
        "client": "127.0.0.1",
        "user_agent": "curl/8",
    }
    assert line.getMessage().startswith(f"POST /embed 200 {len(reply.content)} bytes 0.")
    assert (vars(line)["request_id"], vars(line)["trace_id"]) == (ID["x-request-id"], TRACE)
    assert (line.name, line.levelname) == ("warmfleet.access", "INFO")


def test_a_line_has_no_query_no_key_and_no_text(
    make_app: Callable[..., FastAPI], lines: list[logging.LogRecord]
) -> None:
    """What may be secret is never written, however it is sent."""
    secret = "hunter2-which-nobody-may-see"
    headers = {"authorization": f"Bearer {secret}", "cookie": secret, "x-api-key": secret}
    app = make_app(access_log="all", api_key=KEY)
    post(app, f"/embed?key={secret}", [secret], headers=headers)
    send(app, "GET", f"/nope?key={secret}", headers=headers)
    assert len(lines) == 2
    assert secret not in "".join(f"{one.getMessage()} {one.args}" for one in lines)


def test_no_line_can_be_forged(make_app: Callable[..., FastAPI], lines: list[logging.LogRecord]) -> None:
    """Line ends and control characters of a path or a user agent are escaped, and their length is bounded."""
    app = make_app(access_log="all")
    send(app, "GET", "/a%0a2026-01-02T03:04:05.678Z", headers={"user-agent": b"a\xa0\x85b"})
    send(app, "GET", "/" + "a" * 9999, headers={"user-agent": "a" * 9999})
    forged, long = lines
    assert forged.getMessage().isprintable()
    assert len(long.getMessage()) < 3 * LONGEST


@pytest.mark.parametrize(
    ("raw", "shown"),
    [(b"http://user:pass@host/", "-"), (b"*", "-"), (b"/a?b=c", "/a"), (None, "/from/scope")],
)
def test_a_target_that_is_no_path_is_not_shown(
    lines: list[logging.LogRecord], raw: bytes | None, shown: str
) -> None:
    """What a proxy is asked for may hold a password; a server may leave the query in."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    async def sent(_: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/from/scope", "raw_path": raw, "headers": []}
    asyncio.run(Reception(app, access_log="all")(scope, None, sent))  # type: ignore[arg-type]
    [line] = lines
    assert dict(line.args)["path"] == shown  # type: ignore[arg-type]
    assert dict(line.args)["client"] == dict(line.args)["user_agent"] == "-"  # type: ignore[arg-type]


# Traces


def test_a_traced_request_leaves_a_visit(make_app: Callable[..., FastAPI]) -> None:
    """After the reply: what the door saw, and the journey through the engine with its times in order."""
    app, kept = make_app(), Kept()
    app.reception.spans = kept  # type: ignore[assignment]
    headers = ID | {"user-agent": "curl/8", "traceparent": f"00-{TRACE}-{SPAN}-01"}
    reply = post(app, "/embed", ["a b", "c"], headers=headers)
    [visit] = kept.visits
    journey = visit.journey
    assert journey.place[0].hex() == TRACE
    assert journey.parent_id.hex() == SPAN
    marks = [visit.began, journey.tokenizing, journey.queued, journey.launched, journey.landed, visit.ended]
    assert marks == sorted(marks)
    assert (journey.texts, journey.tokens) == (2, int(reply.headers["x-compute-tokens"]))
    found = visit.method, visit.route, visit.status, visit.size, visit.request_id, visit.user_agent
    assert found == ("POST", "/embed", 200, len(reply.content), ID["x-request-id"], "curl/8")


def test_an_unsampled_request_leaves_nothing(make_app: Callable[..., FastAPI]) -> None:
    """Its reply is the same."""
    app, kept = make_app(), Kept()
    app.reception.spans = kept  # type: ignore[assignment]
    reply = post(app, "/embed", ["a"], headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
    assert (reply.status_code, kept.visits) == (200, [])


@pytest.mark.parametrize(
    ("method", "path", "status", "route"),
    [
        ("GET", "/nope", 404, None),
        ("GET", "/v1/models/nope", 404, "/v1/models/{model}"),
        ("GET", "/embed", 405, "/embed"),
    ],
)
def test_requests_that_no_model_answers_leave_a_visit_too(
    make_app: Callable[..., FastAPI], method: str, path: str, status: int, route: str | None
) -> None:
    """With the template of the path, so that a scanner makes no names."""
    app, kept = make_app(check_model=True), Kept()
    app.reception.spans = kept  # type: ignore[assignment]
    send(app, method, path)
    [visit] = kept.visits
    assert (visit.status, visit.route, visit.journey.tokenizing) == (status, route, 0.0)


def test_what_a_request_carries_is_not_left_to_the_next() -> None:
    """Each request has a context of its own: here, as in uvicorn, a task."""
    seen: list[str] = []

    async def app(_scope: Any, _receive: Any, _send: Any) -> None:
        trail = TRAIL.get()
        assert trail is not None
        seen.append(trail.request_id)

    async def twice() -> None:
        door = Reception(app)
        for name in (b"one", b"two"):
            scope = {"type": "http", "path": "/", "method": "GET", "headers": [(b"x-request-id", name)]}
            await asyncio.create_task(door(scope, None, None))  # type: ignore[arg-type]
        assert TRAIL.get() is None

    asyncio.run(twice())
    assert seen == ["one", "two"]
