# SPDX-License-Identifier: Apache-2.0
"""The wire format: what is taken, what is refused and in which words, and what is answered."""

from __future__ import annotations

import json
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequestError
from service.schemas import (
    BareBody,
    Body,
    DecodeBody,
    EmbedBody,
    OpenAIBody,
    PredictBody,
    RerankBody,
    SimilarityBody,
    TokenizeBody,
    check,
    parse,
    read_json,
)


def embed(body: bytes) -> EmbedBody:
    """Read what `/embed` takes."""
    data = read_json(body)
    return check(BareBody, {"inputs": data}) if isinstance(data, list) else check(EmbedBody, data)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'["a", "b"]', BareBody(inputs=["a", "b"])),
        (b' \r\n\t["a"]\n', BareBody(inputs=["a"])),
        (b'[[1, 2], "a"]', BareBody(inputs=[[1, 2], "a"])),
        (b'{"inputs": ["a", "b"]}', EmbedBody(inputs=["a", "b"])),
        (b'{"inputs": "a"}', EmbedBody(inputs=["a"])),
        (b'{"inputs": [1, 2]}', EmbedBody(inputs=[[1, 2]])),
        (b'{"inputs": [[1, 2], [3]]}', EmbedBody(inputs=[[1, 2], [3]])),
        (b'{"inputs": "a", "truncate": false}', EmbedBody(inputs=["a"], truncate=False)),
        (b'{"inputs": "a", "truncate": null}', EmbedBody(inputs=["a"])),
        (b'{"inputs": "a", "normalize": false}', EmbedBody(inputs=["a"], normalize=False)),
        (
            b'{"inputs": "a", "truncation_direction": "Left"}',
            EmbedBody(inputs=["a"], truncation_direction="left"),
        ),
        (
            b'{"inputs": "a", "prompt_name": "q", "dimensions": 8}',
            EmbedBody(inputs=["a"], prompt_name="q", dimensions=8),
        ),
        (b'{"inputs": "a", "inputs": "b"}', EmbedBody(inputs=["b"])),
        ('["ünï", "日本", "😀"]'.encode(), BareBody(inputs=["ünï", "日本", "😀"])),
        (rb'["\ud83d\ude00", "nul \u0000", " "]', BareBody(inputs=["😀", "nul \0", " "])),
    ],
    ids=str,
)
def test_a_request_is_read(body: bytes, expected: EmbedBody) -> None:
    """A bare array and `{"inputs": …}` are taken: texts or token ids, one or many, with TEI's options."""
    read = embed(body)
    assert (type(read), read) == (type(expected), expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "inputs: no texts; give at least one"),
        (b'{"inputs": []}', "inputs: no texts; give at least one"),
        (b'{"inputs": ""}', "inputs.0: the text is empty"),
        (b'["a", ""]', "inputs.1: the text is empty"),
        (b'["a", "b", 3]', "inputs.2: this should be a text"),
        (b'{"inputs": ["a", null]}', "inputs.1: this should be a text"),
        (b'{"inputs": [["a", "b"]]}', "inputs.0: this should be a list of token ids, which are integers"),
        (b'{"inputs": [1, true]}', "inputs: this should be a list of token ids, which are integers"),
        (b'{"inputs": [[1], []]}', "inputs.1: no token ids; give at least one"),
        (
            b'{"inputs": [1, 99999999999999999999]}',
            "inputs: this should be a list of token ids, which are integers",
        ),
        (b'{"inputs": 3}', "inputs: this should be a list of texts"),
        (b'{"inputs": {"a": 1}}', "inputs: this should be a list of texts"),
        (b'{"inputs": null}', "inputs: this should be a list of texts"),
        (b"{}", "inputs: Field required"),
        (b"null", "this should be a JSON object"),
        (b'"a"', "this should be a JSON object"),
        (b"3", "this should be a JSON object"),
        (b'{"inputs": "a", "truncate": "yes"}', "truncate: Input should be a valid boolean"),
        (b'{"inputs": "a", "truncate": 1}', "truncate: Input should be a valid boolean"),
        (
            b'{"inputs": "a", "truncation_direction": "up"}',
            "truncation_direction: Input should be 'left' or 'right'",
        ),
        (b'{"inputs": "a", "dimensions": 0}', "dimensions: Input should be greater than or equal to 1"),
        (b'{"inputs": "a", "dimensions": 2.0}', "dimensions: Input should be a valid integer"),
        (rb'["a", "\ud800"]', "inputs.1: the text is not valid Unicode"),
        (b'["a", "\xff"]', "inputs.1: the text is not valid Unicode"),
        (b'{"inputs": "\xed\xa0\x80"}', "inputs.0: the text is not valid Unicode"),
        (rb'{"inputs": [["a"], ["b", "\ud800"]]}', "inputs.1.1: the text is not valid Unicode"),
        (rb'{"query": "\ud800", "texts": ["a"]}', "query: the text is not valid Unicode"),
        (rb'{"query": "a", "texts": ["b", "\ud800"]}', "texts.1: the text is not valid Unicode"),
        (
            rb'{"inputs": {"source_sentence": "\ud800", "sentences": ["a"]}}',
            "source_sentence: the text is not valid Unicode",
        ),
        (
            rb'{"inputs": {"source_sentence": "a", "sentences": ["b", "\udfff"]}}',
            "sentences.1: the text is not valid Unicode",
        ),
    ],
    ids=str,
)
def test_a_wrong_request_is_told_where_and_why(body: bytes, message: str) -> None:
    """The error names the field, and of many texts the index of the wrong one."""
    with pytest.raises(InvalidRequestError) as caught:
        embed(body)
    assert str(caught.value) == message


