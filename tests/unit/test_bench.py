# SPDX-License-Identifier: Apache-2.0
"""What `warmfleet bench` sends, and what it makes of the replies; nothing is sent here."""

from __future__ import annotations

import io
import json
import random
import re
from array import array
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from service.commands.bench_html import report
from service.commands.bench_text import bar, show
from service.commands.load import LOST, Connection, Log, Work, requests
from service.commands.results import Results, conclude, histogram, judge, latency, percentile, stages
from service.ops_client import Address

HERE = Address.parse("http://127.0.0.1:8000/prefix")
WORK = Work(seconds=2.0, clients=4, texts=3, words=5)


def results(
    took: list[float] | None = None, statuses: dict[int, int] | None = None, **changes: Any
) -> Results:
    """Return the results of two seconds."""
    spent = [0.001 * nth for nth in range(1, 101)] if took is None else took
    log = Log(
        Counter({200: len(spent)} if statuses is None else statuses),
        array("d", [2.0 * nth / max(1, len(spent)) for nth in range(len(spent))]),
        array("d", spent),
        [b"tokenize;dur=1.0, queue;dur=2.0, forward;dur=10.0"] * len(spent),
        seconds=2.0,
        cpu_s=0.5,
    )
    known = {
        "target": "http://localhost:8000/embed",
        "local": True,
        "cores": 2,
        "when": "today",
        "version": "1",
    }
    return conclude(log, WORK, **(known | changes))


# What is sent


def test_a_request_is_texts_as_the_api_takes_them() -> None:
    """As many as asked for, different in each of them, with the key where there is one."""
    wires = requests(HERE, WORK, "hunter2")
    assert len(set(wires)) == len(wires) == 64
    head, _, body = wires[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /prefix/embed HTTP/1.1"
    assert "authorization: Bearer hunter2" in lines
    assert f"content-length: {len(body)}" in lines
    texts = json.loads(body)["inputs"]
    assert [len(text.split()) for text in texts] == [5, 5, 5]
    assert b"authorization" not in requests(HERE, WORK)[0]


def test_what_is_not_http_ends_the_connection() -> None:
    """The request under way is lost, and the next one connects anew."""

    class Transport:
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    connection, transport = Connection(), Transport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    connection.data_received(b"SSH-2.0-OpenSSH\r\n")
    assert connection.closed
    assert transport.aborted


# Figures


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (0.999, 100), (1.0, 100), (0.0, 1)])
def test_percentiles_are_values_that_were_seen(share: float, expected: int) -> None:
    """The least one that as many do not exceed."""
    assert percentile(range(1, 101), share) == expected
    assert percentile([7.0], share) == 7.0


def test_latency_of_nothing_is_nothing() -> None:
    """No zeros are made up."""
    assert latency([]) == {}
    assert histogram([]) == []
    assert stages([b"", b"cache"]) == {}


@pytest.mark.parametrize("seed", range(5))
def test_the_histogram_counts_every_reply_once(seed: int) -> None:
    """In buckets without gaps, from the fastest to the slowest."""
    drawn = random.Random(seed)
    values = sorted(drawn.lognormvariate(-5, 2) for _ in range(1000))
    found = histogram(values)
    assert sum(bucket.count for bucket in found) == len(values)
    assert [bucket.high for bucket in found[:-1]] == [bucket.low for bucket in found[1:]]
    assert (found[0].low, found[-1].high) == (values[0], values[-1])
    for bucket in found[1:]:
        assert bucket.count == sum(bucket.low < value <= bucket.high for value in values)


def test_equal_latencies_are_one_bucket() -> None:
    """There is nothing to spread."""
    assert [bucket.count for bucket in histogram([0.01] * 5)] == [5]


def test_results_are_rates_percentiles_and_the_services_share() -> None:
    """A hundred requests of three texts in two seconds; the service says that it took 13 ms of each."""
    found = results()
    assert (found.requests_per_second, found.texts_per_second) == (50, 150)
    assert (found.latency["p50"], found.latency["max"]) == (0.05, 0.1)
    assert [second.requests for second in found.by_second] == [50, 50]
    assert found.server == pytest.approx({"tokenize": 0.001, "queue": 0.002, "forward": 0.01})
    assert found.client == {"cpu": 0.25, "cores": 2}
    assert found.clean
    assert json.loads(json.dumps(found.as_json()))["schema"] == 1


