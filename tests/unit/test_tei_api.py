# SPDX-License-Identifier: Apache-2.0
"""text-embeddings-inference's endpoints: what each answers, and which model has which."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from client import app_with, backend_of, matrix, outcome, post, send

from service.backends.base import Done, Kind
from service.engine import Job

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Counters
    from fastapi import FastAPI

    from service.engine import Engine

Serve = "Callable[..., FastAPI]"


@pytest.fixture
def serve(counters: Counters, make_engine: Callable[..., Engine]) -> Serve:
    """Return a maker of apps whose model says something else of itself, and gives these rows."""

    def make(rows: list[list[float]] | None = None, **attributes: Any) -> FastAPI:
        backend = backend_of(**attributes)
        if rows is not None:
            given = iter(np.array(rows, dtype=np.float32))
            backend.launch = lambda batch: Done(np.stack([next(given) for _ in range(batch.texts)]))
        return app_with(counters.slot, make_engine(backend))

    return make


def rows_of(app: FastAPI, job: Job) -> np.ndarray:
    return matrix(asyncio.run(app.state.engine.run(job)))


SCORES = {"kind": Kind.SCORES, "labels": ("yes",), "dimension": 1}
LABELS = {"kind": Kind.SCORES, "labels": ("a", "b", "c"), "dimension": 3}


# /embed


@pytest.mark.parametrize(
    ("asked", "job"),
    [
        ({"inputs": "a b"}, Job(["a b"])),
        ({"inputs": [[5, 6], "a"]}, Job([[5, 6], "a"])),
        ({"inputs": "a b", "prompt_name": "query"}, Job(["a b"], prompt="query: ")),
        ({"inputs": "w " * 400}, Job(["w " * 400])),
        (
            {"inputs": "x " + "w " * 400, "truncation_direction": "LEFT"},
            Job(["x " + "w " * 400], from_left=True),
        ),
    ],
    ids=["text", "ids", "prompt", "long", "left"],
)
def test_an_embedding_is_what_the_engine_gives(serve: Any, asked: dict[str, Any], job: Job) -> None:
    """Texts, token ids, prompts and the end that is cut reach the engine."""
    app = serve()
    reply = post(app, "/embed", asked)
    assert reply.status_code == 200
    np.testing.assert_array_equal(np.array(reply.json(), dtype=np.float32), rows_of(app, job))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"inputs": "a"}, [[0.6, 0.8]]),
        ({"inputs": "a", "normalize": True}, [[0.6, 0.8]]),
        ({"inputs": "a", "normalize": False}, [[3, 4]]),
        ({"inputs": "a", "normalize": None}, [[3, 4]]),
        ({"inputs": "a", "normalize": False, "dimensions": 1}, [[1]]),
        (["a"], {"embeddings": [[3, 4]]}),
    ],
    ids=str,
)
def test_normalize_is_ours_where_the_model_does_not(serve: Any, asked: Any, expected: Any) -> None:
    """TEI's default is unit length; a bare array, null and false give what `model.encode` gives."""
    reply = post(serve([[3, 4]], normalized=False, dimension=2), "/embed", asked).json()
    got, wanted = (
        (reply["embeddings"], expected["embeddings"]) if isinstance(asked, list) else (reply, expected)
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"normalize": False}, "normalize: the model itself gives unit length; false is not to be had"),
        ({"dimensions": 33}, "dimensions: the model's vectors have 32, ask for fewer"),
        ({"prompt_name": "doc"}, "prompt_name: the model has no such prompt; it has query"),
        ({"truncate": False, "inputs": "w " * 400}, "inputs.0: more tokens than the limit of 256"),
        ({"inputs": [[1, 253]]}, "inputs.0: token id 253 is not in the vocabulary of 253"),
    ],
    ids=str,
)
def test_what_the_model_cannot_give_is_refused(serve: Any, asked: dict[str, Any], message: str) -> None:
    """422, and what there is instead."""
    reply = post(serve(), "/embed", {"inputs": "a"} | asked)
    assert (reply.status_code, reply.json()["error"][: len(message)]) == (422, message)


def test_vectors_are_cut_to_dimensions_and_have_unit_length_again(serve: Any) -> None:
    """The first numbers of the model's vector, normalised."""
    app = serve()
    cut = np.array(post(app, "/embed", {"inputs": "a", "dimensions": 4}).json())
    whole = rows_of(app, Job(["a"]))[:, :4]
    np.testing.assert_allclose(cut, whole / np.linalg.norm(whole), rtol=1e-5)