def test_clients_of_tei_may_send_more_than_is_known() -> None:
    """What TEI ignores is ignored, however much it is; what is missing is still told."""
    assert embed(b'{"inputs": "a", "stream": true, "x": {"y": [1]}}') == EmbedBody(inputs=["a"])
    nested = {"inputs": {"source_sentence": "a", "sentences": ["b"], "x": 1}, "parameters": {"x": 1}, "x": 1}
    assert check(SimilarityBody, nested).sent == ["a", "b"]
    with pytest.raises(InvalidRequestError, match=r"\Ainputs: Field required\Z"):
        embed(b'{"texts": ["a"]}')
    began = time.monotonic()
    many = b'{"inputs": "a"' + b"".join(b', "f%d": 1' % n for n in range(150_000)) + b"}"
    assert embed(many) == EmbedBody(inputs=["a"])
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize(
    ("kind", "body", "permits"),
    [
        (EmbedBody, {"inputs": ["a", [5, 6]]}, 2),
        (EmbedBody, {"inputs": [5, 6]}, 1),
        (SimilarityBody, {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}}, 3),
        (RerankBody, {"query": "a", "texts": ["b", "c"]}, 2),
        (PredictBody, {"inputs": ["a", "b"]}, 1),
        (TokenizeBody, {"inputs": ["a", "b"]}, 2),
        (DecodeBody, {"ids": [[5, 6], [7], [8]]}, 3),
        (OpenAIBody, {"input": ["a", "b"]}, 2),
    ],
)
def test_a_body_counts_as_what_is_computed(kind: type[Body], body: object, permits: int) -> None:
    """A permit for each input of the model or the tokeniser; a pair is one."""
    assert check(kind, body).permits == permits


