# SPDX-License-Identifier: Apache-2.0
"""The API: both shapes of request and reply, errors with their consequences, and what is counted."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from fastapi.routing import APIRoute

import service.app
from service import __version__
from service.app import create_app
from service.errors import InferenceError, NotReadyError, OverloadedError, RequestError
from service.fleet import Fleet
from service.lifecycle import State
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import Counters
    from fastapi import FastAPI

    from service.engine import Engine

    Send = Callable[..., httpx.Response]

KEY = "hunter2"


def app_with(slot: int, engine: object = None, **settings: Any) -> FastAPI:
    """Return the app of one worker; without an engine it is cold."""
    values = Settings(backend="stub", **settings)
    app = create_app(values)
    app.state.slot = slot
    app.state.fleet = Fleet.make(values, ("cpu",), values.workers)
    if engine is not None:
        app.dependency_overrides[service.app.engine] = lambda: engine
    return app


def send(app: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    """Send one request to the app, without a socket."""

    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(exchange())


def outcome(reply: httpx.Response) -> tuple[int, Any]:
    return reply.status_code, reply.json()


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


@pytest.fixture
def app(counters: Counters, engine: Engine) -> FastAPI:
    """Return a warm worker's app."""
    return app_with(counters.slot, engine)


# Requests that are served


@pytest.mark.parametrize(
    ("body", "texts", "unwrap"),
    [
        (["a b", "c"], ["a b", "c"], lambda reply: reply["embeddings"]),
        ({"inputs": ["a b", "c"]}, ["a b", "c"], list),
        ({"inputs": "a b", "truncate": True}, ["a b"], list),
    ],
    ids=["bare array", "object", "single text"],
)
def test_texts_are_answered_by_their_vectors_in_the_shape_of_the_request(
    app: FastAPI, engine: Engine, body: object, texts: list[str], unwrap: Callable[[Any], list[Any]]
) -> None:
    """A bare array gets `{"embeddings": …}`, the object a list of vectors; both JSON, both timed."""
    reply = send(app, "POST", "/embed", json=body)
    expected = asyncio.run(engine.embed(texts)).vectors
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    np.testing.assert_array_equal(np.array(unwrap(reply.json()), dtype=np.float32), expected)
    names = [part.split(";dur=")[0] for part in reply.headers["server-timing"].split(", ")]
    assert names == ["tokenize", "queue", "forward"]


def test_info_describes_model_and_limits(app: FastAPI) -> None:
    """What a client may send, in TEI's words."""
    assert outcome(send(app, "GET", "/info")) == (
        200,
        {
            "model_id": app.state.settings.model_id,
            "model_sha": None,
            "model_dtype": "float32",
            "model_type": {"embedding": {"dimension": 32, "normalized": True}},
            "max_input_length": 256,
            "max_batch_tokens": 512,
            "max_concurrent_requests": 8,
            "max_client_batch_size": 4,
            "auto_truncate": True,
            "backend": "stub",
            "workers": 2,
            "version": __version__,
        },
    )


def test_a_cold_worker_answers_probes(counters: Counters) -> None:
    """Alive is alive, and not ready says why; neither needs an engine, and no proxy keeps them."""
    app = app_with(counters.slot)
    health, ready = send(app, "GET", "/health"), send(app, "GET", "/ready")
    assert outcome(health) == (200, {"status": "ok"})
    assert outcome(ready) == (
        503,
        {
            "status": "starting",
            "model": app.state.settings.model_id,
            "warmup_seconds": None,
            "detail": "0 of 2 workers are ready, 2 wanted",
        },
    )
    assert [reply.headers["cache-control"] for reply in (health, ready)] == ["no-store"] * 2


def test_with_a_key_set_ready_tells_no_reasons(counters: Counters) -> None:
    """Probes need no key, so they get a status and counts, and no error text with a path in it."""
    app = app_with(counters.slot, api_key=KEY)
    counts = {"ready_workers": 0, "wanted_workers": 2, "target_workers": 2}
    assert outcome(send(app, "GET", "/ready")) == (503, {"status": "starting", **counts})
    assert outcome(send(app, "GET", "/health")) == (200, {"status": "ok"})


