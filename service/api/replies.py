# SPDX-License-Identifier: Apache-2.0
"""Rows to bytes and headers: no number becomes a Python object on its way out. Worker.

numpy is imported where it is used: it starts threads, and the arbiter imports this module.
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from service.api.dialects import JSON

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from service.api.dialects import Headers
    from service.backends.base import Token
    from service.engine import Result

    Rows = Sequence[NDArray[np.float32]]

INLINE_FLOATS = 50_000
"""Written on the event loop: a millisecond of JSON, a quarter of that as base64. More goes to a thread."""
TOKEN_KEYS = ("id", "text", "special", "start", "stop")
TOKENS_AT_ONCE = 1_000
OCTETS = (b"content-type", b"application/octet-stream")


@dataclass(frozen=True)
class Encoded:
    """The body of a reply, and the headers that describe it."""

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = (JSON,)


def encode_json(value: Any) -> Encoded:  # noqa: ANN401 - JSON
    """Write a reply as JSON; numpy arrays and scalars in it are written directly."""
    return Encoded(_encode(value))


def encode_rows(rows: Rows | NDArray[np.float32]) -> bytes:
    """Write a JSON list of rows.

    orjson keeps the GIL for a call: row by row, a thread lets the event loop in between.
    """
    if sum(row.size for row in rows) <= INLINE_FLOATS:
        return _encode(rows)
    return join_json([encode_rows(row) if row.ndim > 1 else _encode(row) for row in rows])


def join_json(values: Sequence[bytes]) -> bytes:
    """Write a JSON list of what is JSON already; it is copied once, as it may have 100 MB."""
    parts = [part for value in values for part in (b",", value)]
    return b"".join([b"[", *parts[1:], b"]"])


def write_tokens(tokens: Sequence[Token]) -> bytes:
    """Write the tokens of a text as JSON; some at a time, as a megabyte of text has half a million."""
    lists = [
        orjson.dumps(
            [dict(zip(TOKEN_KEYS, token, strict=True)) for token in tokens[start : start + TOKENS_AT_ONCE]]
        )
        for start in range(0, len(tokens), TOKENS_AT_ONCE)
    ]
    return join_json([some[1:-1] for some in lists])


def _encode(value: Any) -> bytes:  # noqa: ANN401 - JSON
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_octets(rows: Rows) -> Encoded:
    """Write little-endian float32 and nothing else; the shape is in the headers."""
    body = b"".join(row.astype("<f4", copy=False).tobytes() for row in rows)
    shape = b"%d,%d" % (len(rows), rows[0].size)
    return Encoded(body, (OCTETS, (b"x-shape", shape), (b"x-dtype", b"float32")))


def json_row(row: NDArray[np.float32]) -> orjson.Fragment:
    """Write a row, to be put into a reply as it is."""
    return orjson.Fragment(_encode(row))


def base64_row(row: NDArray[np.float32]) -> str:
    """Write a row as OpenAI does: base64 of little-endian float32."""
    return b64encode(row.astype("<f4", copy=False).tobytes()).decode("ascii")


def unit_rows(rows: Rows, dimensions: int | None = None) -> Rows:
    """Return the rows with unit length, of their first `dimensions` numbers only; a zero row stays zero."""
    import numpy as np

    matrix = np.stack(rows)[:, :dimensions]
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return list(matrix / np.where(norms == 0, np.float32(1), norms))


async def off_loop_if_large(floats: int, encode: Callable[[], Encoded]) -> Encoded:
    """Encode here, or in a thread where it would hold up other requests."""
    if floats <= INLINE_FLOATS:
        return encode()
    return await asyncio.to_thread(encode)


class Spent(NamedTuple):
    """What text-embeddings-inference tells of a request in headers."""

    compute_type: bytes
    characters: int
    began: float

    def headers(self, result: Result) -> Headers:
        """Return the headers: whole milliseconds, as TEI has them; `Server-Timing` has their fractions."""
        total = int((time.perf_counter() - self.began) * 1e3)
        times = result.times
        return [
            (b"x-compute-type", self.compute_type),
            (b"x-compute-time", b"%d" % total),
            (b"x-compute-characters", b"%d" % self.characters),
            (b"x-compute-tokens", b"%d" % sum(result.tokens)),
            (b"x-total-time", b"%d" % total),
            (b"x-tokenization-time", b"%d" % (times.tokenize * 1e3)),
            (b"x-queue-time", b"%d" % (times.queue * 1e3)),
            (b"x-inference-time", b"%d" % (times.forward * 1e3)),
            (b"server-timing", times.server_timing().encode()),
        ]