@pytest.mark.parametrize("accept", ["application/octet-stream", "application/octet-stream, */*;q=0.1"])
def test_octets_are_answered_to_who_accepts_them(serve: Any, accept: str) -> None:
    """Raw float32, its shape in the headers."""
    app = serve()
    reply = post(app, "/embed", ["a", "b"], headers={"accept": accept})
    assert reply.headers["content-type"] == "application/octet-stream"
    assert (reply.headers["x-shape"], reply.headers["x-dtype"]) == ("2,32", "float32")
    assert reply.content == rows_of(app, Job(["a", "b"])).tobytes()


def test_replies_tell_where_time_went(serve: Any) -> None:
    """TEI's headers."""
    headers = post(serve(), "/embed", ["a b", "ünï"]).headers
    assert {
        name: headers[name] for name in ("x-compute-type", "x-compute-characters", "x-compute-tokens")
    } == {
        "x-compute-type": "cpu",
        "x-compute-characters": "6",
        "x-compute-tokens": "7",
    }
    for name in ("compute", "total", "tokenization", "queue", "inference"):
        assert headers[f"x-{name}-time"].isdecimal()


# The others of an embedding model


def test_embed_all_gives_a_vector_for_each_token(serve: Any) -> None:
    """As many vectors as tokens, specials included."""
    reply = post(serve(), "/embed_all", {"inputs": ["a b", "c"]}).json()
    assert [len(text) for text in reply] == [4, 3]
    assert all(len(vector) == 32 for text in reply for vector in text)


def test_similarity_is_the_cosine(serve: Any) -> None:
    """Of the first text with each of the others, never beyond 1."""
    app = serve([[3, 4], [6, 8], [-4, 3], [-3, -4]], normalized=False, dimension=2)
    asked = {
        "inputs": {"source_sentence": "s", "sentences": ["a", "b", "c"]},
        "parameters": {"truncate": True},
    }
    reply = post(app, "/similarity", asked).json()
    np.testing.assert_allclose(reply, [1, 0, -1], atol=1e-6)
    assert max(map(abs, reply)) <= 1


def test_tokens_are_shown_with_their_places(serve: Any) -> None:
    """Id, text and characters; specials on request."""
    app = serve()
    [[start, a, end]] = post(app, "/tokenize", {"inputs": "ab"}).json()
    assert (start["special"], a["special"], end["special"]) == (True, False, True)
    assert {name: a[name] for name in ("text", "start", "stop")} == {"text": "ab", "start": 0, "stop": 2}
    assert post(app, "/tokenize", {"inputs": ["ab"], "add_special_tokens": False}).json() == [[a]]
    too_many = post(app, "/tokenize", {"inputs": ["a"] * 5})
    assert outcome(too_many) == (
        413,
        {"error": "5 texts in one request; at most 4 are taken, split it", "error_type": "validation"},
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"inputs": ["a", "b"]}), ("/decode", {"ids": [[5], [6]]})],
)
def test_lookups_are_admitted_and_timed_as_all_requests_are(serve: Any, path: str, body: object) -> None:
    """A full worker answers 429, a late reply is 504; each text holds a permit, which returns."""
    app = serve()
    engine = app.state.engine
    engine.admission.texts = 7
    assert post(app, path, body).status_code == 429
    engine.admission.texts = 6
    assert post(app, path, body).status_code == 200
    assert post(app, path, body, headers={"x-request-timeout": "1e-9"}).status_code == 504
    assert (engine.admission.texts, engine.admission.requests) == (6, 0)


@pytest.mark.parametrize(("ids", "texts"), [([5, 6], ["w5 w6"]), ([[0, 5, 1], [7]], ["w5", "w7"])])
def test_token_ids_become_text(serve: Any, ids: object, texts: list[str]) -> None:
    """One list or many; unknown ids are told by index."""
    app = serve()
    assert post(app, "/decode", {"ids": ids}).json() == texts
    assert post(app, "/decode", {"ids": [0, 5], "skip_special_tokens": False}).json() == ["w0 w5"]
    assert outcome(post(app, "/decode", {"ids": [[5], [999]]}))[1]["error"].startswith(
        "inputs.1: token id 999"
    )


