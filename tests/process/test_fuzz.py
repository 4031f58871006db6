# SPDX-License-Identifier: Apache-2.0
"""Ten thousand malformed requests on raw connections: refused one by one, and the service does not move."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import pytest
from harness import DEADLINE_S, Service, assert_invariants
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(600)

EXAMPLES = 10_000
SEED = 20261121
MOST_BYTES = 100_000
"""Setting `max_body_bytes` of the service under test: bodies around it stay quick to send."""
MOST_TEXTS = 32
"""Setting `max_client_batch_size`."""
POLL_S = 0.1
UNSENT_S = 0.02
"""For a client that announced more than it sends: the server has begun to read before it leaves."""

ENDPOINTS: dict[str, dict[str, Any]] = {
    "/embed": {"inputs": ["a b", "c"], "truncate": True, "normalize": True, "dimensions": 8},
    "/embed_all": {"inputs": "a b", "truncation_direction": "left", "prompt_name": "query"},
    "/v1/embeddings": {"input": ["a"], "model": "m", "encoding_format": "base64", "dimensions": 4},
    "/embeddings": {"input": [[3, 4], [5]], "user": "u"},
    "/similarity": {
        "inputs": {"source_sentence": "a", "sentences": ["b", "c"]},
        "parameters": {"truncate": False, "prompt_name": None},
    },
    "/tokenize": {"inputs": ["a b"], "add_special_tokens": False, "prompt_name": "query"},
    "/decode": {"ids": [[1, 2], [3]], "skip_special_tokens": False},
    "/rerank": {"query": "a", "texts": ["b"], "raw_scores": True, "return_text": True},
    "/predict": {"inputs": [["a", "b"]], "raw_scores": True},
    "/embed_sparse": {"inputs": "a"},
    "/": {"inputs": "a"},
}
PATHS = (*ENDPOINTS, *ENDPOINTS, *list(ENDPOINTS)[:7], "/v1/models", "/health", "/nowhere", "/v1/nowhere")
"""Those that take no body, or are not there, do not read one; they are rare."""

# Bodies

TEXTS = st.one_of(st.text(max_size=8), st.text("a \ud800\udfff\0\ufeff\u202e😀é\u0301", max_size=8))
NUMBERS = st.sampled_from(
    [
        0,
        -1,
        1,
        2**31,
        2**63,
        2**64,
        -(2**63) - 1,
        10**40,
        1e308,
        5e-324,
        -0.0,
        1.0,
        1.5,
        math.nan,
        math.inf,
        -math.inf,
    ]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from([["a"] * count for count in (MOST_TEXTS, MOST_TEXTS + 1, 1000)]),
    st.sampled_from(
        [[1] * 5000, [[1]] * 33, [[]], [[[]]], [["a"]], [["a", "b", "c"]], {"a": {}}, "x" * 5000]
    ),
)
RAW = st.sampled_from(
    [
        b"",
        b" ",
        b"\0",
        b"null",
        b"{}",
        b"[]",
        b'""',
        b"{",
        b"[",
        b'"',
        b"'a'",
        b'["a",]',
        b"{}{}",
        b"//",
        b"\x80",
    ]
    + [
        b'{"inputs":1e400}',
        b'{"inputs":-1e-400}',
        b'["\\ud800"]',
        b'["\\udc00\\ud800"]',
        b'["\\u12"]',
        b'["\\x"]',
    ]
    + [
        b'["\xff\xfe"]',
        b'["\xc0\xaf"]',
        b'["\xed\xa0\x80"]',
        b'["\xf4\x90\x80\x80"]',
        b'["a\0b"]',
        b'["a\nb"]',
    ]
    + [
        b"\xef\xbb\xbf[]",
        b'\xef\xbb\xbf["a"]',
        '["a"]'.encode("utf-16"),
        '["a"]'.encode("utf-32"),
        b"\x1f\x8b\x08",
    ]
    + [b'{"inputs":"a","inputs":1}', b'{"__class__":"a"}', b'{"__proto__":{"inputs":"a"}}', b"inputs=a&b=c"]
    + [b"9" * count for count in (20, 400, 5000)]
    + [b'{"inputs":' + b"9" * 5000 + b"}", b"[" + b"1," * 9999 + b"1]", b'{"dimensions":1e5,"inputs":"a"}']
)


@st.composite
def deep(draw: st.DrawFn) -> bytes:
    """Brackets in brackets, closed or not."""
    depth = draw(st.sampled_from([10, 100, 254, 255, 256, 1023, 1024, 1025, 20_000]))
    opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"inputs":', b"}"), (b'[{"a":', b"}]")]))
    return (
        opening * depth
        + draw(st.sampled_from([b"", b"1"]))
        + closing * draw(st.sampled_from([depth, depth - 1, 0]))
    )


@st.composite
def large(draw: st.DrawFn) -> bytes:
    """One text, so long that the body has just about as many bytes as are taken."""
    size = MOST_BYTES + draw(st.integers(-3, 3))
    start, end = draw(st.sampled_from([(b'["', b'"]'), (b'{"inputs":"', b'"}'), (b'{"input":["', b'"]}')]))
    unit = draw(st.sampled_from([b"a", b"a ", b"\xc3\xa9", b"\\u00e9", b'","', b"\xff", b"\0"]))
    room = size - len(start) - len(end)
    return start + unit * (room // len(unit)) + b"a" * (room % len(unit)) + end


def written(data: Any, *, ascii_only: bool) -> bytes:
    """Write what is no JSON too: NaN, lone surrogates as escapes or as bytes."""
    return json.dumps(data, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


@st.composite
def spoilt(draw: st.DrawFn, path: str) -> bytes:
    """A good body for the endpoint with one thing wrong: a field, its name, or where it ends."""
    data: dict[str, Any] = json.loads(json.dumps(ENDPOINTS.get(path, {"inputs": "a"})))
    target = data
    if path == "/similarity" and draw(st.booleans()):
        target = data[draw(st.sampled_from(sorted(data)))]
    name = draw(st.sampled_from([*target, "unknown"]) if draw(st.integers(0, 9)) else TEXTS)
    if draw(st.integers(0, 4)):
        target[name] = draw(VALUES)
    else:
        target.pop(name, None)
    body = written(data, ascii_only=draw(st.booleans()))
    match draw(st.integers(0, 7)):
        case 0:
            return body[: draw(st.integers(0, len(body)))]
        case 1:
            return body + draw(st.sampled_from([b"\0", b"]", b" ", b"{}", b"\xef\xbb\xbf"]))
        case _:
            return body


def bodies(path: str) -> st.SearchStrategy[bytes]:
    """What may be sent to a path."""
    wild = st.builds(written, VALUES, ascii_only=st.booleans())
    rare = st.one_of(deep(), st.binary(max_size=40), RAW, large()) if path in ENDPOINTS else RAW
    return st.one_of(spoilt(path), spoilt(path), spoilt(path), wild, RAW, rare)


# Headers and framing

HEADERS = st.sampled_from(
    [
        ("Content-Type", value)
        for value in ("", "text/plain", "application/json; charset=utf-16", "\xff", "a" * 500)
    ]
    + [
        ("Accept", value)
        for value in ("application/octet-stream", "*/*;q=0", "", "\x80", "text/html", "," * 500)
    ]
    + [
        ("X-Request-Timeout", value)
        for value in ("nan", "inf", "-1", "0", "1e400", "30", "1_0", "", "\xb2", "9" * 400)
    ]
    + [
        ("X-Request-Id", value)
        for value in ("", "a b", "\xff", "x" * 129, "x" * 5000, "a\tb", "{}", "%0d%0a")
    ]
    + [
        ("Authorization", value)
        for value in ("", "Bearer", "Bearer \xff", "Basic YTpi", "Bearer " + "x" * 5000)
    ]
    + [("Content-Encoding", "gzip"), ("Expect", "100-continue"), ("Origin", "null"), ("Cookie", "=;" * 99)]
    + [("Upgrade", "websocket"), ("Upgrade", "h2c"), ("Host", ""), ("Range", "bytes=0-1"), ("X-\x7f", "a")]
    + [
        ("X-Forwarded-For", "\0"),
        ("Connection", "close"),
        ("Connection", "upgrade"),
        ("A" * 9000, "b" * 9000),
    ]
)
FRAMINGS = (*["exact"] * 24, *["chunked"] * 6)
BROKEN = (
    "short",
    "long",
    "none",
    "negative",
    "words",
    "twice",
    "both",
    "bad chunk",
    "endless chunk",
    "no end",
)


@dataclass(frozen=True)
class Case:
    """One request."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    framing: str
    body: bytes = field(repr=False)
    cuts: list[int] = field(default_factory=list)

    @property
    def bytes(self) -> bytes:
        """As it goes over the wire."""
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: test"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        body, size = self.body, len(self.body)
        match self.framing:
            case "exact":
                lines.append(f"Content-Length: {size}")
            case "short":
                lines.append(f"Content-Length: {size // 2}")
            case "long":
                lines.append(f"Content-Length: {size + 7}")
            case "negative":
                lines.append(f"Content-Length: -{size}")
            case "words":
                lines.append("Content-Length: many")
            case "twice":
                lines += [f"Content-Length: {size}", f"Content-Length: {size + 1}"]
            case "both":
                lines += [f"Content-Length: {size}", "Transfer-Encoding: chunked"]
            case "chunked" | "bad chunk" | "endless chunk" | "no end":
                lines.append("Transfer-Encoding: chunked")
                body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in self._parts())
                ends = {"bad chunk": b"zz\r\n", "endless chunk": b"fffffffffffffffff\r\na", "no end": b""}
                body += ends.get(self.framing, b"0\r\n\r\n")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body

    def _parts(self) -> Iterator[bytes]:
        start = 0
        for end in [*sorted(self.cuts), len(self.body)]:
            if start < end <= len(self.body):
                yield self.body[start:end]
                start = end


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a request that is wrong in one way or several."""
    path = draw(st.sampled_from(PATHS))
    body = draw(bodies(path))
    headers = draw(st.lists(HEADERS, max_size=2)) if draw(st.integers(0, 2)) == 0 else []
    framing = draw(st.sampled_from(BROKEN) if draw(st.integers(0, 24)) == 0 else st.sampled_from(FRAMINGS))
    method = (
        draw(st.sampled_from(["GET", "PUT", "OPTIONS", "DELETE"]))
        if draw(st.integers(0, 29)) == 0
        else "POST"
    )
    cuts = draw(st.lists(st.integers(1, 99), max_size=3)) if framing != "exact" else []
    return Case(method, path, headers, framing, body, cuts)


# Connections


class Closed(Exception):  # noqa: N818 - no fault of the server's
    """The server ended the connection."""


class Connection:
    """A connection that is kept as long as the server keeps it."""

    def __init__(self, service: Service) -> None:
        host, _, port = service.bind.rpartition(":")
        self._address, self._socket, self._rest = (host, int(port)), None, b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave, whatever is under way."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._rest = None, b""

    def send(self, data: bytes) -> None:
        """Send all of it; a server that has answered already may have stopped reading."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=DEADLINE_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def answer(self, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
        """Read one reply."""
        while True:
            head = self._until(b"\r\n\r\n")
            status_line, *lines = head.decode("latin-1").split("\r\n")
            status = int(status_line.split()[1])
            if status != 100:
                break
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = 0 if method == "HEAD" else int(headers.get("content-length", "0"))
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._until(b"\r\n"), 16):
                body += self._take(size + 2)[:-2]
            self._take(2)
        else:
            body = self._take(size)
        if headers.get("connection", "").lower() == "close":
            self.close()
        return status, headers, body

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._rest:
            self._receive()
        found, _, self._rest = self._rest.partition(mark)
        return found

    def _take(self, size: int) -> bytes:
        while len(self._rest) < size:
            self._receive()
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self.close()
            raise Closed
        self._rest += data


