# SPDX-License-Identifier: Apache-2.0
"""Models of every architecture, made on the spot: seeded random weights, two or three layers, 300 words."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_TOKENS = 64
VOCABULARY = 300
HIDDEN = 32
WORDS = [
    "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=2 + number % 7))
    for number in range(150)
]


def texts(count: int = 60) -> list[str]:
    """Return texts of mixed lengths: one token, equal lengths, the maximum and far beyond; odd characters."""
    rng = random.Random(7)
    lengths = [1, 1, 1, 2, 5, 5, 5, 30, 40, 200, 200, 1000, *(rng.randint(1, 60) for _ in range(count - 16))]
    found = [" ".join(rng.choices(WORDS, k=length)) for length in lengths]
    found += ["Zürich 東京 🚢", "  spaces \t and\nlines  ", "a" * 300, "!"]
    rng.shuffle(found)
    return found


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer as BERT, RoBERTa, XLM-R or a decoder has it, or with a suffix alone, or `bare`."""
    corpus = [" ".join(WORDS), " ".join(reversed(WORDS))]
    cls, sep, pad, unk, mask = (
        ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
        if kind == "bert"
        else ("<s>", "</s>", "<pad>", "<unk>", "<mask>")
    )
    specials = [pad, unk, cls, sep, mask] if kind == "bert" else [cls, pad, sep, unk, mask]
    trained: dict[str, Any] = {"vocab_size": VOCABULARY, "special_tokens": specials, "show_progress": False}
    if kind == "bert":
        rust = Tokenizer(models.WordPiece(unk_token=unk))
        rust.normalizer = normalizers.BertNormalizer()
        rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(**trained)
    elif kind in {"roberta", "decoder"}:
        rust = Tokenizer(models.BPE())
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained["vocab_size"] += 100
        trainer = trainers.BpeTrainer(**trained, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        rust = Tokenizer(models.Unigram())
        rust.normalizer = normalizers.NFKC()
        rust.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(**trained, unk_token=unk)
    rust.train_from_iterator(corpus, trainer)
    ids = {token: rust.token_to_id(token) for token in specials}
    if kind == "bert":
        single, pair = f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1"
    elif kind in {"suffix", "decoder"}:
        single, pair = f"$A {sep}", f"$A {sep} $B {sep}"
    else:
        single, pair = f"{cls} $A {sep}", f"{cls} $A {sep} {sep} $B {sep}"
    if kind != "bare":
        rust.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(cls, ids[cls]), (sep, ids[sep])]
        )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        model_max_length=MAX_TOKENS,
        model_input_names=names if kind == "bert" else [names[0], names[2]],
        padding_side="left" if kind == "decoder" else "right",
        **dict(
            zip(
                ("cls_token", "sep_token", "pad_token", "unk_token", "mask_token"),
                (cls, sep, pad, unk, mask),
                strict=True,
            )
        ),
    )


def _config(architecture: str, tokens: PreTrainedTokenizerFast, **extra: Any) -> Any:
    """Return a small configuration; what an architecture calls otherwise is listed below."""
    shape: dict[str, Any] = {
        "vocab_size": len(tokens),
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "pad_token_id": tokens.pad_token_id,
        "max_position_embeddings": MAX_TOKENS + 2,
        "initializer_range": 0.2,  # vectors as unlike as those of a trained model
    }
    own: dict[str, dict[str, Any]] = {
        "modernbert": {
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "sep_token_id": 2,
            "initializer_cutoff_factor": 2.0,
        },
        "distilbert": {"dim": HIDDEN, "n_layers": 3, "n_heads": 4, "hidden_dim": 64},
        "t5": {"d_model": HIDDEN, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64},
        "qwen2": {"num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 2},
        "llama": {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2},
    }
    return transformers.AutoConfig.for_model(architecture, **shape | own.get(architecture, {}) | extra)


KINDS = {
    "bert": "bert",
    "distilbert": "bert",
    "electra": "bert",
    "mpnet": "roberta",
    "roberta": "roberta",
    "xlm-roberta": "xlm-roberta",
    "modernbert": "roberta",
    "qwen2": "decoder",
    "llama": "decoder",
    "t5": "suffix",
}
AUTO = {
    "embedding": transformers.AutoModel,
    "splade": transformers.AutoModelForMaskedLM,
    "scores": transformers.AutoModelForSequenceClassification,
}


def weights(folder: Path, architecture: str, task: str = "embedding", **extra: Any) -> Path:
    """Save a random transformers model and its tokenizer."""
    torch.manual_seed(0)
    tokens = tokenizer(KINDS[architecture])
    model = AUTO[task].from_config(_config(architecture, tokens, **extra))
    if architecture == "t5":
        model = transformers.T5EncoderModel(model.config)
    for module in model.modules():  # a fresh bias is 0 and would hide that it is left out
        if getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias, std=0.1)
    for name, table in model.named_parameters():  # nor is the padding token's row 0 for long in training
        if "embeddings" in name and table.ndim == 2:
            torch.nn.init.normal_(table, std=0.5)
    model.eval().save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def embedding(
    folder: Path,
    architecture: str = "bert",
    *,
    pooling: str = "mean",
    include_prompt: bool = True,
    dense: bool = False,
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
    default_prompt: str | None = None,
    truncate_dim: int | None = None,
    **extra: Any,
) -> Path:
    """Save a sentence-transformers model and return its folder."""
    transformer = Transformer(str(weights(folder / "weights", architecture, **extra)))
    modules: list[torch.nn.Module] = [
        transformer,
        Pooling(HIDDEN, pooling_mode=pooling, include_prompt=include_prompt),
    ]
    if dense:
        modules.append(Dense(HIDDEN, 24))
    if normalize:
        modules.append(Normalize())
    SentenceTransformer(
        modules=modules,
        device="cpu",
        prompts=prompts,
        default_prompt_name=default_prompt,
        truncate_dim=truncate_dim,
    ).save(str(folder / "model"))
    return folder / "model"


def sparse(folder: Path, *, max_active_dims: int | None = None) -> Path:
    """Save a SPLADE model and return its folder."""
    transformer = Transformer(
        str(weights(folder / "weights", "bert", "splade")), transformer_task="fill-mask"
    )
    modules = [transformer, SpladePooling()]
    SparseEncoder(modules=modules, device="cpu", max_active_dims=max_active_dims).save(str(folder / "model"))
    return folder / "model"


def scores(folder: Path, architecture: str = "bert", *, labels: Sequence[str]) -> Path:
    """Save a cross-encoder and return its folder."""
    names = dict(enumerate(labels))
    weights(folder / "weights", architecture, "scores", num_labels=len(labels), id2label=names)
    CrossEncoder(str(folder / "weights"), device="cpu").save(str(folder / "model"))
    return folder / "model"
