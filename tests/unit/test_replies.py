# SPDX-License-Identifier: Apache-2.0
"""Rows to bytes: every float is the same float, in each format."""

from __future__ import annotations

import asyncio
import base64
import json
import threading

import numpy as np
import pytest

from service.api.replies import (
    INLINE_FLOATS,
    TOKENS_AT_ONCE,
    Encoded,
    Spent,
    base64_row,
    encode_json,
    encode_octets,
    encode_rows,
    off_loop_if_large,
    unit_rows,
    write_tokens,
)
from service.backends.base import Token
from service.engine import Result, Times

ROWS = list(np.array([[0.5, -0.25], [1.0, 0.0], [3.5e-8, 2.0]], dtype=np.float32))


@pytest.mark.parametrize("count", [1, 3, INLINE_FLOATS])
def test_rows_are_a_json_list_of_lists(count: int) -> None:
    """However many there are, and however they are written: the same floats."""
    rows = [ROWS[number % 3] for number in range(count)]
    read = np.array(json.loads(encode_rows(rows)), dtype=np.float32)
    assert read.tobytes() == np.stack(rows).tobytes()


def test_token_vectors_are_a_list_deeper() -> None:
    """A text's vectors stay together, also where there are too many for one call."""
    rows = [np.full((tokens, 64), tokens, dtype=np.float32) for tokens in (1, 2, INLINE_FLOATS // 64)]
    read = json.loads(encode_rows(rows))
    assert [len(text) for text in read] == [1, 2, INLINE_FLOATS // 64]
    assert all(text == row.tolist() for text, row in zip(read, rows, strict=True))


def test_base64_is_little_endian_float32() -> None:
    """As OpenAI's client reads it."""
    assert np.frombuffer(base64.b64decode(base64_row(ROWS[2])), dtype="<f4").tobytes() == ROWS[2].tobytes()


def test_octets_are_the_floats_and_nothing_else() -> None:
    """The shape is in the headers."""
    encoded = encode_octets(ROWS)
    assert encoded.body == np.stack(ROWS).astype("<f4").tobytes()
    assert encoded.headers == (
        (b"content-type", b"application/octet-stream"),
        (b"x-shape", b"3,2"),
        (b"x-dtype", b"float32"),
    )


def test_numbers_of_numpy_are_json() -> None:
    """Scores are float32 until they are text: 0.1, not 0.10000000149011612."""
    assert encode_json({"score": np.float32(0.1)}) == Encoded(b'{"score":0.1}')


@pytest.mark.parametrize("count", [0, 1, TOKENS_AT_ONCE, TOKENS_AT_ONCE + 1])
def test_tokens_are_a_json_list_of_objects(count: int) -> None:
    """However many there are: each with its id, text and place."""
    tokens = [Token(number, "ü", False, number, number + 1) for number in range(count)]
    assert json.loads(write_tokens(tokens)) == [
        {"id": number, "text": "ü", "special": False, "start": number, "stop": number + 1}
        for number in range(count)
    ]


def test_rows_get_unit_length_after_the_cut() -> None:
    """Matryoshka: the first numbers, of unit length; what is zero stays zero and is never NaN."""
    rows = [np.array([3.0, 4.0, 12.0], dtype=np.float32), np.array([0.0, 0.0, 1.0], dtype=np.float32)]
    cut = unit_rows(rows, 2)
    assert [row.dtype for row in cut] == [np.float32] * 2
    np.testing.assert_allclose(cut, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(unit_rows(rows), axis=1), [1, 1], rtol=1e-6)


@pytest.mark.parametrize(("floats", "on_loop"), [(INLINE_FLOATS, True), (INLINE_FLOATS + 1, False)])
def test_only_large_replies_are_written_in_a_thread(floats: int, *, on_loop: bool) -> None:
    """A hop to a thread costs more than a small reply; a large one would hold up all others."""
    thread = []

    def encode() -> Encoded:
        thread.append(threading.current_thread() is threading.main_thread())
        return Encoded(b"x")

    assert asyncio.run(off_loop_if_large(floats, encode)) == Encoded(b"x")
    assert thread == [on_loop]


def test_times_are_told_in_whole_milliseconds() -> None:
    """TEI's headers, and `Server-Timing` with the fractions."""
    result = Result(ROWS, Times(0.0015, 0.25, 0.0309), [3, 4, 5])
    headers = dict(Spent(b"cpu", 17, began=0.0).headers(result))
    total = headers.pop(b"x-total-time")
    assert int(total) > 0
    assert headers == {
        b"x-compute-type": b"cpu",
        b"x-compute-time": total,
        b"x-compute-characters": b"17",
        b"x-compute-tokens": b"12",
        b"x-tokenization-time": b"1",
        b"x-queue-time": b"250",
        b"x-inference-time": b"30",
        b"server-timing": b"tokenize;dur=1.500, queue;dur=250.000, forward;dur=30.900",
    }