# Sparse models and cross-encoders


def test_sparse_vectors_are_their_places_and_values(serve: Any) -> None:
    """Zeros are left out; the bare address answers the same."""
    for path in ("/embed_sparse", "/"):
        app = serve([[0, 0.1, 0, 2], [0, 0, 0, 0]], kind=Kind.SPARSE, dimension=4)
        assert post(app, path, {"inputs": ["a", "b"]}).content == (
            b'[[{"index":1,"value":0.1},{"index":3,"value":2.0}],[]]'
        )


def test_rerank_puts_the_best_first(serve: Any) -> None:
    """Sigmoids of the raw scores, or those themselves; equal ones in the order they came."""
    rows, texts = [[0.0], [2.0], [0.0], [-90.0]], ["t0", "t1", "t2", "t3"]
    ranks = post(serve(rows, **SCORES), "/rerank", {"query": "q", "texts": texts, "return_text": True}).json()
    assert [(rank["index"], rank["text"]) for rank in ranks] == [(1, "t1"), (0, "t0"), (2, "t2"), (3, "t3")]
    np.testing.assert_allclose([rank["score"] for rank in ranks], [0.880797, 0.5, 0.5, 0], atol=1e-6)
    ranks = post(serve(rows, **SCORES), "/rerank", {"query": "q", "texts": texts, "raw_scores": True}).json()
    assert ranks[0] == {"index": 1, "score": 2.0}


@pytest.mark.parametrize("path", ["/predict", "/"])
@pytest.mark.parametrize(
    ("inputs", "many"), [("a", False), (["a"], False), (["a", "b"], False), ([["a", "b"]], True)], ids=str
)
def test_predict_gives_a_score_for_each_label(serve: Any, path: str, inputs: object, *, many: bool) -> None:
    """A softmax, sorted; one input one list, many inputs a list of them."""
    reply = post(serve([[0, 2, 1]], **LABELS), path, {"inputs": inputs}).json()
    [labels] = reply if many else [reply]
    assert [label["label"] for label in labels] == ["b", "c", "a"]
    np.testing.assert_allclose(
        [label["score"] for label in labels], [0.665241, 0.244728, 0.090031], atol=1e-6
    )


def test_predict_gives_raw_scores_on_request(serve: Any) -> None:
    """The model's own numbers."""
    reply = post(serve([[0, 2, 1]], **LABELS), "/predict", {"inputs": "a", "raw_scores": True})
    assert reply.json()[0] == {"score": 2.0, "label": "b"}


@pytest.mark.parametrize(
    ("attributes", "path", "has"),
    [
        ({}, "/rerank", "/embed, /embed_all, /similarity, /tokenize, /decode, /, /v1/embeddings"),
        ({}, "/embed_sparse", "/embed, /embed_all, /similarity, /tokenize, /decode, /, /v1/embeddings"),
        ({"kind": Kind.SPARSE}, "/embed", "/embed_sparse, /tokenize, /decode, /"),
        (SCORES, "/embed", "/rerank, /predict, /tokenize, /decode, /"),
        (LABELS, "/rerank", "/predict, /tokenize, /decode, /"),
    ],
)
def test_a_wrong_endpoint_says_what_the_model_is(
    serve: Any, attributes: dict[str, Any], path: str, has: str
) -> None:
    """422 with the type and the endpoints that there are, before the body is looked at."""
    status, said = outcome(post(serve(**attributes), path, content=b"?"))
    assert (status, said["error_type"]) == (422, "validation")
    assert said["error"].endswith(f" model has {has}")


@pytest.mark.parametrize(
    ("attributes", "described"),
    [
        ({"kind": Kind.SPARSE}, {"sparse": {"dimension": 32, "normalized": True}}),
        (SCORES, {"reranker": {"id2label": {"0": "yes"}, "label2id": {"yes": 0}}}),
        (
            LABELS,
            {
                "classifier": {
                    "id2label": {"0": "a", "1": "b", "2": "c"},
                    "label2id": {"a": 0, "b": 1, "c": 2},
                }
            },
        ),
    ],
)
def test_info_says_what_the_model_is(
    serve: Any, attributes: dict[str, Any], described: dict[str, Any]
) -> None:
    """In TEI's words."""
    assert send(serve(**attributes), "GET", "/info").json()["model_type"] == described