def test_openai_clients_may_send_more_than_is_known() -> None:
    """What OpenAI's contract gains is ignored; what is known is checked."""
    body = b'{"input": "a", "model": "m", "user": "u", "stream": true, "x": {"y": [1]}}'
    assert parse(OpenAIBody, body) == OpenAIBody(input=["a"], model="m", user="u")
    with pytest.raises(InvalidRequestError, match="encoding_format: Input should be 'float' or 'base64'"):
        parse(OpenAIBody, b'{"input": "a", "encoding_format": "hex"}')
    with pytest.raises(InvalidRequestError, match=r"\Ainput\.1: the text is empty\Z"):
        parse(OpenAIBody, b'{"input": ["a", ""]}')


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (["a", "b"], [("a", "b")]),
        ([["a"], ["b", "c"]], ["a", ("b", "c")]),
    ],
)
def test_a_list_of_two_texts_is_a_pair(inputs: object, expected: object) -> None:
    """TEI's reading of `/predict`: a flat list is one input, a list of lists is many."""
    assert check(PredictBody, {"inputs": inputs}).inputs == expected


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (PredictBody, {"inputs": ["a", "b", "c"]}, "inputs: 3 texts; give one, or a pair"),
        (PredictBody, {"inputs": [["a"], "b"]}, "inputs.1: this should be a list of texts"),
        (PredictBody, {"inputs": [["a", ""]]}, "inputs.0.1: the text is empty"),
        (RerankBody, {"query": "", "texts": ["a"]}, "query: the text is empty"),
        (RerankBody, {"query": "a", "texts": []}, "texts: no texts; give at least one"),
        (RerankBody, {"query": "a", "texts": "b"}, "texts: this should be a list of texts"),
        (SimilarityBody, {"inputs": {"source_sentence": "a"}}, "inputs.sentences: Field required"),
        (SimilarityBody, {"inputs": ["a"]}, "inputs: this should be a JSON object"),
        (DecodeBody, {"ids": ["a"]}, "ids.0: this should be a list of token ids"),
        (DecodeBody, {"ids": []}, "ids: no token ids; give at least one"),
    ],
)
def test_the_other_bodies_are_told_where_and_why(kind: type[Body], body: object, message: str) -> None:
    """Every endpoint's errors name field and index."""
    with pytest.raises(InvalidRequestError) as caught:
        check(kind, body)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "body",
    [
        b'["a",' + b"1," * 500_000 + b"1]",
        b'{"inputs": ["a",' + b"1," * 500_000 + b"1]}",
        b'{"inputs": [' + b"[" * 100_000,
        b"[" * 1_000_000,
        b'{"inputs": ' * 100_000,
        b'["' + b"\xff" * 1_000_000 + b'"]',
    ],
    ids=["wrong texts", "wrong texts in an object", "nested", "deep", "deeper", "bytes"],
)
def test_a_body_that_is_wrong_many_times_makes_one_error(body: bytes) -> None:
    """The first mistake is told and the rest is not looked at: a list of all errors would take seconds."""
    began = time.monotonic()
    with pytest.raises(InvalidRequestError) as caught:
        embed(body)
    assert time.monotonic() - began < 0.5
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"[",
        b'["a"',
        b'["a",]',
        b'["a"] ["b"]',
        b"{'inputs': 'a'}",
        b'{"inputs": "a"',
        b"inputs=a",
        b"<xml/>",
        b"[NaN]",
        b"[1e999]",
        b"\xff\xfe[\x00",
        b'{"\xff": 1}',
        rb'{"inputs": "a", "\ud800": 1}',
        b'\xef\xbb\xbf["a"]',
        '["a"]'.encode("utf-16"),
        b"\x0b[]",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_json_is_refused_and_crashes_nothing(body: bytes) -> None:
    """Broken JSON, other encodings and byte order marks are the client's error, in one line."""
    with pytest.raises(InvalidRequestError, match=r"\AInvalid JSON: [^\n]+\Z"):
        embed(body)


@given(st.binary(max_size=40) | st.text(alphabet='[]{}":,\\ud8a0 1inputs', max_size=40).map(str.encode))
def test_any_bytes_are_a_request_or_an_invalid_one(body: bytes) -> None:
    """Whatever arrives, there are two outcomes: inputs that are not empty, or InvalidRequestError."""
    try:
        inputs = embed(body).inputs
    except InvalidRequestError:
        return
    assert inputs
    assert all(inputs)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_texts_arrive_as_they_were_sent(texts: list[str]) -> None:
    """Both shapes give back the very texts, escaped or not."""
    for body in (json.dumps(texts).encode(), orjson.dumps(texts)):
        assert embed(body).inputs == texts
    assert embed(orjson.dumps({"inputs": texts})).inputs == texts
