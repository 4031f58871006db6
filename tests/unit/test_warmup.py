# SPDX-License-Identifier: Apache-2.0
"""Warm-up: which batches, until when, and what makes it fail."""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.backends.base import Cut, Done
from service.backends.stub import StubBackend
from service.errors import DeviceLostError, OutOfMemoryError, WarmupError
from service.slots import ShapeTimes, WarmedShape
from service.warmup import MIN_ROUNDS, WarmupResult, is_warm, probe, shapes_for, warm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from service.settings import Settings

STEADY = 0.01


class FakeModel(StubBackend):
    """Passes take what `seconds` says on a clock of their own; outputs are what `spoil` makes of them."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.time, self.room, self.trims = 100.0, 1 << 30, 0
        self.passes: list[tuple[int, int]] = []
        self.seconds: Callable[[int], float] = lambda number: STEADY
        self.spoil: Callable[[NDArray[np.float32], int], NDArray[np.float32]] = lambda vectors, number: (
            vectors
        )

    def clock(self) -> float:
        return self.time

    def launch(self, batch: Any) -> Done:
        shape = (batch.texts, len(batch.encodings[0]))
        if batch.tokens > self.room:
            msg = f"{batch.tokens} tokens"
            raise OutOfMemoryError(msg)
        self.passes.append(shape)
        number = self.passes.count(shape)
        self.time += self.seconds(number)
        return Done(self.spoil(super().launch(batch).rows(), number))

    def trim(self) -> None:
        self.trims += 1

    def warm(self, **options: Any) -> WarmupResult:
        return warm(self, clock=self.clock, **{"max_batch_tokens": 512} | options)


@pytest.fixture
def model(stub_settings: Settings) -> FakeModel:
    return FakeModel(stub_settings)


def runs(passes: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    """Return each shape with the number of its passes, in order."""
    return [(shape, passes.count(shape)) for shape in dict.fromkeys(passes)]


# Which batches


@pytest.mark.parametrize(
    ("budget", "longest", "expected"),
    [
        (512, 256, [(2, 256), (64, 8), (8, 64), (1, 256), (1, 128), (1, 64), (1, 32), (1, 16), (1, 8)]),
        (16384, 100, [(163, 100), (2048, 8), (655, 25), (1, 100), (1, 64), (1, 32), (1, 16), (1, 8)]),
        (64, 512, [(1, 64), (8, 8), (4, 16), (1, 32), (1, 16), (1, 8)]),
        (8, 512, [(1, 8)]),
        (512, 4, [(128, 4), (1, 4)]),
    ],
)
def test_the_worst_batch_comes_first(budget: int, longest: int, expected: list[tuple[int, int]]) -> None:
    """The whole budget as long, short and medium texts, then one text of each power of two down."""
    assert shapes_for(budget, longest) == expected


@given(budget=st.integers(8, 1 << 16), longest=st.integers(1, 8192))
def test_no_shape_is_above_the_budget_or_asked_for_twice(budget: int, longest: int) -> None:
    """What is warmed can be computed, nothing is warmed twice, and the first fills the budget."""
    shapes = shapes_for(budget, longest)
    assert len(set(shapes)) == len(shapes)
    assert all(texts * tokens <= budget and tokens <= longest for texts, tokens in shapes)
    assert budget - shapes[0][0] * shapes[0][1] < shapes[0][1] == min(longest, budget)


def test_probes_have_the_tokens_they_are_asked_for(model: FakeModel) -> None:
    """A probe's words and its two specials are as many tokens as wanted, from three on."""
    sizes = [1, 2, 3, 8, 100, 256]
    lengths = [len(encoding) for encoding in model.tokenize([probe(size) for size in sizes], cut=Cut.RIGHT)]
    assert lengths == [3, 3, 3, 8, 100, 256]


