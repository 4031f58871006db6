# SPDX-License-Identifier: Apache-2.0
"""Clients that people use, on a real Gunicorn: the vectors of `encode`, and errors that each understands."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import socket
import subprocess
import sys
import time
from base64 import b64decode
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import openai
import pytest
from harness import DEADLINE_S, ROOT, Service, assert_invariants, new_client, until
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError
from test_model import ENCODE, OFFLINE, PACKAGE, PATIENCE_S, REAL, SAME, model_folder, salad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import httpx
    from conftest import Tiny
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

pytestmark = pytest.mark.timeout(400)
needs_model = [
    pytest.mark.model,
    pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed"),
]

KEYS = ("first-key-of-the-file", "second-key-of-the-file", "key-of-the-environment")
NAMES = ("mini", "text-embedding-mini")
TEXTS = [*salad(30, most_words=60), "東京 🚢", "river " * 400]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two workers on the real model, closed by three keys, under two names that are checked."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# for the tests\n{KEYS[0]}\n\n  {KEYS[1]}\n", encoding="utf-8")
    chosen = {
        "api_key_file": file,
        "api_key": KEYS[2],
        "served_model_name": ",".join(NAMES),
        "check_model": True,
    }
    with Service(environ=OFFLINE, **(REAL | chosen)) as running:
        running.wait_ready(PATIENCE_S)
        yield running


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    """What SentenceTransformer.encode makes of TEXTS, in a process of its own."""
    scratch = tmp_path_factory.mktemp("golden")
    source, out = scratch / "texts.json", scratch / "vectors.npy"
    source.write_text(json.dumps(TEXTS), encoding="utf-8")
    command = [sys.executable, "-c", ENCODE, str(model_folder()), str(source), str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    vectors: Vectors = np.load(out)
    return vectors


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with new_client(timeout=60) as opened:
        yield opened


@pytest.fixture
def ask(fleet: Service) -> Iterator[openai.OpenAI]:
    """OpenAI's client, with the first of the keys."""
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key=KEYS[0], max_retries=0) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client asks a proxy for the service, or the hub for leave."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def bearer(key: str = KEYS[0]) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def shortened(vectors: Vectors, dimensions: int) -> Vectors:
    """Return what `encode(truncate_dim=..., normalize_embeddings=True)` gives."""
    cut = vectors[:, :dimensions]
    found: Vectors = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    return found


def same(found: Any, expected: Any, tolerance: float = SAME) -> None:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


# The openai package


