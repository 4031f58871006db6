# SPDX-License-Identifier: Apache-2.0
"""Sums of the counter files, for a document a second: what a scrape has, for a fraction of its cost. Worker.

Theory of operation. prometheus_client only ever appends to a file, so an entry stays where it is. What stands
where is read once, by prometheus_client itself; from then on a look at a file is one read of its numbers.
"""

from __future__ import annotations

import json
import operator
import os
import sys
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.mmap_dict import MmapedDict

from service.metrics import DIRECTORY, SECONDS, UNREADABLE, counter_files

if TYPE_CHECKING:
    from collections.abc import Mapping

STAGES = ("tokenize", "queue", "forward", "encode", "total")
SUMS = {
    "texts": "warmfleet_texts_total",
    "tokens": "warmfleet_tokens_total",
    "padding_tokens": "warmfleet_padding_tokens_total",
    "rejected_texts": "warmfleet_rejected_texts_total",
    "dropped_texts": "warmfleet_dropped_texts_total",
    "out_of_memory": "warmfleet_out_of_memory_total",
    "batches": "warmfleet_batch_seconds_bucket",  # a bucket in the files does not hold those below it
    "batch_texts": "warmfleet_batch_texts_sum",
    "batch_tokens": "warmfleet_batch_tokens_sum",
    "batch_seconds": "warmfleet_batch_seconds_sum",
}
"""By their names in the document: what is summed up over all labels, by its name in the files."""
REQUESTS = "warmfleet_requests_total"
STAGE_SUM = "warmfleet_request_stage_seconds_sum"
STAGE_BUCKET = "warmfleet_request_stage_seconds_bucket"
BY_SLOT = {name: key for key, name in SUMS.items() if key in ("texts", "tokens")} | {REQUESTS: "requests"}
BOUNDS = (*SECONDS, float("inf"))


@dataclass(frozen=True, eq=False)  # compared by identity, which is fast: each is made once
class Series:
    """What entries of any slot count: a name in the files, and the values of its labels, by their names."""

    name: str
    labels: tuple[str, ...]


def _series(key: str) -> tuple[str, Series]:
    """Read the key of an entry, which is JSON: the slot's number, and the series."""
    _, name, labels, _ = json.loads(key)
    slot = labels.pop("slot").removeprefix("s")
    return slot, _once(name, tuple(value for _, value in sorted(labels.items())))


@cache
def _once(name: str, labels: tuple[str, ...]) -> Series:
    return Series(name, labels)


@dataclass
class CounterFile:
    """What is known of one file.

    Attributes:
        path: of the file.
        inode: a worker that finds its file damaged drops it and begins another.
        used: bytes of it; more once there is a new entry.
        slot: that it belongs to.
        series: of the entries.
        places: of their values, in doubles.
        values: read last.
        lost: what the files counted that were there before.
    """

    path: Path
    inode: int = 0
    used: int = 0
    slot: str = ""
    series: list[Series] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    lost: Counter[Series] = field(default_factory=Counter)

    def read(self) -> None:
        """Look at the file again.

        Raises:
            OSError: it is gone.
            ValueError: it is damaged, as all else in `UNREADABLE`; what was read before stays.
        """
        with self.path.open("rb") as stream:
            inode = os.fstat(stream.fileno()).st_ino
            used = int.from_bytes(stream.read(4), sys.byteorder)
            if (inode, used) == (self.inode, self.used):
                stream.seek(0)
                doubles = memoryview(stream.read(used)).cast("d")
                values = [doubles[place] for place in self.places]
                if not self._fell(values):
                    self.values = values
                    return
        entries = list(MmapedDict.read_all_values_from_file(str(self.path)))
        found = [_series(key) for key, *_ in entries]
        if self.path.stat().st_ino != inode:
            return  # replaced a moment ago: the next look finds it as it is
        series, values = [series for _, series in found], [value for _, value, *_ in entries]
        grew = inode == self.inode and series[: len(self.series)] == self.series and not self._fell(values)
        if not grew:
            self.lost.update(dict(zip(self.series, self.values, strict=True)))
        self.inode, self.used = inode, used
        self.slot = found[0][0] if found else self.slot
        self.series, self.values = series, values
        self.places = [place // 8 for *_, place in entries]

    def _fell(self, values: list[float]) -> bool:
        """Say whether a counter is less than it was: a new file that has got the inode of the old one."""
        return any(map(operator.lt, values, self.values))


class Totals:
    """The sums over all slots and their workers, dead ones too."""

    def __init__(self, folder: Path | None = None) -> None:
        """Read the files of a folder; by default of the service's own."""
        self._folder = folder or Path(os.environ[DIRECTORY])
        self._files: dict[Path, CounterFile] = {}
        self._lock = threading.Lock()

    def read(self) -> dict[str, Any]:
        """Return the sums as the status document has them; reads files, so call it off the event loop.

        A file that cannot be read counts what it did when it could: no sum ever falls.
        """
        sums: defaultdict[Series, float] = defaultdict(float)
        by_slot: defaultdict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(BY_SLOT.values(), 0))
        with self._lock:
            for file in self._look():
                for entries in (zip(file.series, file.values, strict=True), file.lost.items()):
                    for series, value in entries:
                        sums[series] += value
                        if series.name in BY_SLOT:
                            by_slot[file.slot][BY_SLOT[series.name]] += value
        return _document(sums) | {
            "by_slot": {
                slot: {name: whole(value) for name, value in by_slot[slot].items()}
                for slot in sorted(by_slot, key=lambda slot: (len(slot), slot))
            }
        }

    def _look(self) -> list[CounterFile]:
        for path in counter_files(self._folder):
            file = self._files.setdefault(path, CounterFile(path))
            try:
                file.read()
            except UNREADABLE:
                continue
        return list(self._files.values())


def _document(sums: Mapping[Series, float]) -> dict[str, Any]:
    by_name: defaultdict[str, float] = defaultdict(float)
    requests: defaultdict[str, float] = defaultdict(float)
    counts = {stage: [0] * len(BOUNDS) for stage in STAGES}
    seconds = dict.fromkeys(STAGES, 0.0)
    for series, value in sums.items():
        by_name[series.name] += value
        match series.name, series.labels:
            case (n, (_, status)) if n == REQUESTS:  # endpoint, status
                requests[status] += value
            case (n, (bound, stage)) if n == STAGE_BUCKET:  # le, stage
                counts[stage][BOUNDS.index(float(bound))] += int(value)
            case (n, (stage,)) if n == STAGE_SUM:
                seconds[stage] += value
    return {
        **{key: whole(by_name[name]) for key, name in SUMS.items()},
        "requests": {status: whole(requests[status]) for status in sorted(requests)},
        "stages": {
            "le": list(SECONDS),
            "counts": counts,
            "sums": {stage: round(value, 6) for stage, value in seconds.items()},
        },
    }


def whole(value: float) -> float:
    """Return a number without decimals as an integer, and any other to the microsecond."""
    return int(value) if value == int(value) else round(value, 6)