@pytest.mark.parametrize(
    ("statuses", "cpu", "local", "said"),
    [
        ({200: 5000}, 0.95, False, "The client itself took 95% of a core and was the bottleneck"),
        (
            {200: 5000},
            0.2,
            True,
            "Client and service shared the 2 cores of this machine; the client took 20%",
        ),
        ({200: 10}, 0.2, False, "Only 10 replies"),
        ({200: 3000, 429: 1000}, 0.2, False, "25.0% of the requests were refused with 429: this is overload"),
        ({200: 3000, 500: 2, 503: 1}, 0.2, False, "answered with vectors: 2 with 500, 1 with 503"),
        ({200: 3000, LOST: 2}, 0.2, False, "2 requests got no reply"),
    ],
)
def test_what_figures_do_not_say_is_remarked(
    statuses: dict[int, int], cpu: float, *, local: bool, said: str
) -> None:
    """One sentence each."""
    (remark,) = judge(statuses, cpu, local=local, cores=2)
    assert said in remark
    assert judge({200: 5000}, 0.2, local=False, cores=2) == []


# What is shown


def printed(found: Results) -> list[str]:
    """Return the lines of the terminal."""
    stream = io.StringIO()
    show(found, Console(file=stream, width=160, highlight=False))
    return stream.getvalue().splitlines()


def test_the_terminal_has_everything() -> None:
    """Rates, percentiles, a bar for each bucket, the service's share, the remarks last."""
    lines = printed(results())
    assert lines[:2] == [
        "http://localhost:8000/embed: 4 clients for 2.0 s, 3 texts of 5 words in a request",
        "150 texts/s, 50 requests/s; replies: 100 with 200",
    ]
    assert sum(line.startswith("≤") for line in lines) == 20
    assert "of 50.5 ms on average the service itself takes 13.0 ms, 26%: tokenize 1.0 ms, queue" in "\n".join(
        lines
    )
    assert lines[-1].startswith("! Only 100 replies")


def test_a_bench_that_had_no_reply_says_just_that() -> None:
    """No percentiles of nothing, in the terminal or on the page."""
    found = results([], {LOST: 7})
    assert not found.clean
    assert printed(found)[1] == "0 texts/s, 0 requests/s; replies: 7 lost"
    assert "<h2>" not in report(found)


def test_replies_that_all_came_after_the_end_are_no_rate() -> None:
    """They have latencies all the same, in the terminal and on the page."""
    log = Log(Counter({200: 1}), array("d", [2.5]), array("d", [2.4]), [b""], seconds=2.0, cpu_s=0.1)
    found = conclude(log, WORK, target="x", local=False, cores=2, when="today", version="1")
    assert (found.requests_per_second, found.by_second, found.latency["max"]) == (0, [], 2.4)
    assert "over time" not in report(found)
    assert printed(found)


@pytest.mark.parametrize(("share", "drawn"), [(0.0, ""), (0.001, "▏"), (0.5, "█████"), (1.0, "█" * 10)])
def test_bars_show_what_is_not_nothing(share: float, drawn: str) -> None:
    """To an eighth of a column."""
    assert bar(share, 10) == drawn


class Page(HTMLParser):
    """What is on a page: tags that are still open, and whatever asks for something or runs."""

    VOID = ("meta", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: set[str] = set()
        self.tags: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else() -> None:
    """No script, no link, no inline style: the policy in it would forbid them; every tag is closed."""
    text = report(results(target="http://<b>&/embed"))
    page = Page(text)
    assert page.open == []
    assert page.tags["svg"] >= 4
    assert page.tags["script"] == page.tags["b"] - page.tags["li"] == 0
    assert not page.attributes & {"style", "src", "href", "onload"}
    assert re.search(r"content=\"default-src 'none'; style-src 'sha256-[\w+/]+=*'; base-uri 'none'", text)
    assert "http://&lt;b&gt;&amp;/embed" in text
    assert "nan" not in text