# Until when


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([], False),
        ([1.0, 1.0, 1.0], False),
        ([1.0, 1.0, 1.0, 1.0], True),
        ([9.0, 1.0, 1.0, 1.0], False),
        ([9.0, 1.0, 1.0, 1.0, 1.0], True),
        ([1.0, 1.0, 1.0, 0.96], True),
        ([1.0, 1.0, 1.0, 0.95], False),
        ([1.0, 0.9, 1.0, 1.0], False),
        ([1.0, 1.6, 1.6, 1.6], False),
        ([1.0, 1.6, 1.5, 1.5], True),
        ([1.0, 9.0, 1.0, 1.0], True),
        ([1.0, 9.0, 9.0, 1.0], False),
    ],
)
def test_warm_is_a_plateau_at_the_best(seconds: list[float], *, expected: bool) -> None:
    """Three rounds in a row that do not improve the best by 5 %, their median within 1.5 times of it."""
    assert is_warm(seconds) is expected


def gpu_like(random_: random.Random, number: int) -> float:
    """Two and a half seconds of lazy loading, some allocation and tuning, then steady within 3 %."""
    lazy = (2.5, 0.4, 0.06)
    return STEADY * random_.gauss(1, 0.03) + (lazy[number] * random_.uniform(0.5, 1.5) if number < 3 else 0)


def slow_ramp(random_: random.Random, number: int) -> float:
    """A device whose clock rises: of what is too much, each pass leaves seven tenths."""
    return STEADY * (1 + 3 * 0.7**number) * random_.gauss(1, 0.02)


def one_late_pause(random_: random.Random, number: int) -> float:
    """Steady at once but for one pass that takes long, such as a recompilation in the second round."""
    return STEADY * random_.gauss(1, 0.03) * (20 if number in (0, 2) else 1)


def premature(
    rule: Callable[[Sequence[float]], bool], device: Callable[..., float], seeds: int = 400
) -> float:
    """Return the share of devices that the rule calls warm while passes still take 15 % too long."""
    early = 0
    for seed in range(seeds):
        random_, seconds = random.Random(seed), []
        while len(seconds) < 20 and not rule(seconds):
            seconds.append(device(random_, len(seconds)))
        early += len(seconds) < 20 and statistics.median(seconds[-MIN_ROUNDS:]) > 1.15 * STEADY
    return early / seeds


@pytest.mark.parametrize("device", [gpu_like, slow_ramp, one_late_pause])
def test_lazy_devices_are_not_called_warm_too_early(device: Callable[..., float]) -> None:
    """Of 400 simulated lazy devices of each kind at most 1 % are called warm while still slow."""
    assert premature(is_warm, device) <= 0.01


def test_a_fixed_number_of_rounds_would_be_too_early() -> None:
    """The same devices by the usual rule, three rounds and done: every one is still slow."""
    shares = [premature(lambda seconds: len(seconds) == 3, device) for device in (gpu_like, slow_ramp)]
    assert shares == [1.0, 1.0]


def test_warm_up_stops_when_it_is_warm_worst_first(model: FakeModel) -> None:
    """A lazy first pass, then a plateau: five rounds of each shape, in the order of the plan."""
    model.seconds = lambda number: 1.0 if number == 1 else STEADY
    assert model.warm() == WarmupResult(
        [
            ShapeTimes(texts, tokens, 5, pytest.approx(1.0), pytest.approx(STEADY), converged=True)
            for texts, tokens in shapes_for(512, 256)
        ],
        512,
    )
    assert runs(model.passes) == [(shape, 5) for shape in shapes_for(512, 256)]


def test_a_shape_that_does_not_settle_ends_with_its_rounds(model: FakeModel) -> None:
    """A device that is ever faster gets the most passes allowed, and is not said to have converged."""
    model.seconds = lambda number: 0.9**number
    result = model.warm(shapes=[(2, 16), (1, 8)], max_rounds=6)
    assert [(s.texts, s.tokens, s.rounds, s.converged) for s in result.shapes] == [
        (2, 16, 6, False),
        (1, 8, 6, False),
    ]
    assert result.shapes[0].steady_s == pytest.approx(0.9**5)


