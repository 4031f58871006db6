# SPDX-License-Identifier: Apache-2.0
"""The wire format: what is taken, what is refused and in which words, and what is answered."""

from __future__ import annotations

import json
import time

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequestError
from service.schemas import EmbedRequest

VECTORS = np.array([[0.5, -0.25], [1.0, 0.0], [3.5e-8, 2.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'["a", "b"]', EmbedRequest(["a", "b"], bare=True)),
        (b' \r\n\t["a"]\n', EmbedRequest(["a"], bare=True)),
        (b'{"inputs": ["a", "b"]}', EmbedRequest(["a", "b"], bare=False)),
        (b'{"inputs": "a"}', EmbedRequest(["a"], bare=False)),
        (b'{"inputs": "a", "truncate": true}', EmbedRequest(["a"], bare=False, truncate=True)),
        (b'{"inputs": "a", "truncate": false}', EmbedRequest(["a"], bare=False, truncate=False)),
        (b'{"inputs": "a", "truncate": null}', EmbedRequest(["a"], bare=False)),
        (b'{"inputs": "a", "normalize": true}', EmbedRequest(["a"], bare=False)),
        (b'{"inputs": "a", "truncation_direction": "Right"}', EmbedRequest(["a"], bare=False)),
        (b'{"inputs": "[not a list]"}', EmbedRequest(["[not a list]"], bare=False)),
        ('["ünï", "日本", "😀"]'.encode(), EmbedRequest(["ünï", "日本", "😀"], bare=True)),
        (rb'["\ud83d\ude00", "nul \u0000", " "]', EmbedRequest(["😀", "nul \0", " "], bare=True)),
    ],
    ids=str,
)
def test_a_request_is_read(body: bytes, expected: EmbedRequest) -> None:
    """A bare array and `{"inputs": …}` are taken, one text or many, with TEI's options."""
    assert EmbedRequest.parse(body) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "inputs: no texts; give at least one"),
        (b'{"inputs": []}', "inputs: no texts; give at least one"),
        (b'{"inputs": ""}', "inputs.0: the text is empty"),
        (b'["a", ""]', "inputs.1: the text is empty"),
        (b'["a", "b", 3]', "inputs.2: Input should be a valid string"),
        (b'{"inputs": ["a", null]}', "inputs.1: Input should be a valid string"),
        (b'{"inputs": [["a", "b"]]}', "inputs.0: Input should be a valid string"),
        (b'{"inputs": 3}', "inputs: Input should be a valid string"),
        (b'{"inputs": {"a": 1}}', "inputs: Input should be a valid string"),
        (b'{"inputs": null}', "inputs: Input should be a valid string"),
        (b"{}", "inputs: Field required"),
        (b'{"texts": ["a"]}', "inputs: Field required"),
        (b"null", "Input should be an object"),
        (b'"a"', "Input should be an object"),
        (b"3", "Input should be an object"),
        (b'{"inputs": "a", "prompt_name": "query"}', "prompt_name: Extra inputs are not permitted"),
        (b'{"inputs": "a", "str": 1}', "str: Extra inputs are not permitted"),
        (b'{"inputs": "a", "normalize": false}', "normalize: Input should be True"),
        (b'{"inputs": "a", "truncate": "yes"}', "truncate: Input should be a valid boolean"),
        (b'{"inputs": "a", "truncate": 1}', "truncate: Input should be a valid boolean"),
        (
            b'{"inputs": "a", "truncation_direction": "Left"}',
            "truncation_direction: Input should be 'right' or 'Right'",
        ),
    ],
    ids=str,
)
def test_a_wrong_request_is_told_where_and_why(body: bytes, message: str) -> None:
    """The error names the field, and of many texts the index of the wrong one."""
    with pytest.raises(InvalidRequestError) as caught:
        EmbedRequest.parse(body)
    assert str(caught.value) == message


@pytest.mark.parametrize("shape", ["[%s]", '{"inputs": [%s]}'], ids=["bare", "object"])
def test_a_million_wrong_texts_make_one_error(shape: str) -> None:
    """The first wrong text is told and the rest is not looked at: a list of all errors would take seconds."""
    body = (shape % ('"a",' + "1," * 999_000 + "1")).encode()
    began = time.monotonic()
    with pytest.raises(InvalidRequestError, match=r"\Ainputs\.1: Input should be a valid string\Z"):
        EmbedRequest.parse(body)
    assert time.monotonic() - began < 1


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
        b"\xff\xfe[\x00",
        b'["\xff"]',
        b'["\xed\xa0\x80"]',
        b'{"inputs": "\xc3"}',
        b'{"\xff": 1}',
        rb'["\ud800"]',
        rb'["\udc00 low"]',
        rb'{"inputs": "\ud800"}',
        rb'{"inputs": "a", "\ud800": 1}',
        b'\xef\xbb\xbf["a"]',
        '["a"]'.encode("utf-16"),
        b"[" * 100_000,
        b'{"inputs":' * 100_000,
        b"\x0b[]",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_json_is_refused_and_crashes_nothing(body: bytes) -> None:
    """Broken JSON, other encodings, invalid UTF-8 and lone surrogates are the client's error, in one line."""
    with pytest.raises(InvalidRequestError, match=r"\AInvalid JSON: [^\n]+\Z"):
        EmbedRequest.parse(body)


@given(st.binary(max_size=40) | st.text(alphabet='[]{}":,\\ud8a0 1inputs', max_size=40).map(str.encode))
def test_any_bytes_are_a_request_or_an_invalid_one(body: bytes) -> None:
    """Whatever arrives, there are two outcomes: texts that are not empty, or InvalidRequestError."""
    try:
        texts = EmbedRequest.parse(body).texts
    except InvalidRequestError:
        return
    assert texts
    assert all(isinstance(text, str) and text for text in texts)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_texts_arrive_as_they_were_sent(texts: list[str]) -> None:
    """Both shapes give back the very texts, escaped or not."""
    for body in (json.dumps(texts).encode(), orjson.dumps(texts)):
        assert EmbedRequest.parse(body) == EmbedRequest(texts, bare=True)
    assert EmbedRequest.parse(orjson.dumps({"inputs": texts})) == EmbedRequest(texts, bare=False)


@pytest.mark.parametrize(
    ("bare", "wrap"),
    [(True, lambda rows: {"embeddings": rows}), (False, lambda rows: rows)],
    ids=["bare", "object"],
)
def test_vectors_are_answered_in_the_shape_of_the_request(bare: bool, wrap: object) -> None:  # noqa: FBT001
    """A bare array gets `{"embeddings": …}`, the object a list of vectors; each float is the same float."""
    request = EmbedRequest(["a", "b", "c"], bare=bare)
    reply = json.loads(request.encode(VECTORS))
    rows = reply["embeddings"] if bare else reply
    assert reply == wrap(rows)  # type: ignore[operator]
    assert np.array(rows, dtype=np.float32).tobytes() == VECTORS.tobytes()


def test_one_text_is_answered_by_a_list_of_one_vector() -> None:
    """A single string is no special case: TEI too answers a list."""
    request = EmbedRequest.parse(b'{"inputs": "a"}')
    assert request.encode(VECTORS[:1]) == b"[[0.5,-0.25]]"
