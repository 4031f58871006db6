# SPDX-License-Identifier: Apache-2.0
"""What the access log and traces cost a request: the app in this process, on the stub, one request at a time.

No server and no client, so that microseconds can be seen. CPU seconds are the whole process's, the threads of
the model and of the exporter included; spans are encoded, and thrown away instead of posted.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import logging.config
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import harness
from harness import Record, median, spread, table

from service.otlp import Collector

if TYPE_CHECKING:
    from fastapi import FastAPI

BODY = b'["what does a request cost"]'
HEADERS = [
    (b"host", b"127.0.0.1:8000"),
    (b"user-agent", b"python-httpx/0.28.1"),
    (b"accept", b"*/*"),
    (b"content-type", b"application/json"),
    (b"content-length", b"%d" % len(BODY)),
]
SCOPE: dict[str, Any] = {
    "type": "http",
    "method": "POST",
    "scheme": "http",
    "path": "/embed",
    "raw_path": b"/embed",
    "query_string": b"",
    "client": ("127.0.0.1", 1),
    "headers": HEADERS,
    "state": {},
}
MODES: dict[str, dict[str, Any]] = {
    "off": {},
    "access log: errors": {"access_log": "errors"},
    "access log: all, text": {"access_log": "all"},
    "access log: all, json": {"access_log": "all", "log_format": "json"},
    "traces: ratio 0": {"otlp_sample": 0.0},
    "traces: ratio 0.1": {"otlp_sample": 0.1},
    "traces: ratio 1": {"otlp_sample": 1.0},
}


class Sink(Collector):
    """Takes whatever it is sent."""

    def send(self, body: bytes) -> None:
        """Take it."""


class Mode:
    """The app with one way to log and to trace."""

    def __init__(self, slot: int, settings: dict[str, Any]) -> None:
        """Start it."""
        from service.app import create_app
        from service.backends.stub import StubBackend
        from service.engine import Engine, Limits
        from service.fleet import Fleet
        from service.metrics import MetricsObserver, SpanCounts
        from service.settings import Settings
        from service.span_export import Spans

        values = Settings(backend="stub", **settings)
        fleet = Fleet.make(values, ("cpu",), 1)
        self.app: FastAPI = create_app(values)
        self.spans = None
        if "otlp_sample" in settings:
            sink = Sink("http://127.0.0.1", {})
            self.spans = Spans(sink, values.otlp_sample, slot, SpanCounts(slot))
            self.spans.start()
        self.app.reception.spans = self.spans
        observer = MetricsObserver(0, fleet.board, None, self.spans.passed if self.spans else None)
        self.engine = Engine(
            StubBackend(values), Limits(512, 64, 512, 32, True, 60.0, 60.0), observer=observer
        )
        self.engine.start(ThreadPoolExecutor(1))
        self.app.state.slot, self.app.state.engine, self.app.state.fleet = slot, self.engine, fleet
        self.format = values.log_format

    def settle(self) -> None:
        """Wait until all that was left behind is exported: it is paid for too."""
        assert self.spans
        while self.spans._waiting or self.spans._in_hand:  # noqa: SLF001 - the exporter tells nobody
            time.sleep(0.005)

    async def run(self, requests: int) -> float:
        """Answer so many requests; return the CPU seconds of one."""
        from service.logging import config

        settings = config(self.format, "info")
        logging.config.dictConfig(settings)
        began = time.process_time()
        for _ in range(requests):
            await asyncio.create_task(self.app(SCOPE, receiver(), send))  # type: ignore[arg-type]
        if self.spans:
            await asyncio.to_thread(self.settle)
        return (time.process_time() - began) / requests


def receiver() -> Any:  # noqa: ANN401 - ASGI's receive
    """Return a client that has sent its body, and waits."""
    unread = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return unread.pop() if unread else await asyncio.Future()

    return receive


async def send(_message: Any) -> None:  # noqa: ANN401 - ASGI's message
    """Take the reply."""


async def measure(record: Record, modes: dict[str, Mode], args: Any, random: Random) -> None:  # noqa: ANN401
    """Run all modes, in every round each once."""
    for mode in modes.values():
        await mode.run(args.requests // 4)
    for number in range(args.rounds):
        for name in random.sample(sorted(modes), len(modes)):
            record.add(round=number, mode=name, cpu_us=1e6 * await modes[name].run(args.requests))
        harness.progress(f"round {number + 1} of {args.rounds}")


def main() -> None:
    """Run."""
    parser = harness.parser(__doc__, rounds=9)
    parser.add_argument("--requests", type=int, default=2000, help="of a mode in a round (%(default)s)")
    args = parser.parse_args()
    record = Record("logging-cost", args)
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w", encoding="utf-8") as log:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        stderr, sys.stderr = sys.stderr, log  # a file; what a pipe costs is its reader's affair
        gc.set_threshold(10_000, 10, 10)  # as a worker has it
        try:
            modes = {n: Mode(slot, settings) for slot, (n, settings) in enumerate(MODES.items())}
            sys.stderr = log
            asyncio.run(measure(record, modes, args, Random(args.seed)))
        finally:
            sys.stderr = stderr
    base = {sample["round"]: sample["cpu_us"] for sample in record.of(mode="off")}
    rows, summary = [], {}
    for name in MODES:
        samples = record.of(mode=name)
        more = [sample["cpu_us"] - base[sample["round"]] for sample in samples]
        rows.append((name, spread((s["cpu_us"] for s in samples), 1), spread(more, 1)))
        summary[name] = {"cpu_us": median(s["cpu_us"] for s in samples), "more_us": median(more)}
    print("\nOne text a request, on the stub, one at a time; median (least-most), paired by round.\n")
    print(table(["", "CPU, us a request", "more than off, us"], rows))
    record.finish(summary)
    sys.stdout.flush()
    os._exit(0)  # the model threads of the modes wait for ever


if __name__ == "__main__":
    main()
