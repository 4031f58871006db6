# SPDX-License-Identifier: Apache-2.0
"""Traces of a real fleet, as a local collector gets them; and what a bad collector cannot do."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from collector import Collector
from harness import PATIENCE_S, Service, assert_invariants, free_port, new_client, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collector import Got

SPAN = "00f067aa0ba902b7"
TICK_S = 0.05
"""The clocks of spans and of this test are read one after the other."""
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("opentelemetry.proto"):
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Hidden())
"""
FLUSH_S = 1.0
"""What a stop may wait for a collector."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as found:
        yield found


def trace(number: int) -> str:
    """Return a trace id of the test's own."""
    return f"{number:032x}"


def parent(number: int, flags: str = "01") -> dict[str, str]:
    """Return the header of a client that has a span in that trace."""
    return {"traceparent": f"00-{trace(number)}-{SPAN}-{flags}"}


def post(service: Service, number: int, *texts: str, flags: str = "01") -> int:
    """Embed texts in a trace; return the status."""
    with new_client() as client:
        return client.post(f"{service.url}/embed", json=texts, headers=parent(number, flags)).status_code


def whole(collector: Collector, number: int, count: int) -> dict[str, Got]:
    """Wait for the spans of a trace, so many; return them by name."""
    until(lambda: len(collector.of(trace(number))) >= count, what=f"{count} spans of trace {number}")
    found = collector.of(trace(number))
    assert len(found) == len({one.name for one in found}) == count, found
    return {one.name: one for one in found}


def test_a_request_is_four_spans_and_a_pass_links_to_it(collector: Collector) -> None:
    """Right parents and true times, honouring `traceparent`; requests and passes are linked both ways."""
    service = Service(
        workers=1,
        stub_scenario="slow_forward",
        otlp_endpoint=collector.url,
        otlp_headers="authorization=Bearer%20hunter2,x-tenant=a",
        environ={"OTEL_SERVICE_NAME": "embeddings"},
    )
    with service:
        service.wait_ready()
        began = time.time()
        assert post(service, 1, "slow") == 200  # two seconds in the model
        ended = time.time()
        spans = whole(collector, 1, 4)
        server, tokenize, queue, forward = (
            spans[name] for name in ("POST /embed", "tokenize", "queue", "forward")
        )
        assert (server.parent, server.is_server, server.is_error) == (SPAN, True, False)
        assert {one.parent for one in (tokenize, queue, forward)} == {server.span}
        assert not any(one.is_server for one in (tokenize, queue, forward))
        assert server.attributes["http.route"] == "/embed"
        assert server.attributes["http.response.status_code"] == 200
        assert server.resource["service.name"] == "embeddings"
        edges = [
            began,
            server.began,
            tokenize.began,
            tokenize.ended,
            queue.ended,
            forward.ended,
            server.ended,
        ]
        edges.append(ended)
        assert all(one <= other + TICK_S for one, other in pairwise(edges)), edges
        assert (queue.began, forward.began) == (tokenize.ended, queue.ended)
        assert forward.ended - forward.began >= 1.9
        (there,) = forward.links
        until(lambda: there in [one.place for one in collector.spans], what="the span of the pass")
        (batch,) = (one for one in collector.spans if one.place == there)
        assert (batch.name, batch.parent, batch.links) == ("forward pass", "", [forward.place])
        assert batch.trace != server.trace
        assert batch.ended - batch.began >= 1.9
        assert forward.began - TICK_S <= batch.began <= batch.ended <= forward.ended + TICK_S
        # Several requests that wait for the slow one share the pass behind it.
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(post, service, 2, "slow")
            service.wait(lambda: service.worker(0)["load"], what="the slow one is in work")
            rest = [pool.submit(post, service, number, "b") for number in (3, 4, 5)]
            assert {one.result() for one in (first, *rest)} == {200}
        four = [whole(collector, number, 4)["forward"] for number in (2, 3, 4, 5)]
        passes = [one for one in collector.spans if one.name == "forward pass"]
        for one in four:
            for link in one.links:
                (linked,) = (made for made in passes if made.place == link)
                assert one.place in linked.links
        assert collector.paths[0] == "/v1/traces"
        assert collector.headers[0]["authorization"] == "Bearer hunter2"
        assert collector.headers[0]["x-tenant"] == "a"
        arrived = len(collector.spans)  # counted only when the exporter has the answer
        service.wait(lambda: service.metrics().total("warmfleet_spans_exported_total") == arrived)
        assert service.metrics().total("warmfleet_spans_dropped_total") == 0
        assert_invariants(service)
        service.stop()
        assert "hunter2" not in service.log


