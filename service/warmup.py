# SPDX-License-Identifier: Apache-2.0
"""Warm-up that ends when the model is warm: worst batch first, outputs checked. Worker, model thread."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from service.backends.base import PROBE_WORD, Cut, forward
from service.errors import OutOfMemoryError, WarmupError
from service.slots import ShapeTimes, WarmedShape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from service.backends.base import Backend

MIN_ROUNDS = 3
GAIN = 0.95
"""A round improves on the best so far if it takes less than this share of it."""
SPREAD = 1.5
"""Warm means that the last rounds' median is within this factor of the best."""
SHORT_TOKENS = 8
UNIT_TOLERANCE = 1e-3
"""Of the length of a vector; rows are normalised in float32, whatever the model computes in."""
SAME_TOLERANCE = 1e-2


class Report(Protocol):
    """Told before every pass: share done (0 to 1), and what runs."""

    def __call__(self, done: float, doing: str) -> None:
        """Show it."""


class Note(Protocol):
    """Told after every pass: which shape of the warm-up it was, and all its passes so far."""

    def __call__(self, place: int, shape: WarmedShape) -> None:
        """Keep it."""


@dataclass(frozen=True)
class WarmupResult:
    """The shapes' times, worst first, and the token budget that had room."""

    shapes: list[ShapeTimes]
    max_batch_tokens: int


