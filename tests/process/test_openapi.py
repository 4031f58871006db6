# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document against a real Gunicorn: schemathesis believes every word of it, and tries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import pytest
from harness import Service, assert_invariants, new_client, until
from test_model import OFFLINE, PATIENCE_S, REAL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Tiny

pytestmark = pytest.mark.timeout(300)

KEY = "the-key"
NAME = "a model/with: odd name"
EXAMPLES = 60
SEED = 20261121

# Valid by the schema is not valid by the model (prompts, dimensions, vocabulary): that is not checked.
# A header that nobody asked for violates no HTTP API, but the coverage phase thinks so.
CONFIG = f"""
seed = {SEED}
continue-on-failure = true

[parameters]
"header.X-Request-Timeout" = "30"
"path.model" = "{NAME}"

[checks]
positive_data_acceptance.enabled = false

[phases.coverage.checks]
negative_data_rejection.enabled = false
"""

# Texts that a pass fails on, or has no room for.
FAULTS = """
[[fault]]
stage = "forward"
kind = "error"
text = "failing"

[[fault]]
stage = "forward"
kind = "oom"
text = "outgrowing"
"""


def schemathesis(service: Service, folder: Path, *options: str) -> dict[str, int]:
    """Run it on a service; return how many cases there were of each kind."""
    (folder / "schemathesis.toml").write_text(CONFIG, encoding="utf-8")
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    assert program, "schemathesis is not installed"
    command = [program, "--config-file", "schemathesis.toml", "run", f"{service.url}/openapi.json"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES)]
    command += ["--header", f"Authorization: Bearer {KEY}", "--generation-database", "none", "--no-color"]
    run = subprocess.run(
        [*command, *options], cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    counts = re.search(r"^Test cases:\n\s+(\d+) generated, (\d+) passed", run.stdout, re.MULTILINE)
    assert counts, run.stdout
    tested = re.search(r"^\s+Tested: (\d+)$", run.stdout, re.MULTILINE)
    assert tested, run.stdout
    return {"generated": int(counts[1]), "passed": int(counts[2]), "operations": int(tested[1])}


def test_every_operation_does_what_the_document_says(tmp_path: Path) -> None:
    """All 16 operations of an embedding model with a key: no 5xx, only documented statuses, types and shapes.

    What violates the schema is refused, another method answers 405, and without the key nothing is told.
    """
    chosen = {"api_key": KEY, "served_model_name": NAME, "check_model": False}
    with Service(workers=2, **chosen) as service:
        service.wait_ready()
        pids = service.pids()
        counts = schemathesis(service, tmp_path)
        print(counts)
        assert counts["operations"] == 16
        assert counts["passed"] == counts["generated"] > 16 * EXAMPLES / 2
        assert service.pids() == pids
        assert " ERROR " not in service.log
        assert_invariants(service)


# Small bodies, most of them wrong, for the field that has the texts and for the options.
FIELDS = ["a", "", ["a"], ["a", "b"], [], [""], [3], [3, "a"], [[3], [4, 5]], [[3], "a"], [[]], [["a"]]]
FIELDS += [None, True, 3, 1.5, {}, [None], [True], [-1], [1.5], [[[3]]]]
OPTIONS = {
    "truncate": [True, None, "yes", 1],
    "truncation_direction": ["left", "Right", "up", None, 1],
    "prompt_name": ["query", None, 1, ["query"]],
    "normalize": [True, None, "true"],
    "dimensions": [8, None, 0, -1, 1.5, "8", True],
    "encoding_format": ["float", "base64", None, "hex", 1],
    "model": ["any", None, 1],
    "user": ["me", None, 1],
    "add_special_tokens": [False, None, 1],
    "skip_special_tokens": [False, None, 1],
    "parameters": [None, {}, {"truncate": True}, {"truncate": 1}, {"unknown": 1}, []],
    "unknown": [1],
}
GOOD = {
    "/embed": {"inputs": "a"},
    "/embed_all": {"inputs": "a"},
    "/v1/embeddings": {"input": "a"},
    "/tokenize": {"inputs": "a"},
    "/decode": {"ids": [3]},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
}


def small_bodies(path: str) -> Iterator[Any]:
    """Yield bodies that the document and the service may see differently."""
    (field,) = good = GOOD[path]
    yield from FIELDS
    yield from ({field: value} for value in FIELDS)
    yield from (good | {name: value} for name, values in OPTIONS.items() for value in values)
    if path == "/similarity":
        yield from ({"inputs": good["inputs"] | {"source_sentence": value}} for value in FIELDS)
        yield from ({"inputs": good["inputs"] | {"sentences": value}} for value in FIELDS)
        yield from ({"inputs": good["inputs"] | {"unknown": 1}}, {"inputs": {"sentences": ["b"]}})


def test_document_and_service_agree_on_what_is_valid() -> None:
    """Of some 500 small bodies, those that the document allows are answered with 200, the others with 422."""
    with Service(workers=1) as service, new_client(keepalive=True) as client:
        service.wait_ready()
        page = service.get("/openapi.json", ops=False).json()
        differ, count = [], 0
        for path in GOOD:
            schema = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            allows = jsonschema_rs.validator_for(schema | {"components": page["components"]})
            for body in small_bodies(path):
                status = client.post(service.url + path, json=body).status_code
                count += 1
                if status != (200 if allows.is_valid(body) else 422):
                    differ.append((path, body, status))
        assert not differ
        assert count > 400
        assert_invariants(service)


def test_operations_of_a_cross_encoder_do_too(tiny: dict[str, Tiny], tmp_path: Path) -> None:
    """/rerank, /predict and the bare address of a reranker, likewise."""
    chosen = REAL | {"model_id": tiny["reranker"].folder, "workers": 1, "api_key": KEY}
    with Service(environ=OFFLINE, **chosen) as service:
        service.wait_ready(PATIENCE_S)
        counts = schemathesis(service, tmp_path, "--include-path-regex", "^/(rerank|predict)?$")
        print(counts)
        assert counts["operations"] == 3
        assert counts["passed"] == counts["generated"] > EXAMPLES
        assert " ERROR " not in service.log
        assert_invariants(service)


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
def test_each_documented_status_is_met(path: str, tmp_path: Path) -> None:
    """Each status that the document lists for an endpoint occurs, with the body and headers it describes."""
    scenario = tmp_path / "faults.toml"
    scenario.write_text(FAULTS, encoding="utf-8")
    limits = {"max_concurrent_requests": 2, "max_client_batch_size": 2, "stub_forward_ms": 150}
    chosen = {"api_key": KEY, "check_model": True, "stub_scenario": scenario, "skip_warmup": True}
    field, keyed = "inputs" if path == "/embed" else "input", {"Authorization": f"Bearer {KEY}"}
    with Service(workers=1, **limits, **chosen) as service, new_client() as client:
        service.wait_ready()
        page = service.get("/openapi.json", ops=False).json()
        described = page["paths"][path]["post"]["responses"]

        def status(body: Any, headers: dict[str, str] = keyed) -> int:
            reply = client.post(service.url + path, json=body, headers=headers)
            conforms(page, described, reply)
            return reply.status_code

        met = {
            status({field: ["a", "b"]}),
            status({field: "a"}, {}),
            status({field: ["a"] * 3}),
            status({field: ""}),
            status({field: "failing"}),
            status({field: "outgrowing"}),
            status({field: "a"}, keyed | {"X-Request-Timeout": "0.01"}),
        }
        if path == "/v1/embeddings":
            met.add(status({field: "a", "model": "another"}))
        until(lambda: service.worker(0)["load"] == 0, what="nothing is in work")
        filling = threading.Thread(target=status, args=[{field: ["a", "b"]}])
        filling.start()
        until(lambda: service.worker(0)["load"] > 0, what="the worker is full")
        met.add(status({field: "a"}))
        filling.join()
        assert met == {int(code) for code in described}
        assert service.log.count("Traceback") == 1, "more than the scripted error went wrong"
        assert len(service.pids()) == 1


def conforms(page: dict[str, Any], described: dict[str, Any], reply: Any) -> None:
    """A reply is what the document says of its status."""
    said = described[str(reply.status_code)]
    schema = said["content"][reply.headers["content-type"]]["schema"]
    jsonschema_rs.validator_for(schema | {"components": page["components"]}).validate(
        json.loads(reply.content)
    )
    for name in said["headers"]:
        if name not in {"x-shape", "x-dtype"}:  # of octets
            assert name in reply.headers, f"{reply.status_code} without {name}"
