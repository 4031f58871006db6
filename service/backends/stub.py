# SPDX-License-Identifier: Apache-2.0
"""A backend without a model: deterministic vectors, scripted delays and faults. For tests and demos.

A scenario is a TOML file of faults, each bound to a stage and, if it says so, to slots,
generations and repetitions:

    [[fault]]
    stage = "load"          # load | warm | forward
    kind = "hang"           # error | oom | hang | hold_gil | slow | leak | exit | kill | segfault | wrong
    slots = [0]             # default: every slot
    generations = [1, 2]    # default: every generation of the slot
    seconds = 5.0           # of hang, hold_gil and slow; default: for ever (hang, hold_gil), 1 (slow)
    megabytes = 10          # of leak: kept for good, each time
    text = "boom"           # warm and forward: a word that triggers it; default: every text
    max_tokens = 256        # warm and forward: only batches of more tokens; default: every batch
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import signal
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from service.backends.base import PROBE_WORD, Batch, Cut, DeviceMemory, Done, Encoding, Input, Kind, Token
from service.errors import ModelError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from service.settings import Settings

FOR_EVER_S = 3600.0
FIRST = 2
"""Ids below are the special tokens."""
LEAKED: list[bytearray] = []
HASHED = 251
"""Words become ids below this, so that token lists stay small."""


@dataclass(frozen=True)
class Fault:
    """One scripted fault."""

    stage: str
    kind: str
    slots: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    seconds: float | None = None
    text: str = ""
    max_tokens: int = 0
    megabytes: float = 0.0

    def strike(self) -> None:
        """Do it to this process."""
        seconds = FOR_EVER_S if self.seconds is None else self.seconds
        match self.kind:
            case "error":
                msg = f"scripted error in {self.stage}"
                raise ModelError(msg)
            case "oom":
                msg = f"scripted out of memory in {self.stage}"
                raise OutOfMemoryError(msg)
            case "hang":
                time.sleep(seconds)
            case "leak":
                LEAKED.append(bytearray(b"\1") * int(self.megabytes * 1e6))
            case "slow":
                time.sleep(1.0 if self.seconds is None else self.seconds)
            case "hold_gil":
                ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL calls without releasing the GIL
            case "exit":
                os._exit(1)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                signal.raise_signal(signal.SIGSEGV)  # in this thread: kill may choose another, and go on here


@dataclass(frozen=True)
class StubBatch:
    """Encodings, and what they would cost padded."""

    encodings: tuple[Encoding, ...]
    token_vectors: bool = False

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.encodings)

    @property
    def tokens(self) -> int:
        """The sum of the texts: the stub pads nothing."""
        return sum(map(len, self.encodings))

    @property
    def is_probe(self) -> bool:
        """Whether the texts are warm-up's own."""
        return {word for encoding in self.encodings for word in encoding.ids[1:-1]} <= {_word_id(PROBE_WORD)}


