# SPDX-License-Identifier: Apache-2.0
"""The results of `warmfleet bench` as one HTML file that needs nothing else. Pure; command line.

No script, no request, no inline style: the policy in the page allows its one style sheet by hash.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from typing import TYPE_CHECKING, Final

from service.commands.bench_text import what
from service.commands.showing import duration, number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from service.commands.results import Results

WIDTH, HEIGHT = 720, 220
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 26, 34
"""Margins: of the axes, and above for what the plot is marked with."""
CSS: Final = """
:root { color-scheme: light dark; --back: #fff; --ink: #1a1c1e; --soft: #5b6168; --line: #d9dde1;
  --one: #1463b8; --two: #b4560b; --three: #2e7d46; --four: #7b3fa0; --warn: #7a4b00; --warnback: #fff4dc; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --ink: #e8eaed; --soft: #a3abb3;
  --line: #353b41; --one: #6db1ff; --two: #ffa65c; --three: #75cf8f; --four: #cf9bf0;
  --warn: #ffd58a; --warnback: #33290f; } }
body { background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 46rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.big { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; padding: 0; list-style: none; }
.big b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.warn { background: var(--warnback); border-radius: .4rem; color: var(--warn); padding: .5rem .8rem; }
.scroll { overflow-x: auto; } svg { display: block; height: auto; min-width: 30rem; width: 100%; }
svg text { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--line); }
.one { fill: var(--one); } .two { fill: var(--two); }
.three { fill: var(--three); } .four { fill: var(--four); } .key { display: inline; margin-right: .5rem;
  min-width: 0; width: 10px; }
.line { fill: none; stroke-width: 2; } .line.one { stroke: var(--one); fill: none; }
.line.two { stroke: var(--two); fill: none; } .mark { stroke: var(--ink); stroke-dasharray: 3 3; }
"""
FILLS: Final = ("one", "two", "three", "four")


def report(results: Results) -> str:
    """Return the whole page."""
    digest = base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>warmfleet bench of {escape(results.target)}</title><style>{CSS}</style></head>\n"
        f"<body><main>\n{_body(results)}\n</main></body></html>\n"
    )


def _body(results: Results) -> str:
    about = f"{results.when}, {what(results)}; warmfleet {results.version}"
    parts = [
        f"<h1>warmfleet bench</h1><p>{escape(results.target)}</p>",
        f'<p class="soft">{escape(about)}</p>',
        _tiles(results),
        *(f'<p class="warn">{escape(remark)}</p>' for remark in results.remarks),
    ]
    if results.latency:
        parts += [
            f"<h2>Latency</h2>{_table(results.latency)}",
            f"<h2>How the latencies are spread</h2>{_spread(results)}",
        ]
    if results.by_second:
        parts += [
            f"<h2>Latency over time</h2>{_over_time(results)}",
            f"<h2>Requests a second</h2>{_throughput(results)}",
        ]
    if results.server:
        parts.append(f"<h2>Where the mean time went</h2>{_stages(results)}")
    return "\n".join(parts)


def _tiles(results: Results) -> str:
    tiles = {"texts a second": number(results.texts_per_second)}
    tiles["requests a second"] = number(results.requests_per_second)
    tiles |= {name: duration(results.latency[name]) for name in ("p50", "p99") if results.latency}
    tiles |= {f"replies {status}": str(count) for status, count in results.statuses.items()}
    items = "".join(f"<li><b>{escape(value)}</b> {escape(name)}</li>" for name, value in tiles.items())
    return f'<ul class="big">{items}</ul>'


def _table(latency: Mapping[str, float]) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in latency)
    cells = "".join(f"<td>{duration(value)}</td>" for value in latency.values())
    table = f"<table><thead><tr>{heads}</tr></thead><tbody><tr>{cells}</tr></tbody></table>"
    return f'<div class="scroll">{table}</div>'


# ---------------------------------------------------------------------------------------------
# Plots


def _spread(results: Results) -> str:
    """Bars of the histogram, with the median and the 99th percentile marked."""
    buckets = results.histogram
    most = max(bucket.count for bucket in buckets)
    wide = (WIDTH - LEFT - RIGHT) / len(buckets)
    bars = []
    for nth, bucket in enumerate(buckets):
        high = (HEIGHT - TOP - BOTTOM) * bucket.count / most
        title = f"{duration(bucket.low)} to {duration(bucket.high)}: {bucket.count}"
        bars.append(
            _rect(LEFT + nth * wide + 1, HEIGHT - BOTTOM - high, wide - 2, high, kind="one", title=title)
        )
        if nth % 4 == 0:
            bars.append(_text(LEFT + nth * wide, HEIGHT - 14, duration(bucket.low), "start"))
    for name in ("p50", "p99"):
        nth = next((n for n, bucket in enumerate(buckets) if results.latency[name] <= bucket.high), 0)
        x = LEFT + (nth + 0.5) * wide
        bars.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>')
        bars.append(_text(x, TOP - 12, name, "middle"))
    axis = _axis(most, str)
    return _svg(f"Histogram of {sum(b.count for b in buckets)} latencies", axis + "".join(bars))


def _over_time(results: Results) -> str:
    """Lines of the median and the 99th percentile of each second."""
    seconds = results.by_second
    top = max(one.p99 for one in seconds)
    lines = [
        _polyline([(one.at + 0.5, getattr(one, name)) for one in seconds], _span(results), top, kind)
        for name, kind in (("p50", "one"), ("p99", "two"))
    ]
    key = "".join(
        _rect(x, TOP - 20, 10, 10, kind=kind, title=name) + _text(x + 14, TOP - 11, name, "start")
        for name, kind, x in (("p50", "one", LEFT + 8), ("p99", "two", LEFT + 68))
    )
    axis = _axis(top, duration) + _time_axis(results)
    return _svg("Median and 99th percentile of each second", axis + "".join(lines) + key)


def _throughput(results: Results) -> str:
    """A bar for each second."""
    seconds = results.by_second
    most = max(one.requests for one in seconds)
    wide = (WIDTH - LEFT - RIGHT) / _span(results)
    bars = []
    for one in seconds:
        high = (HEIGHT - TOP - BOTTOM) * one.requests / most
        title = f"second {one.at + 1}: {one.requests} requests"
        bars.append(
            _rect(
                LEFT + one.at * wide + 0.5,
                HEIGHT - BOTTOM - high,
                max(0.5, wide - 1),
                high,
                kind="three",
                title=title,
            )
        )
    return _svg("Requests answered in each second", _axis(most, str) + _time_axis(results) + "".join(bars))


def _stages(results: Results) -> str:
    """One bar of the mean latency, by stage, and what the service does not account for."""
    mean = results.latency["mean"]
    parts = dict(results.server) | {"HTTP, network, client": max(0.0, mean - sum(results.server.values()))}
    total = sum(parts.values())
    x, drawn, rows = 0.0, [], []
    for nth, (name, seconds) in enumerate(parts.items()):
        wide = WIDTH * seconds / total
        share = f"{duration(seconds)}, {seconds / total:.0%}"
        drawn.append(_rect(x, 0, wide, 28, kind=FILLS[nth % len(FILLS)], title=f"{name}: {share}"))
        key = f'<rect class="{FILLS[nth % len(FILLS)]}" width="10" height="10"/>'
        rows.append(
            f'<tr><th scope="row"><svg class="key" viewBox="0 0 10 10" aria-hidden="true">{key}</svg>'
            f"{escape(name)}</th><td>{duration(seconds)}</td><td>{seconds / total:.0%}</td></tr>"
        )
        x += wide
    return (
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} 28" role="img"><title>Mean latency by stage</title>'
        f"{''.join(drawn)}</svg></div><table><tbody>{''.join(rows)}</tbody></table>"
    )


def _svg(title: str, inside: str) -> str:
    return (
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>'
        f"{inside}</svg></div>"
    )


def _rect(x: float, y: float, wide: float, high: float, *, kind: str, title: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{max(0.0, high):.1f}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _polyline(points: Sequence[tuple[float, float]], right: float, top: float, kind: str) -> str:
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    placed = " ".join(
        f"{LEFT + wide * x / right:.1f},{HEIGHT - BOTTOM - high * y / top:.1f}" for x, y in points
    )
    return f'<polyline class="line {kind}" points="{placed}"/>'


def _axis(top: float, words: Callable[[float], str]) -> str:
    """Return lines and words at nothing, the half and the top."""
    made = ""
    for share in (0.0, 0.5, 1.0):
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share
        value = top * share
        said = words(round(value) if words is str else value) if share else "0"
        made += f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        made += _text(LEFT - 6, y + 4, said, "end")
    return made


def _span(results: Results) -> int:
    """Return the seconds that the time axis has."""
    return results.by_second[-1].at + 1


def _time_axis(results: Results) -> str:
    span = _span(results)
    step = max(1, round(span / 6))
    return "".join(
        _text(LEFT + (WIDTH - LEFT - RIGHT) * at / span, HEIGHT - 14, f"{at} s", "middle")
        for at in range(0, span + 1, step)
    )
