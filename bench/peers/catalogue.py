# SPDX-License-Identifier: Apache-2.0
"""The peers as a table: how each is started, asked and read, with one torch thread for each model process."""

from __future__ import annotations

import http.client
import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # so that `from peers.catalogue import PEERS` works in bench

import environments  # noqa: E402 - found by the line above
import harness  # noqa: E402
from harness import HOST, Reply, Server  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SERVERS = HERE / "servers"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A server that people run instead of warmfleet.

    Attributes:
        name: as the tables show it.
        environment: the name of its virtual environment, as in environments.py.
        workers: its processes with a model; what else it starts is told in README.md.
        command: of its environment's folder, the model's folder and a port.
        env: of the model's folder; comes on top of one torch thread and no network.
        path: where it embeds, by POST.
        body: the request for so many texts.
        vectors: the embeddings in a reply, in the order of the texts.
        ready: a path that answers 200 once the server calls itself up: not always once it can embed.
    """

    name: str
    environment: str
    workers: int
    command: Callable[[Path, str, int], list[str]]
    env: Callable[[str], dict[str, str]]
    path: str
    body: Callable[[Sequence[str]], bytes]
    vectors: Callable[[bytes], list[list[float]]]
    ready: str

    def server(self, folder: Path = environments.FOLDER) -> Server:
        """Return the server, not yet started, on a free port with the demo model."""
        model, (port,) = harness.model_folder(), harness.free_ports(1)
        env = ONE_THREAD | self.env(model)
        return Server(self.command(folder / self.environment, model, port), port=port, env=env)

    def embed(self, port: int, texts: Sequence[str], timeout_s: float = 30.0) -> Reply:
        """Ask for embeddings on a connection of its own."""
        began = time.perf_counter()
        connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
        try:
            return harness.exchange(connection, self.path, self.body(texts), began)
        finally:
            connection.close()

    def wait_embedding(self, server: Server) -> float:
        """Wait for the first good embedding; return the seconds since the start."""

        def look() -> bool:
            with suppress(OSError, http.client.HTTPException):
                reply = self.embed(server.port, ["hello"])
                assert reply.status not in (400, 422), reply
                return reply.status == 200 and len(self.vectors(reply.body)) == 1
            return False

        server.wait(look, "an embedding")
        return server.since_exec()


# ---------------------------------------------------------------------------------------------
# What they are asked, and how they answer


def bare(texts: Sequence[str]) -> bytes:
    """Return the texts as a JSON array."""
    return json.dumps(texts).encode()


def input_of(texts: Sequence[str]) -> bytes:
    """Return {"input": [...]}, as OpenAI's API has it."""
    return json.dumps({"input": texts}).encode()


def embeddings(reply: bytes) -> list[list[float]]:
    """Read {"embeddings": [[...], ...]}."""
    found: list[list[float]] = json.loads(reply)["embeddings"]
    return found


def openai(reply: bytes) -> list[list[float]]:
    """Read {"data": [{"index": 0, "embedding": [...]}, ...]}."""
    rows: list[dict[str, Any]] = json.loads(reply)["data"]
    return [row["embedding"] for row in sorted(rows, key=lambda row: row["index"])]


# ---------------------------------------------------------------------------------------------
# How they are started


def uvicorn(env: Path, _model: str, port: int) -> list[str]:
    """Return the tutorial server as one uvicorn process."""
    command = [str(env / "bin/python"), "-m", "uvicorn", "tutorial:app", "--app-dir", str(harness.BENCH)]
    return [*command, "--host", HOST, "--port", str(port), "--no-access-log"]


def gunicorn(env: Path, _model: str, port: int) -> list[str]:
    """Return the tutorial server below Gunicorn with two workers, each with a model of its own."""
    command = [str(env / "bin/python"), "-m", "gunicorn", "tutorial:app", "--chdir", str(harness.BENCH)]
    command += ["-k", "uvicorn_worker.UvicornWorker", "-w", "2", "--no-control-socket"]
    return [*command, "-b", f"{HOST}:{port}"]


def tutorial_env(model: str) -> dict[str, str]:
    return {"TUTORIAL_MODEL": model}


def infinity(env: Path, model: str, port: int) -> list[str]:
    """Return infinity with its defaults, but for torch.compile, which is for GPUs."""
    command = [str(env / "bin/infinity_emb"), "v2", "--model-id", model, "--engine", "torch"]
    command += ["--device", "cpu", "--batch-size", "32", "--no-compile"]
    return [*command, "--host", HOST, "--port", str(port)]


def infinity_env(_model: str) -> dict[str, str]:
    return {"DO_NOT_TRACK": "1"}


def litserve(workers: int) -> Callable[[Path, str, int], list[str]]:
    """Return the command of LitServe with so many workers."""
    script = str(SERVERS / "litserve_server.py")
    return lambda env, model, port: [str(env / "bin/python"), script, model, str(port), str(workers)]


def mosec(env: Path, _model: str, port: int) -> list[str]:
    """Return mosec; without `--timeout` a request ends with 408 after 3 s."""
    command = [str(env / "bin/python"), str(SERVERS / "mosec_server.py"), "--address", HOST]
    return [*command, "--port", str(port), "--timeout", "120000"]


def mosec_env(workers: int) -> Callable[[str], dict[str, str]]:
    return lambda model: {"PEER_MODEL": model, "PEER_WORKERS": str(workers)}


def nothing(_model: str) -> dict[str, str]:
    return {}


PEERS = (
    Peer(
        name="tutorial-1",
        environment="tutorial",
        workers=1,
        command=uvicorn,
        env=tutorial_env,
        path="/embed",
        body=bare,
        vectors=embeddings,
        ready="/health",
    ),
    Peer(
        name="tutorial-gunicorn-2w",
        environment="tutorial",
        workers=2,
        command=gunicorn,
        env=tutorial_env,
        path="/embed",
        body=bare,
        vectors=embeddings,
        ready="/health",
    ),
    Peer(
        name="infinity-torch",
        environment="infinity",
        workers=1,
        command=infinity,
        env=infinity_env,
        path="/embeddings",
        body=input_of,
        vectors=openai,
        ready="/health",
    ),
    *(
        Peer(
            name=f"litserve-{workers}w",
            environment="litserve",
            workers=workers,
            command=litserve(workers),
            env=nothing,
            path="/predict",
            body=input_of,
            vectors=embeddings,
            ready="/health",
        )
        for workers in (1, 2)
    ),
    *(
        Peer(
            name=f"mosec-{workers}w",
            environment="mosec",
            workers=workers,
            command=mosec,
            env=mosec_env(workers),
            path="/inference",
            body=input_of,
            vectors=embeddings,
            ready="/",
        )
        for workers in (1, 2)
    ),
)
BY_NAME = {peer.name: peer for peer in PEERS}
