# SPDX-License-Identifier: Apache-2.0
"""Texts to token ids by the Rust tokenizer alone: no padding, no GIL, no wrapper. Worker, any thread."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from service.backends.base import Cut, Encoding, Input, Token

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Encoding as RustEncoding
    from tokenizers import Tokenizer as RustTokenizer

CHARACTERS_A_TOKEN = 16
"""Prose has about 5: a beginning of so many characters for each token nearly always fills the window."""
WORD_END = re.compile(r"(?<=\S) ")
"""Only the plain space: some normalizers drop other white space, and join the words around it."""
SPLITS_AT_SPACES = re.compile(
    r"BertPreTokenizer|WhitespaceSplit|Whitespace\(|Metaspace\([^)]*split=True|ByteLevel\([^)]*use_regex=True"
)
"""Pre-tokenizers after which the tokens of a word do not depend on what follows it."""


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
        added = rust.get_added_tokens_decoder().values()
        self._words = bool(SPLITS_AT_SPACES.search(str(rust.pre_tokenizer))) and not any(
            WORD_END.search(token.content) for token in added
        )

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
        if isinstance(inputs[0], str):
            texts = [prompt + text for text in cast("Sequence[str]", inputs)]
            rows = [encoding.ids for encoding in self._bare(texts, None if cut is Cut.LEFT else room)]
        else:
            rows = [self._without_specials(ids) for ids in cast("Sequence[list[int]]", inputs)]
        marked = 0
        if prompt and mark_prompt:
            marked = len(self._head) + min(room, len(self._bare([prompt], room)[0]))
        return [Encoding([*self._head, *_keep(row, cut, room), *self._tail], None, marked) for row in rows]

    def tokens(self, texts: Sequence[str], *, specials: bool, prompt: str = "") -> list[list[Token]]:
        """Return the tokens of each text; see `Backend.tokens`."""
        prompted = [prompt + text for text in texts]
        encodings = self._rust.encode_batch(prompted, add_special_tokens=specials)
        return [list(_tokens(*pair)) for pair in zip(prompted, encodings, strict=True)]

    def decode(self, ids: Sequence[Sequence[int]], *, skip_specials: bool) -> list[str]:
        """Return the text behind each list of token ids."""
        return self._rust.decode_batch([list(row) for row in ids], skip_special_tokens=skip_specials)

    def _bare(self, texts: Sequence[str], enough: int | None) -> list[RustEncoding]:
        """Tokenise without special tokens; of a text with more than `enough`, maybe only its beginning."""
        window = CHARACTERS_A_TOKEN * max(1, enough or 0)
        if enough is None or not self._words or max(map(len, texts)) <= window:
            return self._rust.encode_batch_fast(texts, add_special_tokens=False)
        return [self._beginning(text, enough, window) for text in texts]

    def _beginning(self, text: str, enough: int, window: int) -> RustEncoding:
        """Tokenise no more of a text than fills the model's window: two megabytes would take a second."""
        while True:
            end = WORD_END.search(text, window) if len(text) > window else None
            found = self._rust.encode(text[: end.start()] if end else text, add_special_tokens=False)
            if end is None or len(found) > enough:
                return found
            window *= 4

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
        room = max(0, max_tokens - self._rust.num_special_tokens_to_add(is_pair=True))
        enough = None if cut is Cut.LEFT else room
        queries = self._bare([prompt + query for query, _ in pairs], enough)
        texts = self._bare([text for _, text in pairs], enough)
        for query, text in zip(queries, texts, strict=True):
            if cut is not Cut.REFUSE and len(query) + len(text) > room:
                shorter = min(len(query), len(text), room // 2)
                kept = shorter if len(query) <= len(text) else room - shorter
                query.truncate(kept, direction=cut.value)
                text.truncate(room - kept, direction=cut.value)
        whole = map(self._rust.post_process, queries, texts)
        return [Encoding(encoding.ids, encoding.type_ids) for encoding in whole]


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
