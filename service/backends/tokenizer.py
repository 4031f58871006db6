# SPDX-License-Identifier: Apache-2.0
"""Texts to token ids by the Rust tokenizer alone: no padding, no GIL, no wrapper. Worker, any thread."""

from __future__ import annotations

import re
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

from service.backends.base import Cut, Encoding, Input, Token

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Encoding as RustEncoding
    from tokenizers import Tokenizer as RustTokenizer

CHARACTERS_A_TOKEN = 16
"""Prose has about 5: a beginning of so many characters for each token nearly always fills the window."""
LONG_WORD = 4096
"""How far to look for the end of a word: the search holds the GIL."""
SPLITS_AT_SPACES = re.compile(
    r"BertPreTokenizer|WhitespaceSplit|Whitespace\(|Metaspace\([^)]*split=True|ByteLevel\([^)]*use_regex=True"
)
"""Pre-tokenizers after which the tokens of a word do not depend on the words around it."""
WORD_END, WORD_START = r"(?<=\S) ", r" (?=\S)"
"""Only the plain space: some normalizers drop other white space, and join the words around it."""
ALSO_SPLITS = {
    r"BertNormalizer\([^()]*chinese_chars=True[^()]*\) BertPreTokenizer\(\)": "(?=[一-龥,.;!?+/=、。])",
    r"(None|NFC\(\)) ByteLevel\([^()]*\)": "(?<=[A-Za-z0-9ぁ-ゖァ-ヺ一-龥])(?=[,.;!?+/=、。])",
}
"""Where else words begin, by normalizer and pre-tokenizer: Chinese, Japanese and base64 have no spaces.

Nothing for Metaspace: the best pieces of a sentence without spaces depend on its end, so it is taken whole.
"""