def test_the_ratio_and_the_client_decide_what_is_traced(collector: Collector) -> None:
    """At 0 only what a client samples; the log has the trace id of every request, and errors are marked."""
    with Service(
        workers=1, otlp_endpoint=collector.url, otlp_sample=0, access_log="all", log_format="json"
    ) as service:
        service.wait_ready()
        assert all(service.embed().ok for _ in range(5))
        assert post(service, 6, "a", flags="00") == 200
        assert post(service, 7) == 422
        assert post(service, 8, "a") == 200
        service.stop()  # what waits is flushed
        found = collector.spans
        lines = [json.loads(line) for line in service.log.splitlines()]
    assert {one.trace for one in found if one.name != "forward pass"} == {trace(7), trace(8)}
    assert [one.name for one in collector.of(trace(7))] == ["POST /embed"]
    assert collector.of(trace(7))[0].attributes["http.response.status_code"] == 422
    assert [one.links[0][0] for one in found if one.name == "forward pass"] == [trace(8)]
    traced = [one["trace_id"] for one in lines if one["logger"] == "warmfleet.access"]
    assert len(traced) == len(set(traced)) == 8
    assert {trace(number) for number in (6, 7, 8)} <= set(traced)


def test_an_error_of_ours_is_one_on_the_span(collector: Collector, tmp_path: Path) -> None:
    """Of the request, of the stage that it ended in, and of the pass; at 1 every request is traced."""
    broken = tmp_path / "broken.toml"
    broken.write_text('[[fault]]\nstage = "forward"\nkind = "error"\ntext = "broken"\n', encoding="utf-8")
    with Service(workers=1, otlp_endpoint=collector.url, stub_scenario=broken) as service:
        service.wait_ready()
        assert not service.embed(["broken"]).ok
        service.stop()
        found = collector.spans
    by_name = {one.name: one for one in found}
    assert set(by_name) == {"POST /embed", "tokenize", "queue", "forward", "forward pass"}
    server = by_name["POST /embed"]
    assert (server.parent, server.is_error, server.attributes["error.type"]) == ("", True, "500")
    assert [by_name[name].is_error for name in ("tokenize", "queue", "forward")] == [False, False, True]
    assert by_name["forward pass"].is_error
    assert {one.place for one in found if one.name == "forward pass"} == set(by_name["forward"].links)


@pytest.mark.parametrize("how", ["down", "slow", "redirecting"])
def test_a_bad_collector_harms_nobody(how: str) -> None:
    """Requests are answered as ever, the stop waits a second at most, and losses are counted and told."""
    with Collector() as collector:
        collector.hangs, collector.status = how == "slow", 307 if how == "redirecting" else 200
        endpoint = f"http://127.0.0.1:{free_port()}" if how == "down" else collector.url
        with Service(
            workers=1, otlp_endpoint=endpoint, otlp_headers="authorization=hunter2", drain_grace=0
        ) as service:
            service.wait_ready()
            with service.load(clients=2) as load:
                load.wait_for(50)
                if how == "slow":
                    until(lambda: collector.paths, what="the exporter hangs")
            assert not load.lost
            if how == "redirecting":
                lost = {"name": "warmfleet_spans_dropped_total", "reason": "failed"}
                service.wait(lambda: service.metrics().total(**lost), what="the loss is counted")
                service.wait_log(f"could not be exported to {endpoint}: it answered 307")
                assert set(collector.paths) == {
                    "/v1/traces"
                }  # what follows a redirect takes the headers along
            began = time.monotonic()
            assert service.stop() == 0
            assert time.monotonic() - began < 10 * FLUSH_S
            assert not collector.spans
            assert "hunter2" not in service.log
            assert_invariants(service)


def test_the_stop_flushes_what_waits(collector: Collector) -> None:
    """The last request before a stop is traced, though its spans had no time to be sent."""
    with Service(workers=2, otlp_endpoint=collector.url) as service:
        service.wait_ready()
        assert post(service, 9, "a") == 200
        service.stop()
    assert len(collector.of(trace(9))) == 4


def test_without_an_endpoint_nothing_of_it_is_loaded() -> None:
    """Neither the messages nor their runtime are in the memory of any process."""
    with Service(workers=1) as service:
        service.wait_ready()
        assert post(service, 1, "a") == 200
        for pid in (service.arbiter, *service.pids().values()):
            assert "google/_upb" not in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def test_with_one_the_messages_are_shared() -> None:
    """The arbiter loads them once before it forks, and starts no thread for it."""
    with Service(workers=1, otlp_endpoint=f"http://127.0.0.1:{free_port()}") as service:
        service.wait_ready()
        assert "google/_upb" in Path(f"/proc/{service.arbiter}/maps").read_text(encoding="utf-8")
        assert len(list(Path(f"/proc/{service.arbiter}/task").iterdir())) == 1


def test_an_endpoint_without_the_extra_is_refused(tmp_path: Path) -> None:
    """In one sentence, before anything heavy is imported."""
    (tmp_path / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with Service(otlp_endpoint="http://127.0.0.1:9", environ={"PYTHONPATH": paths}) as service:
        assert service.wait_end(PATIENCE_S) == 1
        (line,) = service.log.splitlines()
        assert line == (
            f"warmfleet: otlp_endpoint needs opentelemetry.proto, not installed for {sys.executable}; run "
            "`pip install 'warmfleet[otlp]'` there, or leave WARMFLEET_OTLP_ENDPOINT unset"
        )