@pytest.mark.parametrize(("share", "rounds"), [(0.0001, 1), (1.5, 2), (9, 4)])
def test_each_shape_has_an_equal_share_of_the_budget(model: FakeModel, share: float, rounds: int) -> None:
    """Time is bounded, yet no shape is left altogether cold; what is not spent is not waited for."""
    result = model.warm(shapes=[(4, 16), (2, 16), (1, 16), (1, 8)], budget_s=4 * share * STEADY)
    assert [(s.texts, s.tokens, s.rounds, s.converged) for s in result.shapes] == [
        (4, 16, rounds, rounds == 4),
        (2, 16, rounds, rounds == 4),
        (1, 16, rounds, rounds == 4),
        (1, 8, rounds, rounds == 4),
    ]


def test_known_shapes_need_one_pass(model: FakeModel) -> None:
    """A respawn is warm when the first pass of a shape is what the slot's last worker measured."""
    known = [
        ShapeTimes(2, 16, 5, 1.0, STEADY, converged=True),
        ShapeTimes(1, 8, 5, 1.0, STEADY / 2, converged=True),
    ]
    result = model.warm(shapes=[(2, 16), (1, 16), (1, 8)], known=known)
    assert [(s.texts, s.tokens, s.rounds, s.converged) for s in result.shapes] == [
        (2, 16, 1, True),
        (1, 16, 4, True),
        (1, 8, 4, True),
    ]


def test_a_known_shape_that_is_slow_now_is_warmed_until_it_is_as_fast(model: FakeModel) -> None:
    """What was known is a goal, not an excuse: lazy passes go on until one is within 1.5 times of it."""
    model.seconds = lambda number: STEADY * (10, 4, 1.4, 1)[min(number, 4) - 1]
    known = [ShapeTimes(2, 16, 5, 1.0, STEADY, converged=True)]
    assert model.warm(shapes=[(2, 16)], known=known).shapes == [
        ShapeTimes(2, 16, 3, pytest.approx(10 * STEADY), STEADY, converged=True)
    ]


def test_the_steady_time_does_not_creep_up_over_generations(model: FakeModel) -> None:
    """Ten workers, each 1.4 times as slow at its one pass, leave the slot's best time as it was."""
    model.seconds = lambda number: STEADY * 1.4
    known = [ShapeTimes(2, 16, 5, 1.0, STEADY, converged=True)]
    for _ in range(10):
        known = model.warm(shapes=[(2, 16)], known=known).shapes
    assert (known[0].steady_s, known[0].rounds) == (STEADY, 1)


def test_progress_is_told_before_every_pass(model: FakeModel) -> None:
    """A person sees how far it is and which batch runs; at the end, all of it and nothing."""
    told: list[tuple[float, str]] = []
    model.warm(shapes=[(2, 16), (1, 8)], report=lambda done, doing: told.append((done, doing)))
    assert told == [
        *((0.0, f"batch 2x16, round {number}") for number in (1, 2, 3, 4)),
        *((0.5, f"batch 1x8, round {number}") for number in (1, 2, 3, 4)),
        (1.0, ""),
    ]


# What traffic taught


def test_learned_shapes_are_warmed_after_the_usual_ones(model: FakeModel) -> None:
    """The worst batch stays first, as it shows whether there is room; what traffic sends comes last."""
    result = model.warm(extra=[(5, 50), (3, 100)])
    expected = [*shapes_for(512, 256), (5, 50), (3, 100)]
    assert [(s.texts, s.tokens) for s in result.shapes] == expected
    assert runs(model.passes) == [(shape, 4) for shape in expected]


def test_a_shape_that_is_warmed_anyway_is_not_warmed_twice(model: FakeModel) -> None:
    """Neither one of the usual shapes, nor one that was learned twice."""
    model.warm(shapes=[(2, 16), (1, 8)], extra=[(1, 8), (3, 8), (3, 8)])
    assert [shape for shape, _ in runs(model.passes)] == [(2, 16), (1, 8), (3, 8)]