def check(case: Case, status: int, headers: dict[str, str], body: bytes) -> None:
    """A reply is below 500, and an error in the words of the API that was asked."""
    assert status < 500, body
    if status < 400 or headers.get("content-type") != "application/json":
        assert status < 300 or status == 400, (status, headers, body)  # 400: the HTTP parser's own
        return
    error = json.loads(body)
    assert len(body) < 2_000, "an error repeats what was sent"
    if case.path.startswith("/v1/") or case.path == "/embeddings":
        assert list(error) == ["error"]
        assert list(error["error"]) == ["message", "type", "param", "code"]
    else:
        assert list(error) == ["error", "error_type"]


@contextmanager
def watched(service: Service) -> Iterator[list[tuple[int, float]]]:
    """Ask /ready all the while: status and seconds of each answer."""
    seen: list[tuple[int, float]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(POLL_S):
            began = time.monotonic()
            status, _ = service.ready()
            seen.append((status, time.monotonic() - began))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_ten_thousand_malformed_requests_move_nothing() -> None:
    """10,000 malformed requests: no 5xx, no worker dies, /ready stays 200, a good one is served as before."""
    limits = {"max_body_bytes": MOST_BYTES, "max_client_batch_size": MOST_TEXTS, "keepalive": 20}
    with Service(workers=2, **limits) as service:
        service.wait_ready()
        before, pids = service.get("/info", ops=False).json(), service.pids()
        good = Case("POST", "/embed", [], "exact", b'["a good one"]')
        statuses: Counter[str] = Counter()
        with watched(service) as polls, Connection(service) as first, Connection(service) as second:
            first.send(good.bytes)
            expected = first.answer()[2]
            connections = [first, second]

            @seed(SEED)
            @settings(
                max_examples=EXAMPLES,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )
            @given(cases())
            def refuses(case: Case) -> None:
                connections.reverse()
                statuses[exchange(connections[0], case)] += 1

            refuses()
            assert sum(statuses.values()) >= EXAMPLES
            for connection in connections:
                connection.close()
                connection.send(good.bytes)
                status, _, body = connection.answer()
                assert (status, body) == (200, expected)
        print(
            f"{dict(statuses.most_common())}; {len(polls)} polls of /ready, "
            f"the slowest took {max(s for _, s in polls):.3f} s"
        )
        assert {status for status, _ in polls} == {200}
        assert service.pids() == pids
        assert service.get("/info", ops=False).json() == before
        assert " ERROR " not in service.log
        assert_invariants(service)


def exchange(connection: Connection, case: Case) -> str:
    """Send a request and check the reply; say what came."""
    wrong_length = case.framing in BROKEN
    if wrong_length:
        connection.close()
    try:
        connection.send(case.bytes)
        if case.framing in {"long", "no end", "endless chunk"}:  # more is announced than comes
            time.sleep(UNSENT_S)
            connection.close()
            return "left"
        status, headers, body = connection.answer(case.method)
    except Closed:
        assert wrong_length or any(name in {"Upgrade", "Connection"} for name, _ in case.headers), case
        return "closed"
    finally:
        if wrong_length or any(name in {"Upgrade", "Connection"} for name, _ in case.headers):
            connection.close()
    check(case, status, headers, body)
    return str(status)
