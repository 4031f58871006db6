# SPDX-License-Identifier: Apache-2.0
"""What a `warmfleet bench` has found: percentiles, histogram, seconds, judgement. Pure; command line."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from service.commands.load import Log, Work

SHARES: Final = {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
BUCKETS = 20
TIMING: Final = re.compile(rb"(\w+);dur=([\d.]+)")
BUSY = 0.8
"""Of a core: a client that took so much may have been what was slow."""
ENOUGH = 1000
"""Replies that a 99th percentile wants: ten lie beyond it."""
OK: Final = 200
TOO_MANY: Final = 429
LOST: Final = 0


@dataclass(frozen=True)
class Bucket:
    """How many requests took between two times, in seconds; the upper one included."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Second:
    """The replies that were complete within one second.

    Attributes:
        at: seconds from the start, whole.
        requests: that were answered 200.
        p50: seconds that they took.
        p99: likewise.
    """

    at: int
    requests: int
    p50: float
    p99: float


@dataclass(frozen=True)
class Results:
    """All that is printed, saved and drawn. Times are seconds.

    Attributes:
        target: URL.
        when: date and time of the start, UTC.
        version: of the client.
        asked: what was to be sent.
        seconds: that it was sent for.
        statuses: replies by status; `lost`: requests without a reply.
        requests_per_second: that were answered 200.
        texts_per_second: of those.
        latency: `min`, `mean`, percentiles, `max`; empty if nothing was answered 200.
        histogram: of the same.
        by_second: likewise.
        server: mean seconds in each stage, by the service's own `Server-Timing`.
        client: `cpu`: share of a core that this client took; `cores`: that it could have used.
        remarks: what the figures do not say by themselves.
    """

    target: str
    when: str
    version: str
    asked: Mapping[str, float]
    seconds: float
    statuses: Mapping[str, int]
    requests_per_second: float
    texts_per_second: float
    latency: Mapping[str, float]
    histogram: Sequence[Bucket]
    by_second: Sequence[Second]
    server: Mapping[str, float]
    client: Mapping[str, float]
    remarks: Sequence[str] = field(default_factory=tuple)

    @property
    def clean(self) -> bool:
        """Whether every request was answered 200."""
        return set(self.statuses) == {str(OK)}

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"schema": 1} | asdict(self)


def conclude(
    log: Log, work: Work, *, target: str, local: bool, cores: int, when: str, version: str
) -> Results:
    """Return what a log says.

    Args:
        log: of the clients.
        work: that they were given.
        target: URL, for the report.
        local: whether the service is on the client's machine.
        cores: of that.
        when: of the start, for the report.
        version: likewise.
    """
    ordered = sorted(log.took)
    within = sum(at <= log.seconds for at in log.at)
    rate = within / log.seconds if log.seconds else 0.0
    cpu = log.cpu_s / log.seconds if log.seconds else 0.0
    names = {LOST: "lost"}
    return Results(
        target,
        when,
        version,
        {"seconds": work.seconds, "clients": work.clients, "texts": work.texts, "words": work.words},
        log.seconds,
        {names.get(status, str(status)): count for status, count in sorted(log.statuses.items())},
        rate,
        rate * work.texts,
        latency(ordered),
        histogram(ordered),
        by_second(log.at, log.took, log.seconds),
        stages(log.timings),
        {"cpu": cpu, "cores": cores},
        tuple(judge(log.statuses, cpu, local=local, cores=cores)),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the least value that a share of all does not exceed; the values are sorted, at least one."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def latency(ordered: Sequence[float]) -> dict[str, float]:
    """Return the figures of sorted values; none of none."""
    if not ordered:
        return {}
    return {
        "min": ordered[0],
        "mean": math.fsum(ordered) / len(ordered),
        **{name: percentile(ordered, share) for name, share in SHARES.items()},
        "max": ordered[-1],
    }


def histogram(ordered: Sequence[float], buckets: int = BUCKETS) -> list[Bucket]:
    """Return buckets, each as many times wider than the one before, as latencies have long tails."""
    if not ordered:
        return []
    low, high = max(ordered[0], 1e-6), max(ordered[-1], 1e-6)
    if high <= low * 1.001:
        return [Bucket(low, high, len(ordered))]
    ratio = (high / low) ** (1 / buckets)
    bounds = [low * ratio**nth for nth in range(buckets)] + [high]
    counts = [0] * buckets
    for value in ordered:
        counts[min(buckets - 1, max(0, bisect_left(bounds, value) - 1))] += 1
    return [Bucket(*edge, count) for edge, count in zip(pairwise(bounds), counts, strict=True)]


def by_second(at: Iterable[float], took: Iterable[float], seconds: float) -> list[Second]:
    """Return the figures of each second in which replies came; a last one that was begun says too little."""
    found: dict[int, list[float]] = defaultdict(list)
    for when, spent in zip(at, took, strict=True):
        if int(when) < max(1, int(seconds)):
            found[int(when)].append(spent)
    return [
        Second(second, len(values), percentile(values, 0.5), percentile(values, 0.99))
        for second, values in ((second, sorted(found[second])) for second in sorted(found))
    ]


def stages(timings: Iterable[bytes]) -> dict[str, float]:
    """Return the mean seconds of each stage that the headers name, in milliseconds; none of none."""
    sums: dict[str, float] = defaultdict(float)
    count = 0
    for timing in timings:
        pairs = TIMING.findall(timing)
        count += bool(pairs)
        for name, milliseconds in pairs:
            sums[name.decode()] += float(milliseconds) / 1e3
    return {name: spent / count for name, spent in sums.items()} if count else {}


def judge(statuses: Mapping[int, int], cpu: float, *, local: bool, cores: int) -> list[str]:
    """Return what one should know before one believes the figures."""
    total, good = sum(statuses.values()), statuses.get(OK, 0)
    remarks = []
    if cpu >= BUSY:
        remarks.append(
            f"The client itself took {cpu:.0%} of a core and was the bottleneck, or near it: the service can "
            "do more. Send more texts in a request, or run bench from several machines."
        )
    elif local and cores <= 8:  # noqa: PLR2004 - where a client's share shows
        remarks.append(
            f"Client and service shared the {cores} cores of this machine; the client took {cpu:.0%} of one."
        )
    if good < ENOUGH:
        remarks.append(f"Only {good} replies: percentiles beyond p90 are chance. Give it more --seconds.")
    if refused := statuses.get(TOO_MANY, 0):
        remarks.append(f"{refused / total:.1%} of the requests were refused with 429: this is overload.")
    failed = {status: count for status, count in statuses.items() if status not in (OK, TOO_MANY, LOST)}
    if failed:
        named = ", ".join(f"{count} with {status}" for status, count in sorted(failed.items()))
        remarks.append(f"Not every request was answered with vectors: {named}.")
    if lost := statuses.get(LOST, 0):
        remarks.append(
            f"{lost} requests got no reply: the connection was refused or lost, or they were too late."
        )
    return remarks
