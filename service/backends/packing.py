# SPDX-License-Identifier: Apache-2.0
"""Three ways to compute a batch of texts, the fastest first; the first that agrees with padding is used.

    encoder    no padding, by service.backends.encoder: BERT's relatives
    attention  no padding, by transformers' own modules around our attention: every encoder that lets
               its attention be replaced
    padded     what the model's own `encode` does

A self-test at boot compares each with padded batches on texts of several lengths.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from service.backends.attention import Bounds, attend
from service.backends.encoder import Encoder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from service.backends.base import Encoding

# No "flash" in the name: transformers would look for the flash-attn package, then for a kernel on the hub.
ATTENTION = "warmfleet_packed"
TASKS = ("feature-extraction", "fill-mask")
"""Tasks whose head treats tokens one by one; a classifier's reads certain positions of a padded batch."""
TOLERANCE = 1e-5
"""Of the largest value; sums in another order differ by about 2e-7."""
MIN_COSINE = 0.999
"""In half precision."""


@dataclass(frozen=True)
class Collated:
    """A batch as tensors.

    Attributes:
        features: what the model's modules expect.
        order: for each text of the batch, its place in the request's order.
        lengths: tokens of each text of the batch.
        computed: tokens that a pass computes.
    """

    features: dict[str, Any]
    order: Sequence[int]
    lengths: Sequence[int]
    computed: int


def pack(encodings: Sequence[Encoding], *, filler: int | None = None, pinned: bool = False) -> Collated:
    """Concatenate encodings, equal lengths together, as tensors of shape (1, tokens) in host memory.

    Args:
        encodings: the texts; not pairs.
        filler: the id of the padding token, where positions are counted without it.
        pinned: whether to use memory from which a GPU copies by itself.
    """
    order = sorted(range(len(encodings)), key=lambda i: len(encodings[i]))
    texts = [encodings[i] for i in order]
    lengths = [len(text) for text in texts]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=pinned)
    rows = {
        "input_ids": [token for text in texts for token in text.ids],
        "position_ids": [place for text in texts for place in _places(text.ids, filler)],
        "seq_idx": [i for i, length in enumerate(lengths) for _ in range(length)],
    }
    features: dict[str, Any] = {name: torch.tensor([row], pin_memory=pinned) for name, row in rows.items()}
    features |= {"cu_seq_lens_q": starts, "modality": "text"}
    return Collated(features | _prompt(texts), order, lengths, sum(lengths))


def _places(ids: Sequence[int], filler: int | None) -> Iterable[int]:
    """Return the place of each token in its text.

    RoBERTa's family counts no padding token, not even one that is written in the text: all are at -1.
    """
    if filler is None or filler not in ids:
        return range(len(ids))
    counts = accumulate(token != filler for token in ids)
    return [-1 if token == filler else count - 1 for token, count in zip(ids, counts, strict=True)]


def first_position(model: Any) -> int:  # noqa: ANN401 - any of sentence-transformers' models
    """Return the position of a text's first token: RoBERTa's family counts from behind the padding token."""
    found: int = getattr(model[0], "_infer_flatten_position_offset", int)()  # int(): 0, of other modules
    return found


def pad(encodings: Sequence[Encoding], tokenizer: Any, *, pinned: bool = False) -> Collated:  # noqa: ANN401 - untyped
    """Pad encodings to the longest, as tensors of shape (texts, longest) in host memory, like `encode`."""
    lengths = [len(encoding) for encoding in encodings]
    shape = (len(lengths), max(lengths))
    left = tokenizer.padding_side == "left"
    rows: dict[str, tuple[int, list[Sequence[int]]]] = {
        "input_ids": (tokenizer.pad_token_id or 0, [e.ids for e in encodings]),
        "attention_mask": (0, [[1] * length for length in lengths]),
    }
    if "token_type_ids" in tokenizer.model_input_names:
        rows["token_type_ids"] = (tokenizer.pad_token_type_id, [e.types or [0] * len(e) for e in encodings])
    features: dict[str, Any] = {"modality": "text"}
    for name, (filler, values) in rows.items():
        fill = ([filler] * (shape[1] - length) for length in lengths)
        whole = [[*f, *row] if left else [*row, *f] for f, row in zip(fill, values, strict=True)]
        features[name] = torch.tensor(whole, pin_memory=pinned)
    return Collated(features | _prompt(encodings), range(shape[0]), lengths, shape[0] * shape[1])


def _prompt(texts: Sequence[Encoding]) -> dict[str, int]:
    """Return how many tokens the pooling shall leave out; the texts of a batch have one prompt."""
    return {"prompt_length": texts[0].prompt_tokens} if texts[0].prompt_tokens else {}


class _Packed:
    """The bounds of the packed batch that is being computed; the model thread's alone."""

    bounds: Bounds | None = None


