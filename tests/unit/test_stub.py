# SPDX-License-Identifier: Apache-2.0
"""The stub backend: what it promises as a backend, and faults that strike where they are told to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from service.backends.base import PROBE_WORD, Cut, Encoding, forward
from service.backends.stub import Fault, StubBackend, read_scenario
from service.errors import ModelError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from service.settings import Settings

    Load = Callable[[str], StubBackend]


@pytest.fixture
def stub(stub_settings: Settings) -> StubBackend:
    return StubBackend(stub_settings)


@pytest.fixture
def load(stub_settings: Settings, tmp_path: Path) -> Load:
    """Return a maker of loaded backends with the faults of a scenario."""

    def make(scenario: str) -> StubBackend:
        file = tmp_path / "scenario.toml"
        file.write_text(scenario)
        backend = StubBackend(
            stub_settings.model_copy(update={"stub_scenario": str(file), "stub_load_ms": 0})
        )
        backend.load()
        return backend

    return make


def compute(backend: StubBackend, *texts: Any, **options: Any) -> NDArray[np.float32]:
    encodings = backend.tokenize(list(texts), cut=Cut.RIGHT)
    return forward(backend, backend.collate(encodings, **options))


def test_the_same_text_always_gives_the_same_unit_vector(stub: StubBackend) -> None:
    """Whatever it shares a batch with; another text gives another one."""
    vectors = compute(stub, "a b", "c", "a b")
    assert (vectors.shape, vectors.dtype) == ((3, stub.dimension), np.float32)
    np.testing.assert_array_equal(vectors[[0, 2]], np.concatenate([compute(stub, "a b")] * 2))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert not np.allclose(vectors[0], vectors[1])


def test_token_vectors_are_those_of_the_tokens_one_after_another(stub: StubBackend) -> None:
    """A row for each token of each text, specials included."""
    rows = compute(stub, "a b", "b", token_vectors=True)
    assert rows.shape == (4 + 3, stub.dimension)
    np.testing.assert_array_equal(rows[2], rows[5])


def test_inputs_may_be_texts_pairs_or_token_ids(stub: StubBackend) -> None:
    """Every id is in the vocabulary; the specials are put around token ids too."""
    text, pair, ids = stub.tokenize(["a b", ("a", "b"), [7, 8]], cut=Cut.RIGHT)
    assert (text, list(ids.ids)) == (pair, [0, 7, 8, 1])
    words = stub.tokenize([f"word{number}" for number in range(999)], cut=Cut.RIGHT)
    assert all(2 <= encoding.ids[1] < stub.vocabulary for encoding in words)


def test_a_prompt_is_put_before_each_text(stub: StubBackend) -> None:
    """As a model would read it."""
    assert stub.tokenize(["a"], cut=Cut.RIGHT, prompt="q: ") == stub.tokenize(["q: a"], cut=Cut.RIGHT)


def test_a_long_text_is_cut_as_told(stub: StubBackend) -> None:
    """At the end, at the beginning, or not at all."""
    ids = list(range(2, 250)) + list(range(2, 50))
    [right], [left], [whole] = (stub.tokenize([ids], cut=cut) for cut in Cut)
    room = stub.max_tokens - 2
    assert (right.ids, left.ids) == ([0, *ids[:room], 1], [0, *ids[-room:], 1])
    assert len(whole) == len(ids) + 2


def test_tokens_say_where_they_come_from(stub: StubBackend) -> None:
    """A token's text is found at its place; specials only if asked for."""
    [tokens] = stub.tokens(["two  words"], specials=True, prompt="q: ")
    assert [(t.text, t.special) for t in tokens if t.special] == [("[", True), ("]", True)]
    assert ["q: two  words"[t.start : t.end] for t in tokens if not t.special] == ["q:", "two", "words"]
    [bare] = stub.tokens(["two  words"], specials=False)
    assert [t.id for t in bare] == list(stub.tokenize(["two words"], cut=Cut.RIGHT)[0].ids[1:-1])


