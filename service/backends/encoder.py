# SPDX-License-Identifier: Apache-2.0
"""BERT-class encoders run straight from their weights, on packed batches: the same numbers, less Python.

    tokens ── embed ── [ attention ─ add & norm ─ feed forward ─ add & norm ] x layers ── token vectors

transformers spends two thirds of a short text's time between its modules (docs/decisions/0016). Here
query, key and value are one product, and on a CPU every product runs on weights that oneDNN has laid out
once, with the activation and the residual sum fused into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from service.backends.attention import attend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.backends.attention import Bounds

FAMILIES = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "mpnet"})
"""`model_type` of the architectures that are computed here: post-norm, GELU, learned positions."""
ROWS = 16
"""Tokens a pass that oneDNN lays the weights out for: fastest from one text (8) to a full batch (512)."""


class Product:
    """`x @ weight.T + bias`, with what follows it fused in where the CPU can."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Keep the weights, laid out for oneDNN if they are to stay on the CPU."""
        on_cpu = weight.device.type == "cpu" and weight.dtype is torch.float32
        self._weight, self._bias = weight, bias
        self._fused = _linear_pointwise() if on_cpu else None
        if self._fused:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)  # noqa: SLF001 - see below

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product."""
        if self._fused:
            product: torch.Tensor = self._fused(x, self._weight, self._bias, "none", [], None)
            return product
        return functional.linear(x, self._weight, self._bias)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """Return the exact GELU of the product."""
        if self._fused:
            product: torch.Tensor = self._fused(x, self._weight, self._bias, "gelu", [], "none")
            return product
        return functional.gelu(functional.linear(x, self._weight, self._bias))

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the product plus the residual."""
        if self._fused:
            total: torch.Tensor = self._fused.binary(x, residual, self._weight, self._bias, "add")
            return total
        return functional.linear(x, self._weight, self._bias) + residual


@cache
def _linear_pointwise() -> Any:  # noqa: ANN401 - an operator of torch's, found by name
    """Return what torch.compile fuses products into on a CPU, None where it is not there or does not work."""
    try:
        fused = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - see above
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16), ROWS)  # noqa: SLF001 - likewise
        fused(torch.zeros(1, 16), weight, torch.zeros(16), "gelu", [], "none")
    except (AttributeError, RuntimeError):  # another build or processor
        return None
    return fused


@dataclass(frozen=True)
class Norm:
    """Layer normalisation."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    @classmethod
    def of(cls, module: torch.nn.LayerNorm) -> Norm:
        """Take a module's weights."""
        return cls(module.weight.detach(), module.bias.detach(), module.eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return each row with mean 0 and variance 1, scaled and shifted."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Layer:
    """One layer's products and norms."""

    qkv: Product
    out: Product
    attention_norm: Norm
    up: Product
    down: Product
    norm: Norm


class Encoder:
    """The encoder of one model of `FAMILIES`."""

    def __init__(self, model: Any, *, first_position: int) -> None:  # noqa: ANN401 - transformers' models are untyped
        """Take over the weights of a loaded transformers model, on the device where they are.

        Args:
            model: of a class of transformers.
            first_position: row of the position table for the first token of a text.

        Raises:
            ValueError: the model is not of a family, or not in the form, that is computed here.
        """
        config = model.config
        if config.model_type not in FAMILIES or config.hidden_act != "gelu":
            msg = f"{config.model_type} with {config.hidden_act} is not computed here"
            raise ValueError(msg)
        if getattr(config, "is_decoder", False) or getattr(
            config, "position_embedding_type", "absolute"
        ) not in (
            None,
            "absolute",
        ):
            msg = "only encoders with absolute positions are computed here"
            raise ValueError(msg)
        embeddings = model.embeddings
        self._heads = config.num_attention_heads
        self._words = embeddings.word_embeddings.weight.detach()
        self._positions = embeddings.position_embeddings.weight.detach()
        types = getattr(embeddings, "token_type_embeddings", None)
        self._type = None if types is None else types.weight[0].detach()
        self._norm = Norm.of(embeddings.LayerNorm)
        self._first_position = first_position
        self._layers = [_layer(module) for module in model.encoder.layer]
        self._bias = _RelativeBias(model.encoder) if config.model_type == "mpnet" else None

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Return the vector of each token, shape (tokens, hidden).

        Args:
            ids: token ids, shape (tokens,).
            positions: the place of each token in its text, from 0.
            bounds: where the texts lie.
        """
        x = self._words[ids] + self._positions[positions + self._first_position]
        if self._type is not None:
            x += self._type
        x = self._norm(x)
        for layer in self._layers:
            query, key, value = layer.qkv(x).view(len(ids), 3, self._heads, -1).unbind(1)
            attended = attend(query, key, value, bounds, bias=self._bias).view(len(ids), -1)
            x = layer.attention_norm(layer.out.plus(attended, x))
            x = layer.norm(layer.down.plus(layer.up.gelu(x), x))
        return x


class _RelativeBias:
    """MPNet's: what is added to a score depends on how far apart two tokens are."""

    def __init__(self, encoder: Any) -> None:  # noqa: ANN401 - an untyped module of transformers
        # Not the encoder: its layers shall not stay in memory for this.
        self._parts = SimpleNamespace(
            relative_attention_bias=encoder.relative_attention_bias,
            relative_position_bucket=encoder.relative_position_bucket,
        )
        self._compute = type(encoder).compute_position_bias
        self._known = torch.empty(0, 0, 0)

    def __call__(self, length: int) -> torch.Tensor:
        """Return the biases for a length, shape (heads, length, length)."""
        if self._known.shape[-1] < length:
            size = 1 << (length - 1).bit_length()
            weight = self._parts.relative_attention_bias.weight
            self._known = self._compute(self._parts, weight.new_empty(1, size, 0))[0].detach()
        return self._known[:, :length, :length]


def _layer(module: Any) -> Layer:  # noqa: ANN401 - an untyped module of transformers
    attention = module.attention
    if hasattr(attention, "attn"):  # MPNet
        parts, out, norm = attention.attn, attention.attn.o, attention.LayerNorm
        qkv = (parts.q, parts.k, parts.v)
    else:
        parts, out, norm = attention.self, attention.output.dense, attention.output.LayerNorm
        qkv = (parts.query, parts.key, parts.value)
    return Layer(
        _product(qkv),
        _product([out]),
        Norm.of(norm),
        _product([module.intermediate.dense]),
        _product([module.output.dense]),
        Norm.of(module.output.LayerNorm),
    )


def _product(linears: Sequence[torch.nn.Linear]) -> Product:
    """Return the products of some modules as one; of a single module, without a copy of its weights."""
    weights = [linear.weight.detach() for linear in linears]
    biases = [linear.bias.detach() for linear in linears]
    return Product(torch.cat(weights), torch.cat(biases)) if linears[1:] else Product(weights[0], biases[0])