class StubBackend:
    """Vectors are unit vectors seeded by the tokens: the same text always gives the same one."""

    preloadable: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        """Prepare; nothing is slow."""
        self.kind, self.max_tokens, self.dimension, self.vocabulary = Kind.EMBEDDING, 256, 32, FIRST + HASHED
        self.normalized, self.padded, self.dtype, self.packing = True, False, "float32", "stub"
        self.prompts: Mapping[str, str] = {"query": "query: "}
        self.default_prompt = ""
        self.labels: Sequence[str] = ()
        self._settings = settings
        self._slot, self._generation = 0, 1
        self._faults: tuple[Fault, ...] = ()
        self._ballast = bytearray()

    def forked(self, slot: int, generation: int) -> None:
        """Keep whose faults are due."""
        self._slot, self._generation = slot, generation

    def load(self) -> None:
        """Take `stub_load_ms`."""
        self._faults = read_scenario(self._settings.stub_scenario)
        self._strike("load")
        time.sleep(self._settings.stub_load_ms / 1e3)

    def place(self, *, threads: int) -> None:  # noqa: ARG002 - it computes nothing
        """Take `stub_memory_mb` of private memory."""
        self._ballast = bytearray(b"\1") * int(self._settings.stub_memory_mb * 1e6)

    def tokenize(self, inputs: Sequence[Input], *, cut: Cut, prompt: str = "") -> list[Encoding]:
        """One id a word, between two specials."""
        room = self.max_tokens - 2
        encodings = []
        for item in inputs:
            words = list(item) if isinstance(item, list) else self._words(prompt, item)
            if cut is not Cut.REFUSE:
                words = words[:room] if cut is Cut.RIGHT else words[-room:]
            encodings.append(Encoding([0, *words, 1]))
        return encodings

    def tokens(self, texts: Sequence[str], *, specials: bool, prompt: str = "") -> list[list[Token]]:
        """Return the words with their places."""
        first, last = [Token(0, "[", True, 0, 0)], [Token(1, "]", True, 0, 0)]
        return [
            (first if specials else [])
            + [
                Token(_word_id(m.group()), m.group(), False, m.start(), m.end())
                for m in re.finditer(r"\S+", prompt + text)
            ]
            + (last if specials else [])
            for text in texts
        ]

    def decode(self, ids: Sequence[Sequence[int]], *, skip_specials: bool) -> list[str]:
        """Return the ids as words: what they stood for is lost."""
        return [" ".join(f"w{i}" for i in row if not (skip_specials and i < FIRST)) for row in ids]

    def collate(self, encodings: Sequence[Encoding], *, token_vectors: bool = False) -> StubBatch:
        """Keep the encodings."""
        return StubBatch(tuple(encodings), token_vectors)

    def launch(self, batch: Batch) -> Done:
        """Take `stub_forward_ms` and return a vector a text, or a token."""
        if not isinstance(batch, StubBatch):
            msg = f"not a batch of this backend: {type(batch).__name__}"
            raise TypeError(msg)
        wrong = self._strike("warm" if batch.is_probe else "forward", batch)
        if self._settings.stub_forward_ms:  # even a sleep of nothing costs more than all the rest
            time.sleep(self._settings.stub_forward_ms / 1e3)
        encodings: Iterable[Encoding] = batch.encodings
        if batch.token_vectors:
            encodings = [Encoding([token]) for encoding in encodings for token in encoding.ids]
        vectors = np.stack([self._vector(encoding) for encoding in encodings])
        return Done(vectors * np.float32("nan") if wrong else vectors)

    def memory(self) -> DeviceMemory | None:
        """Return nothing: there is no device."""

    def fence(self, limit_bytes: int) -> None:
        """There is no device to fence."""

    def trim(self) -> None:
        """Nothing to give back."""

    def _vector(self, encoding: Encoding) -> NDArray[np.float32]:
        seed = hashlib.blake2b(bytes(i % 256 for i in encoding.ids), digest_size=8).digest()
        vector = np.random.default_rng(int.from_bytes(seed)).standard_normal(self.dimension, dtype=np.float32)
        return vector / np.linalg.norm(vector)

    @staticmethod
    def _words(prompt: str, item: str | tuple[str, str]) -> list[int]:
        text = item if isinstance(item, str) else " ".join(item)
        return [_word_id(word) for word in (prompt + text).split()]

    def _strike(self, stage: str, batch: StubBatch | None = None) -> bool:
        """Run the faults that are due here; say whether the outputs shall be wrong."""
        wrong = False
        for fault in self._faults:
            if fault.stage != stage or (fault.slots and self._slot not in fault.slots):
                continue
            if fault.generations and self._generation not in fault.generations:
                continue
            if (
                batch is not None
                and fault.text
                and all(_word_id(fault.text) not in encoding.ids for encoding in batch.encodings)
            ):
                continue
            if batch is not None and fault.max_tokens and batch.tokens <= fault.max_tokens:
                continue
            wrong = wrong or fault.kind == "wrong"
            fault.strike()
        return wrong


def _word_id(word: str) -> int:
    return (
        FIRST
        + int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=2).digest()) % HASHED
    )


def read_scenario(path: str | None) -> tuple[Fault, ...]:
    """Read the faults of a scenario file, none without one.

    Raises:
        ModelError: the file cannot be read or names something unknown.
    """
    if not path:
        return ()
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))["fault"]
        return tuple(TypeAdapter(tuple[Fault, ...]).validate_python(tables))
    except (OSError, KeyError, ValidationError, tomllib.TOMLDecodeError) as error:
        msg = f"cannot read the scenario {path}: {error}"
        raise ModelError(msg) from error