def shapes_for(max_batch_tokens: int, max_tokens: int) -> list[tuple[int, int]]:
    """Return the batches to warm as (texts, tokens of each), worst first.

    The full budget as long, short and medium texts, then one text of each power of two of tokens
    down: the shapes at which kernels, heuristics and allocations differ.
    """
    longest = min(max_tokens, max_batch_tokens)
    short = min(SHORT_TOKENS, longest)
    medium = max(short, longest // 4)
    shapes = [(max(1, max_batch_tokens // length), length) for length in (longest, short, medium)]
    tokens = 1 << (longest - 1).bit_length()
    while tokens >= short:
        shapes.append((1, min(tokens, longest)))
        tokens //= 2
    return list(dict.fromkeys(shapes))


def is_warm(seconds: Sequence[float]) -> bool:
    """Say whether the passes of a shape have settled (best-plateau rule).

    The last three rounds did not improve the best before them by 5 %, and their median is
    within 1.5 times the best. On simulated lazy devices it stops too early in 0.4 % of runs,
    fixed rounds in 22 to 100 % (docs/decisions/0008).
    """
    if len(seconds) <= MIN_ROUNDS:
        return False
    best = min(seconds)
    return min(seconds[-MIN_ROUNDS:]) > GAIN * min(seconds[:-MIN_ROUNDS]) and (
        statistics.median(seconds[-MIN_ROUNDS:]) <= SPREAD * best
    )


def warm(
    backend: Backend,
    *,
    max_batch_tokens: int,
    shapes: Sequence[tuple[int, int]] = (),
    known: Sequence[ShapeTimes] = (),
    extra: Sequence[tuple[int, int]] = (),
    max_rounds: int = 20,
    budget_s: float = 60.0,
    report: Report = lambda done, doing: None,  # noqa: ARG005 - the default shows nothing
    note: Note = lambda place, shape: None,  # noqa: ARG005 - the default keeps nothing
    clock: Callable[[], float] = time.perf_counter,
) -> WarmupResult:
    """Run batches through the model until each shape's time has settled.

    Args:
        backend: the placed model.
        max_batch_tokens: budget of one pass; halved while it does not fit, but never below the longest text.
        shapes: the batches; default: derived from the budget.
        known: what an earlier worker of this slot measured; a shape that is at once within
            1.5 times its steady time is warm after one pass.
        extra: further batches, of traffic; those beyond the budget of one pass are left out.
        max_rounds: most passes for one shape.
        budget_s: seconds for all shapes, an equal share each; one pass each is always made.
        report: told before every pass.
        note: told after every pass.
        clock: seconds, for tests.

    Raises:
        WarmupError: an output is wrong, or not even the smallest budget fits.
    """
    steady = {(shape.texts, shape.tokens): shape.steady_s for shape in known}
    rules = _Rules(steady, max_rounds, budget_s, report, note, clock)
    while True:
        try:
            plan = list(shapes) or shapes_for(max_batch_tokens, backend.max_tokens)
            fitting = [(texts, tokens) for texts, tokens in extra if texts * tokens <= max_batch_tokens]
            plan = list(dict.fromkeys([*plan, *fitting]))
            times = _warm_shapes(backend, plan, rules)
        except OutOfMemoryError as error:
            problem = str(error)
        else:
            return WarmupResult(times, max_batch_tokens)
        backend.trim()  # out of the except block, whose traceback would keep the tensors
        if shapes or max_batch_tokens // 2 < backend.max_tokens:  # texts would be cut here and not elsewhere
            msg = f"no room for a batch of {max_batch_tokens} tokens: {problem}"
            raise WarmupError(msg)
        max_batch_tokens //= 2


@dataclass(frozen=True)
class _Rules:
    """When a shape is done, and whom to tell."""

    steady: Mapping[tuple[int, int], float]
    max_rounds: int
    budget_s: float
    report: Report
    note: Note
    clock: Callable[[], float]


def _warm_shapes(backend: Backend, plan: Sequence[tuple[int, int]], rules: _Rules) -> list[ShapeTimes]:
    """Warm each shape in turn, until it is warm or its share of the budget is spent; one pass at least."""
    result = []
    share_s = rules.budget_s / len(plan)
    for number, (texts, tokens) in enumerate(plan):
        batch = [probe(tokens)] * texts
        known = rules.steady.get((texts, tokens))
        seconds: list[float] = []
        first: NDArray[np.float32] | None = None
        converged = False
        while not converged and len(seconds) < rules.max_rounds:
            rules.report(number / len(plan), f"batch {texts}x{tokens}, round {len(seconds) + 1}")
            began = rules.clock()
            vectors = forward(backend, backend.collate(backend.tokenize(batch, cut=Cut.RIGHT)))
            seconds.append(rules.clock() - began)
            first = vectors if first is None else first
            check(vectors, texts, backend, first)
            rules.note(number, WarmedShape(texts, tokens, tuple(seconds), len(seconds)))
            converged = is_warm(seconds) or (known is not None and seconds[-1] <= SPREAD * known)
            if sum(seconds) > share_s:
                break
        steady = statistics.median(seconds[-MIN_ROUNDS:])
        if known is not None and converged:
            steady = min(steady, known)
        rules.note(number, WarmedShape(texts, tokens, tuple(seconds), len(seconds), steady, converged))
        result.append(ShapeTimes(texts, tokens, len(seconds), seconds[0], steady, converged))
    rules.report(1.0, "")
    return result


def probe(tokens: int) -> str:
    """Return a text of about so many tokens, two of which are specials."""
    return " ".join([PROBE_WORD] * max(1, tokens - 2))


def check(vectors: NDArray[np.float32], texts: int, backend: Backend, first: NDArray[np.float32]) -> None:
    """Raise unless the vectors are what `texts` equal texts must give.

    Raises:
        WarmupError: naming what is wrong: rows, dimension, values, length or steadiness.
    """
    import numpy as np  # not at the top: numpy starts threads, and the arbiter imports this module

    expected = (texts, backend.dimension)
    problem = ""
    if vectors.shape != expected:
        problem = f"shape {vectors.shape} instead of {expected}"
    elif not np.isfinite(vectors).all():
        problem = "values that are not finite"
    elif backend.normalized and np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > UNIT_TOLERANCE:
        problem = "vectors that are not of unit length"
    elif np.abs(vectors - first[:1]).max() > SAME_TOLERANCE * max(1.0, float(np.abs(first).max())):
        problem = "another vector for the same text than at the first pass"
    if problem:
        msg = f"warm-up output is wrong: {problem}"
        raise WarmupError(msg)
