# SPDX-License-Identifier: Apache-2.0
"""A container as careful people run it: started, looked at and ended by podman.

Example:
    with Container(engine, "localhost/warmfleet-test:cpu") as container:
        container.wait_ready()
        assert container.terminate()[0] == 0
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from images import Engine

PATIENCE_S = 60.0
POLL_S = 0.05
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # asks no proxy
VOLUMES = {"/cache", "/tmp"}  # noqa: S108 - of the container
HARDENED = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *("--memory=1g", "--pids-limit=64"),
)


def until(condition: Callable[[], Any], timeout: float = PATIENCE_S, what: str = "") -> Any:
    """Return the first true value of the condition."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout:g} s: {what or condition}"
        time.sleep(POLL_S)
    return value


def free_port() -> int:
    """Return a port below the range that outgoing connections take theirs from."""
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def loopback() -> dict[str, str]:
    """Return settings for two free ports, of the host: containers here share its network."""
    return {name: f"127.0.0.1:{free_port()}" for name in ("WARMFLEET_BIND", "WARMFLEET_OPS_BIND")}


def ask(bind: str, path: str, body: object = None) -> tuple[int, Any]:
    """Return status and JSON of a reply; status 0: nobody listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://{bind}{path}", data, headers={"Content-Type": "application/json"}
    )
    try:
        with OPENER.open(request, timeout=20) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null")
    except OSError:
        return 0, None


class Running:
    """A container that somebody started.

    Attributes:
        engine: whose it is.
        id: or its name.
        pid: of its first process, as the host counts.
        api: host and port.
        ops: likewise.
    """

    def __init__(self, engine: Engine, container: str, addresses: Mapping[str, str]) -> None:
        """Look at what runs."""
        self.engine, self.id = engine, container
        self.pid: int = engine.inspect(container, "container")["State"]["Pid"]
        self.api, self.ops = addresses.get("WARMFLEET_BIND", ""), addresses.get("WARMFLEET_OPS_BIND", "")

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it; show its log if the test failed."""
        if error is not None:
            print(self.log())
        self.remove()

    def remove(self) -> None:
        """End and remove it, with its volumes."""
        self.engine.podman("rm", "--force", "--time=0", "--volumes", self.id)

    def log(self) -> str:
        """Return all it has said."""
        done = self.engine.podman("logs", self.id)
        return done.stdout + done.stderr

    def execute(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return self.engine.podman("exec", self.id, *command, check=check)

    def wait_ready(self) -> None:
        """Wait until /ready says 200; a container that ended is not waited for."""
        until(lambda: ask(self.ops, "/ready")[0] == 200 or not self._runs(), what="/ready is 200")
        assert self._runs(), f"the container ended: {self.log()}"

    def embed(self, *texts: str) -> list[list[float]]:
        """Return the embeddings of texts."""
        status, reply = ask(self.api, "/v1/embeddings", {"model": "any", "input": texts})
        assert status == 200, reply
        return [row["embedding"] for row in reply["data"]]

    def manifests(self) -> list[str]:
        """Return the files of what boots measured."""
        return self.execute("find", "/cache", "-name", "*.json").stdout.split()

    def terminate(self) -> tuple[int, float]:
        """Send SIGTERM; return the exit code, and the seconds until then."""
        began = time.monotonic()
        self.engine.podman("kill", "--signal=TERM", self.id)
        return self.wait(), time.monotonic() - began

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        return int(self.engine.podman("wait", self.id).stdout)

    def _runs(self) -> bool:
        return Path(f"/proc/{self.pid}").is_dir()


class Container(Running):
    """One container, as careful people run it, on loopback ports; without a line in /etc/passwd."""

    def __init__(
        self,
        engine: Engine,
        image: str,
        *command: str,
        options: Iterable[str] = HARDENED,
        network: str = "host",
        **environ: str,
    ) -> None:
        """Start it."""
        settings = (loopback() if network == "host" else {}) | environ
        run = ["run", "--detach", f"--network={network}", "--no-healthcheck", *options]
        run.append("--passwd=false")  # nobody but podman would write that line for an unknown uid
        run += [f"--env={name}={value}" for name, value in settings.items()]
        super().__init__(engine, engine.podman(*run, image, *command).stdout.strip(), settings)


class Pod(Running):
    """The only container of a Deployment that podman plays; the Deployment listens on `addresses`."""

    def __init__(self, engine: Engine, manifest: Path, addresses: Mapping[str, str]) -> None:
        """Start it."""
        self._manifest = str(manifest)
        said = engine.podman("play", "kube", self._manifest).stdout.split()
        super().__init__(engine, said[said.index("Container:") + 1], addresses)

    def remove(self) -> None:
        """End and remove the pod."""
        self.engine.podman("play", "kube", "--down", self._manifest)
        self.engine.podman("volume", "prune", "--force")
