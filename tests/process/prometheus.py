# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus on a free loopback port: it scrapes what a test tells it to, and answers queries."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from harness import free_port, new_client, until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

INTERVAL_S = 1.0
"""Between two scrapes, and between two evaluations of the rules."""
STEP_S = 0.5
"""Of a range query."""


@dataclass(frozen=True)
class Target:
    """What is scraped: an address, and the labels that its series get."""

    address: str
    labels: Mapping[str, str]


class Page:
    """A server of one page, for what is to be scraped and no service says. Use it in a `with`."""

    def __init__(self, body: bytes) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Prometheus:
    """`prometheus` with a folder of its own. Use it in a `with`.

    Args:
        program: its path.
        targets: scraped every second, as the job that their labels name.
        rules: files of rules to evaluate every second.
    """

    def __init__(self, program: str, targets: Sequence[Target], rules: Sequence[Path] = ()) -> None:
        self._program, self._targets, self._rules = program, targets, rules
        self._address = f"127.0.0.1:{free_port()}"

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="warmfleet-prometheus-")
        folder = Path(self._folder.name)
        (folder / "prometheus.json").write_text(json.dumps(self._config()), encoding="utf-8")  # YAML as well
        self._log = (folder / "log").open("w+", encoding="utf-8")
        self._popen = subprocess.Popen(
            [
                self._program,
                f"--config.file={folder}/prometheus.json",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={self._address}",
                "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._client = new_client(keepalive=True)
        try:
            until(self._is_ready, 20, "Prometheus is ready")
        except BaseException:
            self.__exit__(AssertionError)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._client.close()
        self._popen.terminate()
        self._popen.wait(20)
        if kind is not None:
            self._log.seek(0)
            print(f"--- log of Prometheus ---\n{self._log.read()}")
        self._log.close()
        self._folder.cleanup()

    def _config(self) -> dict[str, Any]:
        targets = [{"targets": [one.address], "labels": dict(one.labels)} for one in self._targets]
        every = f"{INTERVAL_S:g}s"
        return {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": [str(file) for file in self._rules],
            "scrape_configs": [{"job_name": "targets", "static_configs": targets}],
        }

    def _is_ready(self) -> bool:
        assert self._popen.poll() is None, "Prometheus has ended"
        return self._client.get(f"http://{self._address}/-/ready").status_code == 200

    def ask(self, path: str, **parameters: Any) -> Any:
        """Return the data of an answer of the API; a query that it refuses fails the test."""
        answer = self._client.get(f"http://{self._address}/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def series(self, query: str) -> list[dict[str, str]]:
        """Return the labels of each series that a query has a number for, now."""
        found = self.ask("query", query=query)["result"]
        return [one["metric"] for one in found if math.isfinite(float(one["value"][1]))]

    def value(self, query: str) -> float | None:
        """Return the number that a query of one series has now; None if it has none."""
        found = self.ask("query", query=query)["result"]
        assert len(found) <= 1, f"{query}: {found}"
        return float(found[0]["value"][1]) if found else None

    def range(self, query: str, start: float, end: float) -> list[dict[str, str]]:
        """Return the labels of each series that a query has a number for, within a range, at its end too."""
        start = end - math.ceil((end - start) / STEP_S) * STEP_S
        found = self.ask("query_range", query=query, start=start, end=end, step=STEP_S)["result"]
        return [one["metric"] for one in found if any(math.isfinite(float(v)) for _, v in one["values"])]