class TestOpenAI:
    """The `openai` package, as its manual has it."""

    pytestmark = needs_model

    @pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
    def test_vectors_are_those_of_encode(
        self, ask: openai.OpenAI, golden: Vectors, options: dict[str, Any]
    ) -> None:
        """As floats, as base64, and in the package's own default, which is base64: within 1e-5 of encode."""
        reply = ask.embeddings.create(model="mini", input=TEXTS, **options)
        rows = [row.embedding for row in reply.data]
        if options.get("encoding_format") == "base64":
            rows = [np.frombuffer(b64decode(row), "<f4") for row in rows]
        same(rows, golden)
        assert [row.index for row in reply.data] == list(range(len(TEXTS)))
        assert (reply.object, reply.model, reply.data[0].object) == ("list", "mini", "embedding")
        assert reply.usage.prompt_tokens == reply.usage.total_tokens > len(TEXTS)

    def test_one_text_is_no_list(self, ask: openai.OpenAI, golden: Vectors) -> None:
        """A string gives one vector."""
        same([row.embedding for row in ask.embeddings.create(model="mini", input=TEXTS[3]).data], golden[3:4])

    def test_token_ids_are_taken(
        self, ask: openai.OpenAI, client: httpx.Client, fleet: Service, golden: Vectors
    ) -> None:
        """The model's own token ids, one list or several, give the text's vector."""
        body = {"inputs": TEXTS[:3], "add_special_tokens": False}
        tokens = client.post(f"{fleet.url}/tokenize", json=body, headers=bearer()).json()
        ids = [[token["id"] for token in row] for row in tokens]
        several = ask.embeddings.create(model="mini", input=ids)
        same([row.embedding for row in several.data], golden[:3])
        same([row.embedding for row in ask.embeddings.create(model="mini", input=ids[1]).data], golden[1:2])
        mixed = client.post(f"{fleet.url}/embed", json=[TEXTS[0], *ids[1:3], TEXTS[3]], headers=bearer())
        same(mixed.json()["embeddings"], golden[:4])

    def test_dimensions_shorten(self, ask: openai.OpenAI, golden: Vectors) -> None:
        """`dimensions` keeps the first numbers, at unit length."""
        reply = ask.embeddings.create(model="mini", input=TEXTS, dimensions=64)
        same([row.embedding for row in reply.data], shortened(golden, 64))

    def test_models_are_listed(self, ask: openai.OpenAI) -> None:
        """Both names are listed, and each can be asked for."""
        assert [model.id for model in ask.models.list()] == list(NAMES)
        for name in NAMES:
            model = ask.models.retrieve(name)
            assert (model.id, model.object, model.owned_by) == (name, "model", "warmfleet")
            assert 1.7e9 < model.created <= time.time()

    def test_another_model_is_not_found(self, ask: openai.OpenAI) -> None:
        """With `check_model` another name raises NotFoundError, which says which name there is."""
        for call in (
            lambda: ask.models.retrieve("gpt-9"),
            lambda: ask.embeddings.create(model="gpt-9", input="a"),
        ):
            with pytest.raises(openai.NotFoundError, match="gpt-9 is not served here; mini is") as caught:
                call()
            assert caught.value.code == "model_not_found"

    def test_a_wrong_key_is_an_authentication_error(self, fleet: Service) -> None:
        """A wrong key raises AuthenticationError."""
        with (
            openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            stranger.embeddings.create(model="mini", input="a")
        assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")

    @pytest.mark.parametrize(
        ("wrong", "param", "why"),
        [
            ({"input": ["a", ""]}, "input", "input.1: the text is empty"),
            ({"input": []}, "input", "input: no texts"),
            ({"input": [[1], ["a"]]}, "input", "input.1: "),
            ({"input": [10**6]}, "input", "token id 1000000 is not in the vocabulary"),
            ({"input": "a", "dimensions": 10_000}, "dimensions", "the model's vectors have 384"),
            ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ],
    )
    def test_an_invalid_request_says_what_is_wrong(
        self, ask: openai.OpenAI, wrong: dict[str, Any], param: str, why: str
    ) -> None:
        """It raises UnprocessableEntityError with the field as `param`, and the place of the text."""
        with pytest.raises(openai.UnprocessableEntityError, match=re.escape(why)) as caught:
            ask.embeddings.create(model="mini", **wrong)
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")

    def test_too_many_texts_are_413(self, ask: openai.OpenAI) -> None:
        """More texts than `max_client_batch_size` raise APIStatusError 413, which says the limit."""
        with pytest.raises(openai.APIStatusError, match="at most 32") as caught:
            ask.embeddings.create(model="mini", input=["a"] * 33)
        assert caught.value.status_code == 413

    def test_many_at_once_keep_their_order(self, fleet: Service, golden: Vectors) -> None:
        """Forty requests of AsyncOpenAI at once: each gets its own vectors."""

        async def all_at_once() -> list[list[list[float]]]:
            async with openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key=KEYS[1]) as asked:
                parts = [TEXTS[start : start + 3] for start in range(20)] * 2
                replies = await asyncio.gather(
                    *(asked.embeddings.create(model="mini", input=p) for p in parts)
                )
                return [[row.embedding for row in reply.data] for reply in replies]

        expected = [golden[start : start + 3] for start in range(20)] * 2
        for found, wanted in zip(asyncio.run(all_at_once()), expected, strict=True):
            same(found, wanted)

    def test_an_id_of_the_client_comes_back(self, ask: openai.OpenAI) -> None:
        """The client's `X-Request-Id` is the reply's; without one, each reply has another."""
        create = ask.embeddings.with_raw_response.create
        named = create(model="mini", input="a", extra_headers={"X-Request-Id": "job-17/3"})
        assert named.headers["x-request-id"] == "job-17/3"
        ids = {create(model="mini", input="a").headers["x-request-id"] for _ in range(5)}
        assert len(ids) == 5


# HuggingFace, langchain, curl