def test_learned_shapes_beyond_the_budget_are_left_out(model: FakeModel) -> None:
    """They are of a day when more was allowed: 512 tokens are taken, 513 are not."""
    result = model.warm(shapes=[(2, 16)], extra=[(3, 171), (4, 128), (27, 19)])
    assert [(s.texts, s.tokens) for s in result.shapes] == [(2, 16), (4, 128)]


def test_a_halved_budget_leaves_out_more_of_them(model: FakeModel) -> None:
    """Of 2048 tokens 512 have room: what exceeds that is not tried again, the rest is warmed."""
    model.room = 700
    result = model.warm(max_batch_tokens=2048, extra=[(8, 200), (5, 100), (5, 110)])
    assert result.max_batch_tokens == 512
    assert [(s.texts, s.tokens) for s in result.shapes] == [*shapes_for(512, 256), (5, 100)]
    assert (model.trims, (8, 200) in model.passes) == (2, False)


def test_a_learned_shape_without_room_halves_the_budget_too(model: FakeModel) -> None:
    """Traffic that did fit once and does not now is no reason to fail: less is served."""
    model.room = 1000
    assert max(texts * tokens for texts, tokens in shapes_for(1001, 256)) == 1000
    result = model.warm(max_batch_tokens=1001, extra=[(7, 143)])
    assert result.max_batch_tokens == 500
    assert [(s.texts, s.tokens) for s in result.shapes] == shapes_for(500, 256)


def test_every_pass_is_noted_as_it_is_made(model: FakeModel) -> None:
    """Of which shape, with all passes so far; at last with what the shape's times have come to."""
    noted: list[tuple[int, WarmedShape]] = []
    model.seconds = lambda number: STEADY * (4 if number == 1 else 1)
    result = model.warm(shapes=[(2, 16), (1, 8)], note=lambda place, shape: noted.append((place, shape)))
    for place, times in enumerate(result.shapes):
        mine = [shape for where, shape in noted if where == place]
        *under_way, last = mine
        assert [shape.rounds for shape in under_way] == list(range(1, times.rounds + 1))
        assert all(len(shape.passes) == shape.rounds and shape.steady_s is None for shape in under_way)
        assert all(shape.passes == last.passes[: shape.rounds] for shape in under_way)
        assert (
            ShapeTimes(
                last.texts, last.tokens, last.rounds, last.passes[0], last.steady_s or 0.0, last.converged
            )
            == times
        )
    assert [place for place, _ in noted] == sorted(place for place, _ in noted)


def test_a_halved_budget_begins_the_notes_again(model: FakeModel) -> None:
    """The first shape comes first again, and the shapes of the larger budget are no more."""
    model.room = 700
    noted: dict[int, WarmedShape] = {}
    result = model.warm(max_batch_tokens=1024, note=noted.__setitem__)
    assert [(shape.texts, shape.tokens) for shape in noted.values()] == [
        (shape.texts, shape.tokens) for shape in result.shapes
    ]


# What makes it fail

SPOILT: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "shape (1, 32) instead of (2, 32)": lambda vectors: vectors[:1],
    "shape (2, 16) instead of (2, 32)": lambda vectors: vectors[:, :16],
    "shape (64,) instead of (2, 32)": lambda vectors: vectors.ravel(),
    "values that are not finite": lambda vectors: vectors * np.float32([[1.0], [np.nan]]),
    "vectors that are not of unit length": lambda vectors: vectors * np.float32([[1.0], [1.1]]),
    "another vector for the same text than at the first pass": lambda vectors: (
        vectors * np.float32([[1], [-1]])
    ),
}