def test_ready_speaks_for_the_whole_fleet(counters: Counters) -> None:
    """Any worker, even a cold one, says that the others are warm."""
    app = app_with(counters.slot)
    board = app.state.fleet.board
    for slot in range(2):
        board.spawn(slot, "cpu", service.app.time.monotonic())
        board.rows[slot].state = State.READY
    ready = send(app, "GET", "/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert ready.json()["detail"].startswith("2 of 2 workers are ready")


# Requests that are refused


def test_without_a_warm_worker_a_client_shall_come_back_elsewhere(counters: Counters) -> None:
    """503 with the reason, `Retry-After` and a closed connection: the next try shall find a warm worker."""
    reply = send(app_with(counters.slot), "POST", "/embed", json=["a"])
    assert outcome(reply) == (
        503,
        {"error": "no worker is warm yet: 0 of 2 workers are ready, 2 wanted", "error_type": "unhealthy"},
    )
    assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")


def test_an_app_that_is_in_no_worker_says_so_too(counters: Counters) -> None:
    """Between the fork and the first state there is no fleet to ask."""
    app = app_with(counters.slot)
    app.state.fleet = None
    error = {"error": "no worker is warm yet", "error_type": "unhealthy"}
    assert outcome(send(app, "GET", "/info")) == (503, error)


def test_the_engine_of_the_state_is_the_one_that_serves(counters: Counters, engine: Engine) -> None:
    """From the moment the worker puts an engine there, requests are served; no override needed."""
    app = app_with(counters.slot)
    app.state.engine = engine
    assert send(app, "POST", "/embed", json=["a"]).status_code == 200


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, False),
        ({"authorization": "Bearer wrong"}, False),
        ({"authorization": "Bearer "}, False),
        ({"authorization": f"Basic {KEY}"}, False),
        ({"authorization": KEY}, False),
        ({"authorization": f"Bearer{KEY}"}, False),
        ({"authorization": "Bearer hünter2".encode("latin-1")}, False),
        ({"authorization": f"Bearer {KEY} "}, False),
        ({"authorization": f"Bearer {KEY}"}, True),
        ({"authorization": f"bearer {KEY}"}, True),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/embed"), ("GET", "/info")])
def test_a_key_is_asked_for_if_one_is_set(
    counters: Counters,
    engine: Engine,
    headers: dict[str, Any],
    method: str,
    path: str,
    *,
    allowed: bool,
) -> None:
    """Without the right key: 401, which scheme to use, and not a word about the key itself."""
    app = app_with(counters.slot, engine, api_key=KEY)
    reply = send(app, method, path, headers=headers, json=["a"])
    if allowed:
        assert reply.status_code == 200
        return
    message = "the API key is missing or wrong; send `Authorization: Bearer <key>`"
    assert outcome(reply) == (401, {"error": message, "error_type": "unauthorized"})
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), [("POST", "/embed"), ("GET", "/info")])
def test_a_key_is_asked_for_before_a_cold_worker_gives_its_reasons(
    counters: Counters, method: str, path: str
) -> None:
    """Who has no key reads 401, not the errors of a boot; who has it reads why."""
    app = app_with(counters.slot, api_key=KEY)
    assert send(app, method, path, json=["a"]).status_code == 401
    reply = send(app, method, path, json=["a"], headers={"authorization": f"Bearer {KEY}"})
    assert reply.status_code == 503
    assert "0 of 2 workers are ready" in reply.json()["error"]


LIMIT = 40
TOO_LARGE = {
    "error": f"the body is larger than the limit of {LIMIT} bytes; split the request",
    "error_type": "validation",
}


def body_of(size: int) -> bytes:
    return b'["' + b"x" * (size - 4) + b'"]'


@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
def test_a_body_is_limited_by_its_declared_length(
    counters: Counters, engine: Engine, size: int, status: int
) -> None:
    """One byte more than the limit is refused without reading the body."""
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(size)
        yield body_of(size)

    app = app_with(counters.slot, engine, max_body_bytes=LIMIT)
    reply = send(app, "POST", "/embed", content=body(), headers={"content-length": str(size)})
    assert (reply.status_code, read) == (status, [size] if status == 200 else [])
    assert status == 200 or reply.json() == TOO_LARGE


@pytest.mark.parametrize(("size", "status", "chunks"), [(LIMIT, 200, 4), (LIMIT + 60, 413, 5)])
def test_a_body_without_a_length_is_limited_as_it_comes(
    counters: Counters, engine: Engine, size: int, status: int, chunks: int
) -> None:
    """A stream is read no further than the chunk that exceeds the limit."""
    read = []

    async def body() -> AsyncIterator[bytes]:
        for start in range(0, size, 10):
            read.append(start)
            yield body_of(size)[start : start + 10]

    reply = send(app_with(counters.slot, engine, max_body_bytes=LIMIT), "POST", "/embed", content=body())
    assert (reply.status_code, len(read)) == (status, chunks)
    assert status == 200 or reply.json() == TOO_LARGE