class TestHuggingFace:
    """huggingface_hub's InferenceClient, with an address instead of a model."""

    pytestmark = needs_model

    @pytest.fixture(autouse=True)
    def online(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """HF_HUB_OFFLINE, which keeps tests off the hub, would keep this client off every server."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    @pytest.mark.parametrize("path", ["", "/embed"])
    def test_feature_extraction_is_encode(self, fleet: Service, golden: Vectors, path: str) -> None:
        """`feature_extraction`, at the bare address or at /embed: one vector a text, those of encode."""
        with InferenceClient(model=fleet.url + path, token=KEYS[0]) as asked:
            same(asked.feature_extraction(TEXTS[0]), golden[:1])
            options = {"normalize": True, "truncate": True, "truncation_direction": "right"}
            same(asked.feature_extraction(TEXTS, **options), golden)
            same(asked.feature_extraction(TEXTS, dimensions=64), shortened(golden, 64))

    def test_sentence_similarity_is_the_cosine(self, fleet: Service, golden: Vectors) -> None:
        """`sentence_similarity` at /similarity gives the cosines of encode's vectors."""
        with InferenceClient(model=f"{fleet.url}/similarity", token=KEYS[0]) as asked:
            found = asked.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
        same(found, golden[1:] @ golden[0])

    def test_errors_carry_our_sentence(self, fleet: Service) -> None:
        """A wrong key and an empty text raise HfHubHTTPError with the status."""
        with (
            InferenceClient(model=fleet.url, token="wrong") as stranger,
            pytest.raises(HfHubHTTPError, match="401"),
        ):
            stranger.feature_extraction("a")
        with (
            InferenceClient(model=fleet.url, token=KEYS[0]) as asked,
            pytest.raises((HfHubHTTPError, ValidationError), match=r"inputs\.0: the text is empty|422"),
        ):
            asked.feature_extraction("")


@pytest.mark.model
@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed")
def test_langchain_embeds_documents_and_queries(fleet: Service, golden: Vectors) -> None:
    """OpenAIEmbeddings gives encode's vectors, told not to make tiktoken's ids of the texts.

    Its default, `check_embedding_ctx_length=True`, sends ids of OpenAI's vocabulary, which mean other
    words here, and downloads that vocabulary.
    """
    reason = (
        "langchain-openai is not installed; it would bring 14 packages, tiktoken and langsmith among them"
    )
    langchain_openai = pytest.importorskip("langchain_openai", reason=reason)
    asked = langchain_openai.OpenAIEmbeddings(
        model="mini",
        base_url=f"{fleet.url}/v1",
        api_key=KEYS[0],
        check_embedding_ctx_length=False,
        chunk_size=16,
    )
    try:
        same(asked.embed_documents(TEXTS), golden)
        same([asked.embed_query(TEXTS[5])], golden[5:6])
    finally:
        asked.client._client.close()


def curl_commands() -> list[str]:
    """Return the commands of docs/api.md, continued lines joined."""
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^\s*\$?\s*(curl .*)$", text, re.MULTILINE)


@pytest.mark.model
@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed")
def test_curl_commands_of_the_manual_work(fleet: Service, need: Callable[[str], str], tmp_path: Path) -> None:
    """Every curl command of docs/api.md is answered with 200."""
    need("curl")
    commands = curl_commands()
    assert commands, "docs/api.md shows no curl command"
    for command in commands:
        local = command.replace("127.0.0.1:8000", fleet.bind).replace("localhost:8000", fleet.bind)
        local = local.replace("127.0.0.1:9000", fleet.ops_bind).replace("localhost:9000", fleet.ops_bind)
        extra = ["--write-out", "%{stderr}HTTP %{http_code}", "-H", f"Authorization: Bearer {KEYS[0]}"]
        line = re.sub(r"^curl ", f"curl {shlex.join(extra)} ", local)
        said = subprocess.run(
            ["bash", "-c", line], capture_output=True, cwd=tmp_path, timeout=60, check=False
        )
        status = said.stderr.decode()
        assert said.returncode == 0, f"{command}: {status}"
        assert status.endswith("HTTP 200"), f"{command}: {status}: {said.stdout[:500]!r}"


# Keys, probes, octets


class TestKeys:
    """Several keys, from a file and the environment."""

    pytestmark = needs_model

    def test_each_key_opens_the_api(self, fleet: Service, client: httpx.Client) -> None:
        """Both keys of the file and the one of the environment do; the comment and a prefix do not."""
        for key in KEYS:
            for path in ("/v1/models", "/info"):
                assert client.get(fleet.url + path, headers=bearer(key)).status_code == 200
        for key in ("# for the tests", KEYS[0][:-1], KEYS[0] + "x", ",".join(KEYS)):
            reply = client.post(f"{fleet.url}/embed", json=["a"], headers=bearer(key))
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"] == "Bearer"

    def test_errors_are_in_the_words_of_the_api_asked(self, fleet: Service, client: httpx.Client) -> None:
        """A 401 under /v1 and on /embeddings has OpenAI's shape, elsewhere text-embeddings-inference's."""
        for path in ("/v1/embeddings", "/embeddings", "/embed", "/rerank", "/tokenize", "/"):
            reply = client.post(fleet.url + path, json={"inputs": "a", "input": "a"})
            assert reply.status_code == 401
            if path in {"/v1/embeddings", "/embeddings"}:
                assert set(reply.json()) == {"error"}
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
            else:
                assert reply.json()["error_type"] == "unauthorized"

    def test_probes_and_metrics_want_no_key(self, fleet: Service) -> None:
        """/health and /ready on both listeners, /metrics and /workers on the private one."""
        for path in ("/health", "/ready"):
            assert fleet.get(path, ops=False).status_code == 200
        for path in ("/health", "/livez", "/ready", "/readyz", "/metrics", "/workers"):
            assert fleet.get(path).status_code == 200

    def test_keys_are_told_to_nobody(self, fleet: Service) -> None:
        """No key is in the log, in the metrics or on a page."""
        pages = [fleet.get(path).text for path in ("/metrics", "/workers", "/ready")]
        for key in KEYS:
            assert all(key not in page for page in [fleet.log, *pages])


@pytest.mark.model
@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed")
@pytest.mark.parametrize(
    ("path", "field"), [("/embed", "inputs"), ("/v1/embeddings", "input"), ("/", "inputs")]
)
def test_octets_need_no_json(
    fleet: Service, client: httpx.Client, golden: Vectors, path: str, field: str
) -> None:
    """`Accept: application/octet-stream` gives float32 for numpy.frombuffer, with the shape beside it."""
    headers = bearer() | {"Accept": "application/octet-stream"}
    reply = client.post(fleet.url + path, json={field: TEXTS}, headers=headers)
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["x-dtype"] == "float32"
    shape = [int(size) for size in reply.headers["x-shape"].split(",")]
    same(np.frombuffer(reply.content, "<f4").reshape(shape), golden)
    refused = client.post(fleet.url + path, json={field: ""}, headers=headers)
    assert (refused.status_code, refused.headers["content-type"]) == (422, "application/json")


@pytest.mark.model
@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed")
def test_headers_tell_what_a_request_took(fleet: Service, client: httpx.Client) -> None:
    """The headers of text-embeddings-inference are there, and agree with the reply's usage."""
    reply = client.post(f"{fleet.url}/v1/embeddings", json={"input": ["a", "río"]}, headers=bearer())
    names = ("compute-time", "total-time", "tokenization-time", "queue-time", "inference-time")
    assert all(reply.headers[f"x-{name}"].isdigit() for name in names)
    assert reply.headers["x-compute-type"] == "cpu"
    assert reply.headers["x-compute-characters"] == "4"
    assert int(reply.headers["x-compute-tokens"]) == reply.json()["usage"]["total_tokens"]
    assert re.fullmatch(
        r"tokenize;dur=[\d.]+, queue;dur=[\d.]+, forward;dur=[\d.]+", reply.headers["server-timing"]
    )


@pytest.mark.model
@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed")
def test_the_fleet_is_well_after_all_of_them(fleet: Service) -> None:
    """After all clients the invariants hold."""
    assert_invariants(fleet)


# Overload, clients that leave, and time limits, on a model that takes as long as it is told


def test_overload_is_a_rate_limit_error_and_retries_wait() -> None:
    """A full worker raises RateLimitError; a client that retries waits as long as Retry-After says."""
    limits = {"workers": 1, "max_concurrent_requests": 1, "stub_forward_ms": 700, "skip_warmup": True}
    with Service(**limits) as service:
        service.wait_ready()
        base = f"{service.url}/v1"
        with openai.OpenAI(base_url=base, api_key="any", max_retries=0) as hasty:
            occupied = service.send(["busy"])
            until(lambda: service.worker(0)["requests_in_flight"] > 0, what="the first is in work")
            with pytest.raises(openai.RateLimitError) as caught:
                hasty.embeddings.create(model="any", input="a")
            wait = int(caught.value.response.headers["retry-after"])
            assert caught.value.type == "rate_limit_error"
            assert occupied().ok
        with openai.OpenAI(base_url=base, api_key="any", max_retries=3) as patient:
            occupied = service.send(["busy"])
            until(lambda: service.worker(0)["requests_in_flight"] > 0, what="the first is in work")
            rejected = service.metrics().total("warmfleet_rejected_texts_total")
            began = time.monotonic()
            assert len(patient.embeddings.create(model="any", input="a").data) == 1
            assert time.monotonic() - began >= wait >= 1
            assert occupied().ok
        assert service.metrics().total("warmfleet_rejected_texts_total") == rejected + 1
        assert_invariants(service)


def test_texts_of_a_client_that_leaves_are_not_computed() -> None:
    """A client that hangs up while its texts wait: they are dropped before their batch, and counted."""
    with Service(workers=1, stub_forward_ms=800, skip_warmup=True) as service:
        service.wait_ready()
        occupied = service.send(["busy"])
        until(lambda: service.worker(0)["requests_in_flight"] > 0, what="the first is in work")
        host, _, port = service.bind.rpartition(":")
        body = b'["nobody", "waits", "for me"]'
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as leaving:
            leaving.sendall(
                b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            until(lambda: service.worker(0)["load"] >= 4, what="the texts wait")
        assert occupied().ok

        def dropped() -> float:
            return service.metrics().total("warmfleet_dropped_texts_total", reason="abandoned")

        until(lambda: dropped() == 3, what="three texts are dropped")
        assert service.embed().ok
        seen = service.metrics()
        assert seen.total("warmfleet_texts_total") == seen.total("warmfleet_batch_texts_sum") == 2
        assert seen.total("warmfleet_requests_total", endpoint="/embed", status="499") == 1
        assert seen.total("warmfleet_dropped_texts_total", reason="deadline") == 0
        assert_invariants(service)


def test_a_client_may_ask_for_less_time() -> None:
    """`X-Request-Timeout: 0.1` behind a pass of 800 ms: 504 in time, with the id; dropped, and counted."""
    with Service(workers=1, stub_forward_ms=800, skip_warmup=True) as service, new_client() as client:
        service.wait_ready()
        occupied = service.send(["busy"])
        until(lambda: service.worker(0)["requests_in_flight"] > 0, what="the first is in work")
        began = time.monotonic()
        headers = {"X-Request-Timeout": "0.1", "X-Request-Id": "in-a-hurry"}
        reply = client.post(f"{service.url}/embed", json=["a", "b"], headers=headers)
        assert reply.status_code == 504
        assert time.monotonic() - began < 0.7, "the reply came after the pass"
        assert reply.json()["error_type"] == "timeout"
        assert "(request in-a-hurry)" in reply.json()["error"]
        assert reply.headers["x-request-id"] == "in-a-hurry"
        assert occupied().ok
        assert service.embed().ok
        seen = service.metrics()
        assert seen.total("warmfleet_dropped_texts_total", reason="deadline") == 2
        assert seen.total("warmfleet_batch_texts_sum") == 2
        with (
            openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as asked,
            pytest.raises(openai.InternalServerError) as caught,
        ):
            asked.embeddings.create(model="any", input="a", extra_headers={"X-Request-Timeout": "0.1"})
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        assert_invariants(service)


# Models of other types, for real


def test_a_reranker_scores_as_cross_encoder_does(tiny: dict[str, Tiny], client: httpx.Client) -> None:
    """/rerank, /predict and the bare address give CrossEncoder's scores; /embed says what the model is."""
    model = tiny["reranker"]
    query, said = model.texts[0], model.said
    with Service(environ=OFFLINE, **(REAL | {"model_id": model.folder, "workers": 1})) as service:
        service.wait_ready(PATIENCE_S)
        assert service.get("/info", ops=False).json()["model_type"] == {
            "reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        }

        def post(path: str, body: Any) -> Any:
            reply = client.post(service.url + path, json=body)
            assert reply.status_code == 200, reply.text
            return reply.json()

        for raw, expected in ((False, said["pairs"]), (True, said["raw pairs"])):
            body = {"query": query, "texts": model.texts, "raw_scores": raw, "return_text": True}
            ranks = post("/rerank", body)
            assert [rank["index"] for rank in ranks] == list(np.argsort(expected)[::-1])
            same([rank["score"] for rank in ranks], sorted(expected, reverse=True))
            assert [rank["text"] for rank in ranks] == [model.texts[rank["index"]] for rank in ranks]
            pairs = {"inputs": [[query, text] for text in model.texts], "raw_scores": raw}
            for path in ("/predict", "/"):
                answers = post(path, pairs)
                same([answer[0]["score"] for answer in answers], expected)
                assert {answer[0]["label"] for answer in answers} == {"LABEL_0"}
        assert "text" not in post("/rerank", {"query": query, "texts": model.texts})[0]
        (single,) = post("/predict", {"inputs": model.texts[1], "raw_scores": True})
        same([single["score"]], said["raw texts"][1])
        refuses(
            service,
            client,
            {"/embed", "/v1/embeddings", "/embed_sparse", "/similarity"},
            "this reranker model",
        )
        with (
            openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as asked,
            pytest.raises(openai.UnprocessableEntityError, match="this reranker model has /rerank"),
        ):
            asked.embeddings.create(model="any", input="a")
        assert_invariants(service)


def test_a_classifier_predicts_as_cross_encoder_does(tiny: dict[str, Tiny], client: httpx.Client) -> None:
    """/predict gives the labels and their softmax, the most likely first; /rerank says what the model is."""
    model = tiny["classifier"]
    query, said = model.texts[0], model.said
    with Service(environ=OFFLINE, **(REAL | {"model_id": model.folder, "workers": 1})) as service:
        service.wait_ready(PATIENCE_S)
        labels = service.get("/info", ops=False).json()["model_type"]["classifier"]["id2label"]
        assert labels == {"0": "wrong", "1": "right"}

        def predict(inputs: Any, *, raw: bool) -> list[list[float]]:
            reply = client.post(f"{service.url}/predict", json={"inputs": inputs, "raw_scores": raw})
            assert reply.status_code == 200, reply.text
            answers = reply.json()
            assert all(answer[0]["score"] >= answer[1]["score"] for answer in answers)
            found = [{one["label"]: one["score"] for one in answer} for answer in answers]
            return [[scores["wrong"], scores["right"]] for scores in found]

        pairs = [[query, text] for text in model.texts]
        same(predict(pairs, raw=False), said["pairs"])
        same(predict(pairs, raw=True), said["raw pairs"])
        same(predict([[text] for text in model.texts], raw=True), said["raw texts"])
        same(
            predict([pairs[0], model.texts[1:2], pairs[2]], raw=True),
            [said["raw pairs"][0], said["raw texts"][1], said["raw pairs"][2]],
        )
        refuses(service, client, {"/embed", "/rerank", "/embeddings", "/embed_all"}, "this classifier model")
        assert_invariants(service)


def test_a_sparse_model_embeds_as_sparse_encoder_does(tiny: dict[str, Tiny], client: httpx.Client) -> None:
    """/embed_sparse and the bare address give SparseEncoder's vectors; /embed says what the model is."""
    model = tiny["sparse"]
    expected = np.array(model.said["vectors"])
    with Service(environ=OFFLINE, **(REAL | {"model_id": model.folder, "workers": 1})) as service:
        service.wait_ready(PATIENCE_S)
        described = service.get("/info", ops=False).json()["model_type"]["sparse"]
        assert described["dimension"] == expected.shape[1]
        for path in ("/embed_sparse", "/"):
            reply = client.post(service.url + path, json={"inputs": model.texts})
            assert reply.status_code == 200, reply.text
            found = np.zeros_like(expected)
            for row, answer in zip(found, reply.json(), strict=True):
                assert [one["index"] for one in answer] == sorted({one["index"] for one in answer})
                for one in answer:
                    row[one["index"]] = one["value"]
            same(found, expected)
        refuses(service, client, {"/embed", "/rerank", "/predict", "/v1/embeddings"}, "this sparse model")
        assert_invariants(service)


def refuses(service: Service, client: httpx.Client, paths: set[str], what: str) -> None:
    """Endpoints for other models answer 422, and say what the model is and which endpoints it has."""
    bodies = {"/rerank": {"query": "a", "texts": ["b"]}, "/similarity": {}, "/v1/embeddings": {"input": "a"}}
    for path in paths:
        reply = client.post(service.url + path, json=bodies.get(path, {"inputs": "a"}))
        assert reply.status_code == 422
        assert what in reply.text
        assert "/tokenize" in reply.text