@pytest.mark.parametrize("problem", SPOILT)
@pytest.mark.parametrize("when", [1, 3])
def test_a_wrong_output_fails_the_warm_up(model: FakeModel, problem: str, when: int) -> None:
    """Rows, dimension, values, length and sameness are checked in every pass; the error names the flaw."""
    model.spoil = lambda vectors, number: SPOILT[problem](vectors) if number == when else vectors
    with pytest.raises(WarmupError) as caught:
        model.warm(shapes=[(2, 16)])
    assert (str(caught.value), len(model.passes)) == (f"warm-up output is wrong: {problem}", when)


def test_infinite_values_are_not_finite_either(model: FakeModel) -> None:
    """An overflow of half precision is caught, not only a NaN."""
    model.spoil = lambda vectors, number: vectors * np.float32(np.inf)
    with pytest.raises(WarmupError, match=r"values that are not finite$"):
        model.warm(shapes=[(2, 16)])


def test_vectors_of_any_length_pass_if_the_model_does_not_normalise(model: FakeModel) -> None:
    """Unit length is asked of models that promise it only."""
    model.normalized = False
    model.spoil = lambda vectors, number: vectors * np.float32(7)
    assert model.warm(shapes=[(2, 16)]).shapes[0].converged


def test_rounding_of_half_precision_passes(model: FakeModel) -> None:
    """Passes may differ in direction by what bfloat16 rounds off; their length is float32's."""

    def turned(vectors: Any, number: int) -> Any:
        other = vectors + np.roll(vectors, 1, axis=1) * np.float32(0.004 * (-1) ** number)
        return other / np.linalg.norm(other, axis=1, keepdims=True)

    model.spoil = turned
    assert model.warm(shapes=[(2, 16)]).shapes[0].converged


@pytest.mark.parametrize(
    ("room", "expected", "trims"), [(2048, 2048, 0), (2047, 1024, 1), (700, 512, 2), (256, 256, 3)]
)
def test_out_of_memory_halves_the_budget_until_it_fits(
    model: FakeModel, room: int, expected: int, trims: int
) -> None:
    """The worker serves what its device has room for; memory is given back before each new try."""
    model.room = room
    result = model.warm(max_batch_tokens=2048)
    assert (result.max_batch_tokens, model.trims) == (expected, trims)
    assert [(s.texts, s.tokens) for s in result.shapes] == shapes_for(expected, 256)


def test_a_budget_is_not_halved_below_the_longest_text(model: FakeModel) -> None:
    """Where that has no room the worker fails: cutting texts here would give other vectors than elsewhere."""
    model.room = model.max_tokens - 1
    with pytest.raises(WarmupError) as caught:
        model.warm()
    assert str(caught.value) == "no room for a batch of 256 tokens: 256 tokens"
    assert (model.passes, model.trims) == ([], 2)


@pytest.mark.parametrize("budget", [300, 1023, 4097])
def test_a_refused_budget_is_named_as_it_was_tried(model: FakeModel, budget: int) -> None:
    """The number in the message is one that was tried, also where halves are not whole."""
    model.room = 8
    with pytest.raises(WarmupError) as caught:
        model.warm(max_batch_tokens=budget)
    tried = budget
    while tried // 2 >= model.max_tokens:
        tried //= 2
    assert str(caught.value).startswith(f"no room for a batch of {tried} tokens: ")


def test_shapes_that_were_asked_for_are_never_made_smaller(model: FakeModel) -> None:
    """Who sets the shapes wants these: without room for them the warm-up fails at once."""
    model.room = 31
    with pytest.raises(WarmupError) as caught:
        model.warm(shapes=[(2, 16)])
    assert str(caught.value) == "no room for a batch of 512 tokens: 32 tokens"


def test_other_errors_pass_through(model: FakeModel) -> None:
    """A lost device is not a matter of room."""

    def lose(number: int) -> float:
        msg = "Xid 79"
        raise DeviceLostError(msg)

    model.seconds = lose
    with pytest.raises(DeviceLostError, match="Xid 79"):
        model.warm()