def test_decoding_may_leave_the_specials_out(stub: StubBackend) -> None:
    """The words are lost, the ids are not."""
    assert stub.decode([[0, 7, 1], []], skip_specials=False) == ["w0 w7 w1", ""]
    assert stub.decode([[0, 7, 1]], skip_specials=True) == ["w7"]


def test_a_foreign_batch_is_refused(stub: StubBackend) -> None:
    """A mix-up in a test shows where it happens."""
    with pytest.raises(TypeError, match="not a batch of this backend: str"):
        stub.launch("a batch")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("conditions", "strikes"),
    [
        ("", {(0, 1, "a"), (0, 2, "a"), (1, 1, "a"), (0, 1, "boom"), (0, 1, "a a a")}),
        ("slots = [1]", {(1, 1, "a")}),
        ("generations = [2]", {(0, 2, "a")}),
        ('text = "boom"', {(0, 1, "boom")}),
        ("max_tokens = 4", {(0, 1, "a a a")}),
    ],
)
def test_a_fault_strikes_where_it_is_told_to(load: Load, conditions: str, strikes: set[Any]) -> None:
    """By slot, generation, word or size of the batch; without a condition everywhere."""
    backend = load(f'[[fault]]\nstage = "forward"\nkind = "oom"\n{conditions}')
    struck = set()
    for slot, generation, text in [(0, 1, "a"), (0, 2, "a"), (1, 1, "a"), (0, 1, "boom"), (0, 1, "a a a")]:
        backend.forked(slot, generation)
        try:
            compute(backend, text)
        except OutOfMemoryError as error:
            assert str(error) == "scripted out of memory in forward"  # noqa: PT017 - not every pass raises
            struck.add((slot, generation, text))
    assert struck == strikes


def test_warm_up_and_traffic_have_faults_of_their_own(load: Load) -> None:
    """The probe's passes are warm-up's, wherever they come from."""
    backend = load('[[fault]]\nstage = "warm"\nkind = "error"')
    compute(backend, "traffic")
    with pytest.raises(ModelError, match="scripted error in warm"):
        compute(backend, f"{PROBE_WORD} {PROBE_WORD}")


def test_a_wrong_batch_gives_no_numbers(load: Load) -> None:
    """All of it: a real model's NaN spreads, too."""
    backend = load('[[fault]]\nstage = "forward"\nkind = "wrong"\ntext = "poison"')
    assert np.isnan(compute(backend, "poison", "b")).all()
    assert np.isfinite(compute(backend, "b")).all()


def test_a_load_may_fail(load: Load) -> None:
    """The fault of the stage comes before anything else of it."""
    with pytest.raises(ModelError, match="scripted error in load"):
        load('[[fault]]\nstage = "load"\nkind = "error"')


def test_without_a_scenario_there_are_no_faults() -> None:
    """Nor with an empty name."""
    assert read_scenario(None) == read_scenario("") == ()


def test_a_scenario_is_read_whole(tmp_path: Path) -> None:
    """Every field of a fault has its place in the file."""
    file = tmp_path / "scenario.toml"
    file.write_text(
        '[[fault]]\nstage = "forward"\nkind = "slow"\nslots = [0, 2]\ngenerations = [1]\n'
        'seconds = 0.5\ntext = "boom"\nmax_tokens = 256\n'
    )
    assert read_scenario(str(file)) == (Fault("forward", "slow", (0, 2), (1,), 0.5, "boom", 256),)


@pytest.mark.parametrize(
    "content", ["", "[[fault", '[[fault]]\nstage = "load"', '[[fault]]\nstage = 1\nkind = "slow"']
)
def test_a_scenario_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    """A test with a typing error must not pass for want of faults."""
    file = tmp_path / "scenario.toml"
    file.write_text(content)
    with pytest.raises(ModelError, match=f"cannot read the scenario {file}"):
        read_scenario(str(file))
    with pytest.raises(ModelError, match="cannot read the scenario /nowhere"):
        read_scenario("/nowhere")


def test_an_encoding_is_as_long_as_its_ids() -> None:
    """What the batcher counts."""
    assert len(Encoding([0, 5, 1])) == 3
