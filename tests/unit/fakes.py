# SPDX-License-Identifier: Apache-2.0
"""A backend of which a test sees every step, and an inference loop that runs in the test's own thread."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from service.backends.base import Cut, Encoding
from service.inference import Inference
from service.passes import BatchObserver, Passes
from service.tickets import Entry, Ticket
from service.token_budget import TokenBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Trouble = Callable[["FakeBatch"], Exception | None]

PROBE = 1
"""The key of warm-up's text."""


@dataclass(frozen=True)
class FakeBatch:
    """Texts by their key, the first of their ids."""

    encodings: tuple[Encoding, ...]
    token_vectors: bool
    padded: bool

    @property
    def keys(self) -> tuple[int, ...]:
        return tuple(encoding.ids[0] for encoding in self.encodings)

    @property
    def texts(self) -> int:
        return len(self.encodings)

    @property
    def tokens(self) -> int:
        lengths = list(map(len, self.encodings))
        return max(lengths) * len(lengths) if self.padded else sum(lengths)

    def rows(self) -> NDArray[np.float32]:
        """A row is (key, tokens); that of a token (key, its place)."""
        rows = [
            (encoding.ids[0], place)
            for encoding in self.encodings
            for place in (range(len(encoding)) if self.token_vectors else [len(encoding)])
        ]
        return np.array(rows, np.float32)


@dataclass
class FakePending:
    """A batch that is computed when its rows are asked for, unless the backend computes at once."""

    backend: FakeBackend
    batch: FakeBatch

    def done(self) -> bool:
        return self.backend.immediate or self.backend.through

    def rows(self) -> NDArray[np.float32]:
        self.backend.step("rows", self.batch)
        return self.backend.values(self.batch)


@dataclass
class FakeBackend:
    """Computes keys; writes down what it is asked, and fails as it is told.

    Attributes:
        immediate: computes in `launch`, as a CPU does.
        through: has computed what was launched, though nobody asked for it.
        trouble: for each stage (collate, launch, rows), what is wrong with a batch, if anything.
        values: the rows of a batch.
        events: (stage, keys), in the order in which it was asked.
    """

    immediate: bool = True
    through: bool = False
    padded: bool = False
    max_tokens: int = 100
    trouble: dict[str, Trouble] = field(default_factory=dict)
    values: Callable[[FakeBatch], NDArray[np.float32]] = FakeBatch.rows
    events: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def passes(self) -> list[tuple[int, ...]]:
        """Return the keys of each launched batch."""
        return [keys for stage, keys in self.events if stage == "launch"]

    def step(self, stage: str, batch: FakeBatch) -> None:
        self.events.append((stage, batch.keys))
        problem = self.trouble.get(stage, lambda _: None)(batch)
        if problem is not None:
            raise problem

    def tokenize(self, inputs: Sequence[str], *, cut: Cut, prompt: str = "") -> list[Encoding]:
        return [Encoding([PROBE]) for _ in inputs]

    def collate(self, encodings: Sequence[Encoding], *, token_vectors: bool = False) -> FakeBatch:
        batch = FakeBatch(tuple(encodings), token_vectors, self.padded)
        if "collate" in self.trouble:
            self.step("collate", batch)
        return batch

    def launch(self, batch: FakeBatch) -> FakePending:
        self.step("launch", batch)
        self.through = False
        return FakePending(self, batch)

    def trim(self) -> None:
        self.events.append(("trim", ()))


@dataclass
class Bench(BatchObserver):
    """An inference loop with everything around it written down.

    Attributes:
        told: what was called, in order: lost, worn out, out of memory, batch.
        guarded: passes that the watchdog watched, by their seconds.
        watching: whether it watches now.
        tickets: by the order of the requests.
        finished: indices of the requests, as they end.
    """

    backend: FakeBackend = field(default_factory=FakeBackend)
    budget: TokenBudget = field(default_factory=lambda: TokenBudget(1000, 100))
    max_batch_texts: int = 100
    told: list[tuple[Any, ...]] = field(default_factory=list)
    batches: list[tuple[int, int, int]] = field(default_factory=list)
    guarded: list[float] = field(default_factory=list)
    watching: bool = False
    tickets: list[Ticket] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inference = Inference(
            Passes(
                self.backend,  # type: ignore[arg-type]  # as much of it as a pass needs
                self.budget,
                forward_timeout_s=7.5,
                observer=self,
                watchdog=self.watchdog,
                worn_out=lambda message: self.told.append(("worn out", message)),
                drained=lambda texts, seconds: self.drains.append((texts, seconds)),
            ),
            self.max_batch_texts,
            device_lost=lambda message: self.told.append(("lost", message)),
        )
        self.drains: list[tuple[int, float]] = []

    @contextmanager
    def watchdog(self, seconds: float) -> Iterator[None]:
        assert not self.watching
        self.guarded.append(seconds)
        self.watching = True
        try:
            yield
        finally:
            self.watching = False

    def batch(self, texts: int, tokens: int, computed: int, seconds: float) -> None:
        self.batches.append((texts, tokens, computed))

    def out_of_memory(self, budget: int) -> None:
        self.told.append(("out of memory", budget))

    def recovered(self, budget: int) -> None:
        self.told.append(("recovered", budget))

    def look(self) -> None:
        """Nothing more comes while the device computes; a test may say otherwise."""
        self.backend.through = True

    def ask(self, *texts: tuple[int, int], token_vectors: bool = False) -> Ticket:
        """Queue a request of texts as (key, tokens)."""
        number = len(self.tickets)
        ticket = Ticket(len(texts), lambda _: self.finished.append(number))
        self.tickets.append(ticket)
        self.inference.put(
            [
                Entry(Encoding([key] * tokens), ticket, index, token_vectors, token_vectors)
                for index, (key, tokens) in enumerate(texts)
            ]
        )
        return ticket

    def run(self) -> None:
        """Run the loop in this thread until every request has ended; it must not wait before that."""

        def idle(look_s: float | None = None) -> None:
            if look_s is not None:  # at the device
                self.look()
                return
            assert len(self.finished) + sum(t.abandoned for t in self.tickets) >= len(self.tickets), "waits"
            self.inference.close()

        self.inference._changed.wait = idle  # type: ignore[method-assign,assignment]
        self.inference.run()
        assert not self.watching
        assert (self.inference.under_way, self.inference.queued) == (0, (0, 0))