class Tokenizer:
    """One model's tokenizer, for several threads at once: nothing is changed once it is in use.

    transformers' wrapper costs two to seven times as much, and sets padding and truncation on the shared
    Rust object at every call. Here the Rust object gives bare ids; cutting, and the special tokens around
    them, are list slices.
    """

    def __init__(self, rust: RustTokenizer) -> None:
        """Take over the Rust object: nobody else may use it. May run before the fork."""
        rust.no_padding()
        rust.no_truncation()
        self._rust = rust
        example = rust.encode("a")
        text = [place for place, special in enumerate(example.special_tokens_mask) if not special]
        self._head, self._tail = example.ids[: text[0]], example.ids[text[-1] + 1 :]
        self._pair = _layout(rust.encode("a", "a"))
        self._boundaries = _boundaries(rust)

    def encode(
        self,
        inputs: Sequence[Input],
        *,
        cut: Cut,
        max_tokens: int,
        prompt: str = "",
        mark_prompt: bool = False,
    ) -> list[Encoding]:
        """Return the token ids of each input; see `Backend.tokenize`.

        With `mark_prompt` the encodings tell how many of their tokens are the prompt's.
        """
        if len(set(map(type, inputs))) > 1:  # one request may mix texts, pairs and token ids
            options: dict[str, Any] = {"cut": cut, "max_tokens": max_tokens, "prompt": prompt}
            single = (self.encode([one], **options, mark_prompt=mark_prompt) for one in inputs)
            return [encoding for (encoding,) in single]
        if isinstance(inputs[0], tuple):
            return self._pairs(cast("Sequence[tuple[str, str]]", inputs), cut, max_tokens, prompt)
        room = max(0, max_tokens - len(self._head) - len(self._tail))
        prompt_tokens = None
        if isinstance(inputs[0], str):
            texts = [prompt + text for text in cast("Sequence[str]", inputs)]
            if prompt and mark_prompt:
                prompt_tokens = len(self._rust.encode(prompt, add_special_tokens=False))
            # On the left the prompt's number on top: either all of it is cut off then, or the cut is known.
            rows = self._bare(texts, room + (prompt_tokens or 0) * (cut is Cut.LEFT), cut)
        else:  # no prompt is put before token ids
            rows = [self._without_specials(ids) for ids in cast("Sequence[list[int]]", inputs)]
        found = []
        for row in rows:
            kept, marked = _keep(row, cut, room), 0
            if prompt_tokens is not None:
                lost = len(row) - len(kept) if cut is Cut.LEFT else 0
                marked = len(self._head) + min(room, max(0, prompt_tokens - lost))
            found.append(Encoding([*self._head, *kept, *self._tail], None, marked))
        return found

    def tokens(self, texts: Sequence[str], *, specials: bool, prompt: str = "") -> list[list[Token]]:
        """Return the tokens of each text; see `Backend.tokens`."""
        prompted = [prompt + text for text in texts]
        encodings = self._rust.encode_batch(prompted, add_special_tokens=specials)
        return [list(_tokens(*pair)) for pair in zip(prompted, encodings, strict=True)]

    def decode(self, ids: Sequence[Sequence[int]], *, skip_specials: bool) -> list[str]:
        """Return the text behind each list of token ids."""
        return self._rust.decode_batch([list(row) for row in ids], skip_special_tokens=skip_specials)

    def _bare(self, texts: Sequence[str], enough: int, cut: Cut) -> list[list[int]]:
        """Return bare ids; of a text with more than `enough`, maybe only those at the end that stays."""
        window = CHARACTERS_A_TOKEN * max(1, enough)
        if self._boundaries is None or max(map(len, texts)) <= window:
            return self._whole(texts)
        ends, starts = self._boundaries
        if cut is Cut.LEFT:
            return [self._ending(text, starts, enough, window) for text in texts]
        return [self._beginning(text, ends, enough, window) for text in texts]

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._rust.encode_batch_fast(texts, add_special_tokens=False)]

    def _beginning(self, text: str, ends: re.Pattern[str], enough: int, window: int) -> list[int]:
        """Tokenise no more of a text than fills the model's window: two megabytes would take a second."""
        while len(text) > window:
            if end := ends.search(text, window, window + LONG_WORD):
                found = self._rust.encode(text[: end.start()], add_special_tokens=False)
                if len(found) > enough:
                    return found.ids
            window *= 4
        return self._whole([text])[0]

    def _ending(self, text: str, starts: re.Pattern[str], enough: int, window: int) -> list[int]:
        """Do the same from the end; its first word does not count: it may get or lose a space before it."""
        while len(text) > window:
            if start := starts.search(text, len(text) - window, len(text) - window + LONG_WORD):
                found = self._rust.encode(text[start.start() :], add_special_tokens=False)
                words = found.word_ids
                if len(words) > enough and words[-enough - 1] != words[0]:
                    return found.ids
            window *= 4
        return self._whole([text])[0]

    def _without_specials(self, ids: list[int]) -> list[int]:
        """Return token ids without the special tokens that may be around them already."""
        head, tail = len(self._head), len(self._tail)
        inner = ids[head:] if ids[:head] == self._head else ids
        return inner[: len(inner) - tail] if inner[len(inner) - tail :] == self._tail else inner

    def _pairs(
        self, pairs: Sequence[tuple[str, str]], cut: Cut, max_tokens: int, prompt: str
    ) -> list[Encoding]:
        """Tokenise pairs; what is too long loses tokens of its longer text first, as in transformers.

        Which of two is longer is not known where both are far too long: an odd token may go to either.
        """
        room = max(0, max_tokens - sum(len(ids) for place, ids, _ in self._pair if place is None))
        queries = self._bare([prompt + query for query, _ in pairs], room, cut)
        texts = self._bare([text for _, text in pairs], room, cut)
        return [self._joined(pair, cut, room) for pair in zip(queries, texts, strict=True)]

    def _joined(self, pair: tuple[list[int], list[int]], cut: Cut, room: int) -> Encoding:
        """Cut a pair and put the special tokens around it.

        By slices: the Rust object keeps what it cuts off, and joins each part with all of the other text.
        """
        if cut is not Cut.REFUSE and sum(map(len, pair)) > room:
            shorter = min(*map(len, pair), room // 2)
            kept = shorter if len(pair[0]) <= len(pair[1]) else room - shorter
            pair = _keep(pair[0], cut, kept), _keep(pair[1], cut, room - kept)
        ids: list[int] = []
        types: list[int] = []
        for place, specials, kinds in self._pair:
            part = specials if place is None else pair[place]
            ids += part
            types += kinds if place is None else kinds[:1] * len(part)
        return Encoding(ids, types)


def _layout(example: RustEncoding) -> list[tuple[int | None, list[int], list[int]]]:
    """Return the parts of a pair: special tokens (None), first text (0), second (1); their ids and types."""
    rows = zip(example.sequence_ids, example.ids, example.type_ids, strict=True)
    parts = [(place, list(part)) for place, part in groupby(rows, key=itemgetter(0))]
    return [(place, [row[1] for row in part], [row[2] for row in part]) for place, part in parts]


def _boundaries(rust: RustTokenizer) -> tuple[re.Pattern[str], re.Pattern[str]] | None:
    """Return before which places a text may be ended, and from which it may be begun; None: not known."""
    splitter = str(rust.pre_tokenizer)
    also = [
        f"|{place}"
        for kind, place in ALSO_SPLITS.items()
        if re.fullmatch(kind, f"{rust.normalizer} {splitter}")
    ]
    # A token that was added to the vocabulary is found before all words, and may go across their ends.
    added = [token.content for token in rust.get_added_tokens_decoder().values()]
    for more in (*also, "") if SPLITS_AT_SPACES.search(splitter) else ():
        ends, starts = re.compile(WORD_END + more), re.compile(WORD_START + more)
        if not any(ends.search(content) or starts.search(content) for content in added):
            return ends, starts
    return None


def _keep(ids: list[int], cut: Cut, room: int) -> list[int]:
    """Return what there is room for."""
    if len(ids) <= room or cut is Cut.REFUSE:
        return ids
    return ids[:room] if cut is Cut.RIGHT else ids[len(ids) - room :]


def _tokens(text: str, encoding: RustEncoding) -> Iterator[Token]:
    """Yield tokens as people read them: ordinary ones as they stand in the text, special ones by name."""
    rows = zip(encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True)
    for number, name, special, (start, end) in rows:
        yield Token(number, name if special else text[start:end], bool(special), start, end)
