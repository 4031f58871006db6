# SPDX-License-Identifier: Apache-2.0
"""The page's own arithmetic, run where it runs: in the browser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import scripted
from double import Double

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Page


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Iterator[Page]:
    """The page, for its modules."""
    with Double(lambda: scripted.document([scripted.slot(0)])) as double, open_page(double.url) as found:
        yield found


def call(page: Page, module: str, body: str, argument: Any = None) -> Any:
    """Evaluate an expression of `m`, a module of the page, and `a`, the argument."""
    script = (
        f"async (a) => {{ const m = await import(new URL('page/{module}.js', location)); return {body}; }}"
    )
    return page.evaluate(script, argument)


def test_quantile_lies_in_its_bucket(page: Page) -> None:
    """Ten of ten in the second bucket: the median is its middle; nothing counted gives nothing."""
    quantile = "m.quantile([1, 2, 4], a, 0.5)"
    assert call(page, "model", quantile, [0, 10, 0, 0]) == 1.5
    assert call(page, "model", quantile, [10, 0, 0, 0]) == 0.5
    assert call(page, "model", quantile, [0, 0, 0, 0]) is None
    assert call(page, "model", quantile, [0, 0, 0, 5]) == 4  # above all edges: at least the last


def test_rates_of_two_documents(page: Page) -> None:
    """A thousand texts in two seconds, one 429 a second, eight texts a batch, one token in 21 padding."""
    slots = [scripted.slot(n) for n in range(4)]
    two = [scripted.document(slots, at=at) for at in (100.0, 102.0)]
    rates = call(page, "model", "m.rates(a[0], a[1])", two)
    assert (rates["texts"], rates["refused"], rates["batch"], rates["failed"]) == (500, 1, 8, 0)
    assert rates["padding"] == pytest.approx(1 / 21)
    assert rates["slots"] == dict.fromkeys("0123", 125)


def test_history_is_bounded_and_forgets(page: Page) -> None:
    """Of twenty minutes at four documents a second, five minutes are kept, a point a second."""
    body = """(() => {
        const history = new m.History();
        for (let i = 0; i < 4800; i += 1) {
            history.add({ ...a, time: i / 4, service: { ...a.service, uptime_seconds: i / 4 } });
        }
        return [history.points.length, history.points.at(-1).time - history.points[0].time];
    })()"""
    kept, span = call(page, "model", body, scripted.document([scripted.slot(0)]))
    assert 250 <= kept <= 301
    assert span <= 300


def test_restart_breaks_the_lines(page: Page) -> None:
    """Counters that begin anew are no negative rates, and no line leads from one life to the next."""
    body = """(() => {
        const history = new m.History();
        a.forEach((document) => history.add(document));
        return history.points.map((point) => (point.gap ? "gap" : point.texts));
    })()"""
    old = [scripted.document([scripted.slot(0)], at=at) for at in (500.0, 501.0)]
    new = [
        scripted.document([scripted.slot(0)], at=at) | {"time": old[0]["time"] + 10 + at} for at in (1.0, 2.0)
    ]
    assert call(page, "model", body, [*old, *new]) == [500, "gap", 500]


FIGURES = {
    "m.bytes(0)": "0 B",
    "m.bytes(1536 * 1024)": "1.5 MiB",
    "m.bytes(155 * 1024 ** 2)": "155 MiB",
    "m.bytes(1020 * 1024 ** 2)": "1.0 GiB",
    "m.bytes(null)": "\N{EN DASH}",
    "m.took(0.00042)": "420 µs",
    "m.took(0.0999)": "100 ms",
    "m.took(0.9996)": "1.0 s",
    "m.took(42.4)": "42 s",
    "m.age(59.6)": "1 min",
    "m.age(3725)": "1 h 2 min",
    "m.age(90000)": "1 d 1 h",
    "m.rate(0)": "0",
    "m.rate(3.21)": "3.2",
    "m.rate(3120)": "3,120",
    "m.rate(45100)": "45.1 k",
    "m.percent(0.048)": "4.8 %",
    "m.plural(1, 'worker')": "1 worker",
    "m.plural(0, 'pass', 'passes')": "0 passes",
    "m.ceiling(4.6)": 5,
    "m.ceiling(0.011)": 0.015,
}


def test_figures_are_for_people(page: Page) -> None:
    """Each figure has at most three digits before its unit."""
    told = call(page, "format", f"[{', '.join(FIGURES)}]")
    assert dict(zip(FIGURES, told, strict=True)) == FIGURES