@contextmanager
def _packed(model: Any, bounds: Bounds) -> Iterator[None]:  # noqa: ANN401 - untyped
    """Let a transformers model use our attention for one packed batch; padded ones keep the model's own."""
    config = model.config
    own = config._attn_implementation  # noqa: SLF001 - the setter of the public method, without its checks
    config._attn_implementation, _Packed.bounds = ATTENTION, bounds  # noqa: SLF001 - likewise
    try:
        yield
    finally:
        config._attn_implementation, _Packed.bounds = own, None  # noqa: SLF001 - likewise


def _no_mask(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - in transformers' signature
    """A packed batch needs no mask, and one over all its tokens could fill the device."""


def _attention(
    module: Any,  # noqa: ANN401 - in transformers' signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,  # noqa: ANN401 - in transformers' signature
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,  # noqa: ANN401 - in transformers' signature
) -> tuple[torch.Tensor, None]:
    """Attend in transformers' signature: (1, heads, tokens, size) in, (1, tokens, heads, size) out."""
    del args
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    biased = attention_mask is not None or kwargs.get("position_bias") is not None
    if _Packed.bounds is None or causal or biased or key.shape != query.shape:
        msg = "only plain attention of each token to all of its text is computed packed"
        raise NotImplementedError(msg)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    # transformers counts the token itself, flash-attention's way
    window = None if sliding_window is None else sliding_window - 1
    return attend(q, k, v, _Packed.bounds, scale=scaling, window=window)[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


class EncoderRoute:
    """Token vectors by our own encoder, the rest of the pipeline by its modules."""

    name = "encoder"
    padded = False

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - any of sentence-transformers' models
        """Take over the weights, where they are now.

        Raises:
            ValueError: the architecture is not computed here.
        """
        transformer = model[0]
        if getattr(transformer, "transformer_task", None) != "feature-extraction":
            msg = f"{type(transformer).__name__} is not computed here"
            raise ValueError(msg)
        first = first_position(model)
        self._encode = Encoder(transformer.model, first_position=first)
        self._filler = first - 1 if first else None
        self._output = transformer.module_output_name

    def collate(self, encodings: Sequence[Encoding], *, pinned: bool) -> Collated:
        """Pack."""
        return pack(encodings, filler=self._filler, pinned=pinned)

    def __call__(self, features: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
        """Add the token vectors, shape (1, tokens, hidden)."""
        bounds = Bounds(lengths, features["cu_seq_lens_q"])
        vectors = self._encode(features["input_ids"][0], features["position_ids"][0], bounds)
        features[self._output] = vectors[None]
        return features


class AttentionRoute:
    """Token vectors by transformers' modules, with our attention between them."""

    name = "attention"
    padded = False

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - any of sentence-transformers' models
        """Use the model as it is.

        Raises:
            ValueError: the architecture does not let its attention be replaced.
        """
        transformer = model[0]
        task = getattr(transformer, "transformer_task", None)
        if task not in TASKS or not transformer.model.is_backend_compatible():
            msg = f"the {task} model does not let its attention be replaced"
            raise ValueError(msg)
        self._transformer = transformer
        self._first_position = first = first_position(model)
        self._filler = first - 1 if first else None

    def collate(self, encodings: Sequence[Encoding], *, pinned: bool) -> Collated:
        """Pack."""
        return pack(encodings, filler=self._filler, pinned=pinned)

    def __call__(self, features: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
        """Add the token vectors, shape (1, tokens, hidden)."""
        transformer = self._transformer
        taken = {
            "input_ids": features["input_ids"],
            "position_ids": features["position_ids"] + self._first_position,
            "modality": "text",
        }
        with _packed(transformer.model, Bounds(lengths, features["cu_seq_lens_q"])):
            output: dict[str, Any] = transformer.forward(taken)
        return features | output


class PaddedRoute:
    """The model's own first module on padded batches: works for every model."""

    name = "padded"
    padded = True

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - any of sentence-transformers' models
        """Use the model as it is."""
        self._model = model

    def collate(self, encodings: Sequence[Encoding], *, pinned: bool) -> Collated:
        """Pad."""
        return pad(encodings, self._model.tokenizer, pinned=pinned)

    def __call__(self, features: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
        """Add what the first module gives, shape (texts, longest, hidden)."""
        del lengths
        added: dict[str, Any] = self._model[0](features)
        return added


Route = EncoderRoute | AttentionRoute | PaddedRoute
PACKED: tuple[type[EncoderRoute | AttentionRoute], ...] = (EncoderRoute, AttentionRoute)


def agree(packed: torch.Tensor, padded: torch.Tensor) -> bool:
    """Say whether two ways give the same rows: to rounding in float32, in direction in half precision."""
    if not bool(torch.isfinite(packed).all()) or packed.shape != padded.shape:
        return False
    if packed.dtype is torch.float32:
        return bool((packed - padded).abs().max() <= TOLERANCE * max(1.0, float(padded.abs().max())))
    cosines = torch.cosine_similarity(packed.float(), padded.float(), dim=-1)
    return bool((cosines >= MIN_COSINE).all())