def test_a_key_is_asked_for_before_the_body_is_read(counters: Counters, engine: Engine) -> None:
    """Who has no key cannot make the worker read megabytes."""
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield b'["a"]'

    app = app_with(counters.slot, engine, api_key=KEY)
    assert (send(app, "POST", "/embed", content=body()).status_code, read) == (401, [])


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b'["a", ""]', 422, "inputs.1: the text is empty"),
        (b'{"inputs": ["a", 1]}', 422, "inputs.1: Input should be a valid string"),
        (b'["\xff"]', 422, "Invalid JSON: invalid unicode code point at line 1 column 3"),
        (b'["a", "b", "c", "d", "e"]', 413, "5 texts in one request; at most 4 are taken, split it"),
    ],
    ids=repr,
)
def test_a_wrong_request_is_answered_in_the_error_shape(
    app: FastAPI, body: bytes, status: int, error: str
) -> None:
    """`error` says what to change, `error_type` that it is the request's fault."""
    reply = send(app, "POST", "/embed", content=body)
    assert outcome(reply) == (status, {"error": error, "error_type": "validation"})
    assert "retry-after" not in reply.headers


class Refusing:
    """An engine that always raises."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def embed(self, texts: list[str], *, truncate: bool | None) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after", "connection"),
    [
        (OverloadedError("full", retry_after_s=0.0), 429, "overloaded", "1", None),
        (OverloadedError("full", retry_after_s=1.2), 429, "overloaded", "2", None),
        (OverloadedError("full", retry_after_s=60), 429, "overloaded", "60", None),
        (NotReadyError("no memory", retry_after_s=1), 503, "unhealthy", "1", "close"),
        (InferenceError("the model failed"), 500, "backend", None, None),
        (RequestError("something"), 500, "backend", None, None),
    ],
    ids=repr,
)
def test_an_error_of_the_engine_has_its_status_shape_and_headers(
    counters: Counters,
    error: RequestError,
    status: int,
    kind: str,
    retry_after: str | None,
    connection: str | None,
) -> None:
    """The class decides; `Retry-After` is in whole seconds, rounded up, one at least."""
    reply = send(app_with(counters.slot, Refusing(error)), "POST", "/embed", json=["a"])
    assert outcome(reply) == (status, {"error": str(error), "error_type": kind})
    assert (reply.headers.get("retry-after"), reply.headers.get("connection")) == (retry_after, connection)


# What is counted


def test_requests_are_counted_by_endpoint_and_status(counters: Counters, app: FastAPI) -> None:
    """One counter for each endpoint and status; a scanner's paths are all `other`."""
    send(app, "POST", "/embed", json=["a"])
    send(app, "POST", "/embed", json=["a"])
    send(app, "POST", "/embed", json=[])
    send(app, "GET", "/embed")
    send(app, "GET", "/health")
    for path in ("/.env", "/wp-login.php", "/embeddings"):
        send(app, "GET", path)
    assert counters.read("warmfleet_requests_total") == {
        ("/embed", "200"): 2,
        ("/embed", "422"): 1,
        ("/embed", "405"): 1,
        ("/health", "200"): 1,
        ("other", "404"): 3,
    }


def test_every_request_is_timed_as_a_whole(counters: Counters, app: FastAPI) -> None:
    """The stage `total` has one observation for each request."""
    for _ in range(3):
        send(app, "POST", "/embed", json=["a"])
    assert counters.read("warmfleet_request_stage_seconds_count") == {("total",): 3}
    [seconds] = counters.read("warmfleet_request_stage_seconds_sum").values()
    assert 0 < seconds < 10


def test_a_bug_is_counted_as_500(counters: Counters) -> None:
    """An exception that nobody expected still ends in a reply and in the counter."""
    app = app_with(counters.slot, Refusing(ZeroDivisionError("a bug")))
    assert send(app, "POST", "/embed", json=["a"]).status_code == 500
    assert counters.read("warmfleet_requests_total") == {("/embed", "500"): 1}


# What it costs


def test_nothing_of_a_request_waits_for_a_thread(app: FastAPI) -> None:
    """Handlers and all they depend on are coroutines: a hop to a thread costs more than all the rest."""
    todo = [route.dependant for route in app.routes if isinstance(route, APIRoute)]
    calls = []
    while todo:
        dependant = todo.pop()
        calls.append(dependant.call)
        todo += dependant.dependencies
    assert len(calls) > 4
    assert [call for call in calls if not inspect.iscoroutinefunction(call)] == []


# What is described


def test_the_api_describes_itself(app: FastAPI) -> None:
    """openapi.json has the four endpoints and both shapes of the body."""
    described = json.loads(send(app, "GET", "/openapi.json").content)
    assert sorted(described["paths"]) == ["/embed", "/health", "/info", "/ready"]
    schema = described["paths"]["/embed"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    array, document = schema["anyOf"]
    assert array == {"type": "array", "items": {"type": "string"}}
    assert sorted(document["properties"]) == ["inputs", "normalize", "truncate", "truncation_direction"]
