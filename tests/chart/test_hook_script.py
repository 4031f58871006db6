# SPDX-License-Identifier: Apache-2.0
"""The script of `helm test`: what it takes for wrong, what it waits for, and what it says."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from charts import CHART

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCRIPT = CHART / "files" / "embed.py"
SPEC = importlib.util.spec_from_file_location("helm_test_hook", SCRIPT)
assert SPEC
assert SPEC.loader
hook = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hook)

GOOD = [[1.0, 0.1], [1.0, 0.2], [0.1, 1.0]]
Answer = tuple[int, Any]


@contextlib.contextmanager
def server(*answers: Answer) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Serve answers in turn, the last one for ever; gives the URL, and the headers of the requests so far."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            assert (self.path, asked) == ("/v1/embeddings", {"input": list(hook.TEXTS)})
            status, body = answers[min(len(seen), len(answers) - 1)]
            seen.append({name.lower(): value for name, value in self.headers.items()})
            text = body if isinstance(body, str) else json.dumps(body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}", seen
        finally:
            found.shutdown()
            thread.join()


def rows(vectors: list[list[float]]) -> Answer:
    return 200, {"data": [{"embedding": vector} for vector in vectors]}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses between tries take no time."""
    monkeypatch.setattr(hook.time, "sleep", lambda _: None)


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (GOOD, ""),
        (GOOD[:2], "3 texts gave 2 vectors"),
        ([*GOOD, [1.0, 1.0]], "3 texts gave 4 vectors"),
        ([[1.0], [1.0, 0.2], [0.1, 1.0]], "dimensions"),
        ([], "3 texts gave 0 vectors"),
        ([[math.nan, 0.1], *GOOD[1:]], "not finite, or zero"),
        ([[math.inf, 0.1], *GOOD[1:]], "not finite, or zero"),
        ([[0.0, 0.0], *GOOD[1:]], "not finite, or zero"),
        ([GOOD[0], GOOD[2], GOOD[1]], "is no closer to"),
        ([GOOD[0]] * 3, "is no closer to"),
    ],
)
def test_wrong_vectors_are_found(vectors: list[list[float]], said: str) -> None:
    """Vectors that are too few, not finite, zero, or without sense are wrong; others are not."""
    assert said in hook.check(vectors)
    assert bool(hook.check(vectors)) is bool(said)


def test_good_vectors_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with 0, and says what it saw."""
    with server(rows(GOOD)) as (url, seen):
        assert hook.main(url, "5") == 0
    assert capsys.readouterr().out == "3 vectors of 2 dimensions, as they should be\n"
    assert "authorization" not in seen[0]


def test_wrong_vectors_fail_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Vectors do not get better by waiting."""
    with server(rows(GOOD[:2])) as (url, seen):
        assert hook.main(url, "60") == 1
    assert len(seen) == 1
    assert "3 texts gave 2 vectors" in capsys.readouterr().out


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_waited_for(status: int) -> None:
    """A pod that boots or is full answers later."""
    with server((status, "later"), (status, "later"), rows(GOOD)) as (url, seen):
        assert hook.main(url, "60") == 0
    assert len(seen) == 3


def test_a_service_that_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is tried again."""
    refused = [ConnectionRefusedError(), ConnectionRefusedError()]

    def embed(*_: str) -> list[list[float]]:
        if refused:
            raise refused.pop()
        return GOOD

    monkeypatch.setattr(hook, "embed", embed)
    assert hook.main("http://nowhere", "60") == 0
    assert refused == []


def test_waiting_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """After the time is up it fails with the last reason."""
    with server((503, "no worker is ready")) as (url, seen):
        assert hook.main(url, "0.05") == 1
    assert len(seen) >= 1
    assert capsys.readouterr().out == f"no embedding from {url} within 0.05 s: 503 no worker is ready\n"


@pytest.mark.parametrize("status", [401, 404, 413, 500])
def test_a_refusal_fails_at_once_with_its_reason(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong key or a failing model is told as the server tells it, not waited for."""
    with server((status, {"error": {"message": "no such key"}})) as (url, seen):
        assert hook.main(url, "60") == 1
    assert len(seen) == 1
    assert re.fullmatch(rf"{url} answers {status} .*no such key.*\n", capsys.readouterr().out)


@pytest.mark.parametrize("body", ["<html>", {"data": None}, {"vectors": []}, []])
def test_an_answer_without_embeddings_fails_at_once(body: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever else listens there is told from the service."""
    with server((200, body)) as (url, seen):
        assert hook.main(url, "60") == 1
    assert len(seen) == 1
    assert f"{url} answers with no embeddings" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["# ours\n\n  first # of the web\nsecond\n", "first", "first\r\n"])
def test_the_first_key_of_the_file_is_used(text: str, tmp_path: Path) -> None:
    """Comments and empty lines are skipped, as the service skips them."""
    keys = tmp_path / "keys"
    keys.write_text(text, encoding="utf-8")
    with server(rows(GOOD)) as (url, seen):
        assert hook.main(url, "5", str(keys)) == 0
    assert seen[0]["authorization"] == "Bearer first"


def test_it_needs_the_standard_library_alone() -> None:
    """The script runs in the image by `python -c`, without a package of ours or others."""
    imported = re.findall(r"^(?:import|from) (\w+)", SCRIPT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(imported) <= sys.stdlib_module_names
