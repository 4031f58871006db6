# SPDX-License-Identifier: Apache-2.0
"""The API: both shapes of request and reply, errors with their consequences, and what is counted."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from client import KEY, app_with, backend_of, exchange, matrix, outcome, post, send

from service import __version__
from service.admission import Admission
from service.api.replies import Encoded
from service.api.steps import PIECE_BYTES
from service.api.tei import Embed
from service.engine import Deadline, Job, Observer
from service.errors import DeadlineError, InferenceError, NotReadyError, OverloadedError, RequestError
from service.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import Counters
    from fastapi import FastAPI

    from service.engine import Engine


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


@pytest.fixture
def app(counters: Counters, engine: Engine) -> FastAPI:
    """Return a warm worker's app."""
    return app_with(counters.slot, engine)


ID = "a-client's-own-id"

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
    expected = matrix(asyncio.run(engine.run(Job(texts))))
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
            "max_concurrent_requests": 8,
            "max_input_length": 256,
            "max_batch_tokens": 512,
            "max_batch_requests": 64,
            "max_client_batch_size": 4,
            "auto_truncate": True,
            "prompts": ["query"],
            "request_timeout": 60.0,
            "backend": "stub",
            "packing": "stub",
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
        board.spawn(slot, "cpu", time.monotonic())
        board.rows[slot].state = State.READY
    ready = send(app, "GET", "/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert ready.json()["detail"].startswith("2 of 2 workers are ready")


# Requests that are refused


def test_without_a_warm_worker_a_client_shall_come_back_elsewhere(counters: Counters) -> None:
    """503 with the reason, `Retry-After` and a closed connection: the next try shall find a warm worker."""
    reply = send(app_with(counters.slot), "POST", "/embed", json=["a"], headers={"x-request-id": ID})
    assert outcome(reply) == (
        503,
        {
            "error": f"no worker is warm yet: 0 of 2 workers are ready, 2 wanted (request {ID})",
            "error_type": "unhealthy",
        },
    )
    assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")


def test_an_app_that_is_in_no_worker_says_so_too(counters: Counters) -> None:
    """Between the fork and the first state there is no fleet to ask."""
    app = app_with(counters.slot)
    app.state.fleet = None
    error = {"error": f"no worker is warm yet (request {ID})", "error_type": "unhealthy"}
    assert outcome(send(app, "GET", "/info", headers={"x-request-id": ID})) == (503, error)


PROTECTED = [
    *[("POST", path) for path in ("/embed", "/", "/v1/embeddings", "/embeddings", "/tokenize", "/rerank")],
    *[("GET", path) for path in ("/info", "/v1/models", "/v1/models/x")],
]


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
@pytest.mark.parametrize(("method", "path"), PROTECTED)
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
        assert reply.status_code in {200, 404, 422}  # not every endpoint takes this body
        return
    assert reply.status_code == 401
    assert "the API key is missing or wrong; send `Authorization: Bearer <key>`" in reply.text
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
        (b'{"inputs": ["a", 1]}', 422, "inputs.1: this should be a text"),
        (b'["a", "\xff"]', 422, "inputs.1: the text is not valid Unicode"),
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

    observer = Observer()

    def __init__(self, error: Exception) -> None:
        self.error, self.backend, self.admission = error, backend_of(), Admission(8, 8)

    def deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline(timeout_s or 60, asyncio.get_running_loop().time() + 60)

    async def compute(self, job: Job) -> None:
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
        (DeadlineError("not done within 1 s"), 504, "timeout", None, None),
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
    headers = {"x-request-id": "7"}
    reply = send(app_with(counters.slot, Refusing(error)), "POST", "/embed", json=["a"], headers=headers)
    said = f"{error} (request 7)" if status >= 500 else str(error)
    assert outcome(reply) == (status, {"error": said, "error_type": kind})
    assert (reply.headers.get("retry-after"), reply.headers.get("connection")) == (retry_after, connection)


# What is counted


def test_requests_are_counted_by_endpoint_and_status(counters: Counters, app: FastAPI) -> None:
    """One counter for each endpoint and status; a scanner's paths are all `other`."""
    send(app, "POST", "/embed", json=["a"])
    send(app, "POST", "/embed", json=["a"])
    send(app, "POST", "/embed", json=[])
    send(app, "GET", "/embed")
    send(app, "GET", "/health")
    for path in ("/.env", "/wp-login.php", "/embed/", "/v1/models/a/b"):
        send(app, "GET", path)
    assert counters.read("warmfleet_requests_total") == {
        ("/embed", "200"): 2,
        ("/embed", "422"): 1,
        ("/embed", "405"): 1,
        ("/health", "200"): 1,
        ("/v1/models/{model}", "404"): 1,
        ("other", "307"): 1,
        ("other", "404"): 2,
    }


def test_every_request_is_timed_as_a_whole(counters: Counters, app: FastAPI) -> None:
    """The stage `total` has one observation for each request."""
    for _ in range(3):
        send(app, "POST", "/embed", json=["a"])
    assert counters.read("warmfleet_request_stage_seconds_count") == {("total",): 3}
    [seconds] = counters.read("warmfleet_request_stage_seconds_sum").values()
    assert 0 < seconds < 10


def test_a_bug_is_answered_counted_and_logged_under_one_id(
    counters: Counters, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception that nobody expected ends in a reply without its text, in the counter, and in the log."""
    app = app_with(counters.slot, Refusing(ZeroDivisionError("a bug")))
    reply = post(app, "/embed", ["a"], headers={"x-request-id": "q1"})
    assert outcome(reply) == (
        500,
        {"error": "an error of ours, not of the request (request q1)", "error_type": "backend"},
    )
    assert counters.read("warmfleet_requests_total") == {("/embed", "500"): 1}
    assert "request q1 to /embed failed" in caplog.text
    assert "a bug" in caplog.text


# Ids and time limits


@pytest.mark.parametrize("given", ["abc-123", "x" * 128, "!~"])
def test_a_request_keeps_its_clients_id(app: FastAPI, given: str) -> None:
    """`X-Request-Id` comes back as it was, on replies and on errors."""
    for body in (["a"], []):
        assert post(app, "/embed", body, headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "\t", "é"])
def test_an_id_that_is_none_is_replaced_by_one_of_ours(app: FastAPI, given: str) -> None:
    """What could forge a line of the log, or fill it, is not taken; no two requests get the same id."""
    headers = {"x-request-id": given.encode("latin-1")}
    ids = [post(app, "/embed", ["a"], headers=headers).headers["x-request-id"] for _ in range(3)]
    assert given not in ids
    assert len(set(ids)) == 3


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_time_limit_that_is_none_is_refused(app: FastAPI, given: str) -> None:
    """`X-Request-Timeout` is a number of seconds above 0."""
    reply = post(app, "/embed", ["a"], headers={"x-request-timeout": given})
    assert reply.status_code == 422
    assert reply.json()["error"].startswith("X-Request-Timeout: ")


def test_a_client_may_wait_for_less(
    counters: Counters, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `X-Request-Timeout` the engine gives up sooner: 504, in words."""
    engine = make_engine()
    monkeypatch.setattr(engine.inference, "put", lambda entries: None)  # nobody will ever compute it
    reply = post(app_with(counters.slot, engine), "/embed", ["a"], headers={"x-request-timeout": "0.05"})
    assert (reply.status_code, reply.json()["error_type"]) == (504, "timeout")
    assert "not done within 0.05 s" in reply.json()["error"]


def test_a_body_that_does_not_come_is_not_waited_for(app: FastAPI, engine: Engine) -> None:
    """The time of a request begins with its head: 504 in words, and a closed connection."""
    half = {"type": "http.request", "body": b'["a', "more_body": True}
    head, body = asyncio.run(exchange(app, "/embed", [half], [(b"x-request-timeout", b"0.05")]))
    assert (head["status"], dict(head["headers"])[b"connection"]) == (504, b"close")
    said = json.loads(body["body"])
    assert said["error"].startswith("the body did not arrive within 0.05 s (request ")
    assert (said["error_type"], engine.admission.texts) == ("timeout", 0)


# Permits

BODY = {"type": "http.request", "body": b'["a", "b"]', "more_body": False}


async def post_texts(app: FastAPI, send: Callable[[Any], Any]) -> None:
    """Post two texts as a server would, which calls `send` with the reply."""

    async def receive() -> Any:
        return BODY

    scope = {"type": "http", "method": "POST", "path": "/embed", "headers": [], "query_string": b""}
    await app(scope, receive, send)


def test_permits_are_held_until_the_reply_is_sent(app: FastAPI, engine: Engine) -> None:
    """What is encoded, and waits for its client, takes memory as what is computed does."""
    held = []

    async def send(message: Any) -> None:
        held.append((message["type"], engine.admission.texts))

    asyncio.run(post_texts(app, send))
    assert held == [("http.response.start", 2), ("http.response.body", 2)]
    assert engine.admission.texts == 0


def with_large_replies(monkeypatch: pytest.MonkeyPatch, size: int) -> bytes:
    """Let /embed answer so many bytes, and return them."""
    body = bytes(range(251)) * (size // 251 + 1)
    monkeypatch.setattr(Embed, "encode", lambda *_, **__: Encoded(body[:size]))
    return body[:size]


@pytest.mark.parametrize(("size", "pieces"), [(PIECE_BYTES, 1), (PIECE_BYTES + 1, 2), (2 * PIECE_BYTES, 2)])
def test_a_large_reply_is_sent_in_pieces(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, size: int, pieces: int
) -> None:
    """The server holds one of them at a time; together they are the reply."""
    body = with_large_replies(monkeypatch, size)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(post_texts(app, send))
    assert len(sent) == 1 + pieces
    assert b"".join(message["body"] for message in sent[1:]) == body
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * (pieces - 1) + [False]


def test_a_client_that_does_not_take_its_reply_is_not_waited_for(
    counters: Counters, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A large reply that is not taken within `request_timeout` ends, and its permits return."""
    with_large_replies(monkeypatch, 3 * PIECE_BYTES)
    sent = []

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if len(sent) == 3:
            assert engine.admission.texts == 2
            await asyncio.Event().wait()

    asyncio.run(post_texts(app_with(counters.slot, engine, request_timeout=1), send))
    assert (len(sent), engine.admission.texts) == (3, 0)
    assert "its client did not take the reply in time" in caplog.text


# Clients that leave


class Forgetful(Observer):
    """Keeps why requests were dropped."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def dropped(self, reason: str, texts: int) -> None:
        self.reasons.append(reason)


def test_a_client_that_leaves_while_it_waits_is_forgotten(
    counters: Counters,
    make_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its texts are dropped, nothing is answered, it counts as 499, and the log has no traceback."""
    engine = make_engine(observer=Forgetful())
    monkeypatch.setattr(engine.inference, "put", lambda entries: None)
    body = {"type": "http.request", "body": b'["a"]', "more_body": False}
    app = app_with(counters.slot, engine)
    with caplog.at_level(logging.DEBUG, "warmfleet"):
        sent = asyncio.run(exchange(app, "/embed", [body, {"type": "http.disconnect"}]))
    assert sent == []
    assert engine.observer.reasons == ["abandoned"]  # type: ignore[attr-defined]
    assert engine.admission.texts == 0
    assert counters.read("warmfleet_requests_total") == {("/embed", "499"): 1}
    assert caplog.text == ""


def test_a_client_that_leaves_within_its_body_is_forgotten(app: FastAPI, counters: Counters) -> None:
    """Half a body is no request."""
    half = {"type": "http.request", "body": b'["a', "more_body": True}
    assert asyncio.run(exchange(app, "/embed", [half, {"type": "http.disconnect"}])) == []
    assert counters.read("warmfleet_requests_total") == {("/embed", "499"): 1}


def test_a_server_that_stops_still_cancels_a_request(
    counters: Counters, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation that no client caused goes on to whoever asked for it."""
    engine = make_engine()
    waiting = asyncio.Event()
    monkeypatch.setattr(engine.inference, "put", lambda entries: waiting.set())
    body = {"type": "http.request", "body": b'["a"]', "more_body": False}

    async def stop() -> None:
        task = asyncio.create_task(exchange(app_with(counters.slot, engine), "/embed", [body]))  # type: ignore[arg-type]
        await asyncio.wait_for(waiting.wait(), 10)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(stop())


# Browsers


def test_no_other_origin_may_call_unless_it_is_set(counters: Counters, engine: Engine) -> None:
    """CORS is off; with `cors_origins` those origins are allowed, also when they ask first."""
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed = app_with(counters.slot, engine)
    assert send(closed, "OPTIONS", "/embed", headers=ask).status_code == 405
    assert "access-control-allow-origin" not in post(closed, "/embed", ["a"], headers=ask).headers
    opened = app_with(counters.slot, engine, cors_origins=("https://a.example",))
    for reply in (send(opened, "OPTIONS", "/embed", headers=ask), post(opened, "/embed", ["a"], headers=ask)):
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "https://a.example")
    assert counters.read("warmfleet_requests_total")["/embed", "200"] == 3


# What is described


def test_the_api_describes_itself(app: FastAPI) -> None:
    """openapi.json has every endpoint, its bodies, its statuses in the dialect of the path; it resolves."""
    described = json.loads(send(app, "GET", "/openapi.json").content)
    routes = {getattr(route, "path", "").replace(":path", "") for route in app.routes}
    assert set(described["paths"]) == routes - {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
    statuses = {"200", "401", "413", "422", "429", "500", "503", "504"}
    assert set(described["paths"]["/embed"]["post"]["responses"]) == statuses
    assert set(described["paths"]["/v1/embeddings"]["post"]["responses"]) == statuses | {"404"}
    assert "securitySchemes" not in described["components"]
    references = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                references.add(node["$ref"])
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                walk(item)

    walk(described)
    for reference in references:
        found = described
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
        assert found, reference
    assert len(references) > 12


def test_the_key_is_described_if_there_is_one(counters: Counters) -> None:
    """Endpoints ask for a bearer token, probes do not."""
    described = json.loads(send(app_with(counters.slot, api_key=KEY), "GET", "/openapi.json").content)
    assert described["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert described["paths"]["/embed"]["post"]["security"] == [{"key": []}]
    assert described["paths"]["/ready"]["get"]["security"] == []


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/nothing", (404, {"error": "Not Found", "error_type": "validation"})),
        ("GET", "/embed", (405, {"error": "Method Not Allowed", "error_type": "validation"})),
        ("PUT", "/info", (405, {"error": "Method Not Allowed", "error_type": "validation"})),
    ],
)
def test_unknown_paths_and_methods_are_answered_in_the_dialect(
    app: FastAPI, method: str, path: str, expected: tuple[int, object]
) -> None:
    """404 and 405 have the shape of all errors."""
    assert outcome(send(app, method, path)) == expected
