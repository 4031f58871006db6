# SPDX-License-Identifier: Apache-2.0
"""A backend without a model: deterministic vectors, scripted delays and faults. For tests and demos.

A scenario is a TOML file of faults, each bound to a stage and, if it says so, to slots,
generations and repetitions:

    [[fault]]
    stage = "load"          # load | warm | forward
    kind = "hang"           # error | oom | hang | hold_gil | slow | exit | kill | segfault | wrong
    slots = [0]             # default: every slot
    generations = [1, 2]    # default: every generation of the slot
    seconds = 5.0           # of hang, hold_gil and slow; default: for ever (hang, hold_gil), 1 (slow)
    text = "boom"           # warm and forward: a word that triggers it; default: every text
    max_tokens = 256        # warm and forward: only batches of more tokens; default: every batch
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from service.backends.base import PROBE_WORD, Batch, DeviceMemory, Encoding
from service.errors import ModelError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from service.settings import Settings

FOR_EVER_S = 3600.0
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

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.encodings)

    @property
    def tokens(self) -> int:
        """Texts times the longest."""
        return len(self.encodings) * max(map(len, self.encodings))

    @property
    def is_probe(self) -> bool:
        """Whether the texts are warm-up's own."""
        return {word for encoding in self.encodings for word in encoding[1:-1]} <= {_word_id(PROBE_WORD)}


class StubBackend:
    """Vectors are unit vectors seeded by the tokens: the same text always gives the same one."""

    preloadable: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        """Prepare; nothing is slow."""
        self.max_tokens, self.dimension, self.normalized, self.dtype = 256, 32, True, "float32"
        self._settings = settings
        self._slot, self._generation = 0, 1
        self._faults: tuple[Fault, ...] = ()

    def forked(self, slot: int, generation: int) -> None:
        """Keep whose faults are due."""
        self._slot, self._generation = slot, generation

    def load(self) -> None:
        """Take `stub_load_ms`."""
        self._faults = read_scenario(self._settings.stub_scenario)
        self._strike("load")
        time.sleep(self._settings.stub_load_ms / 1e3)

    def place(self) -> None:
        """Nothing to move."""

    def tokenize(self, texts: Sequence[str], *, truncate: bool) -> list[Encoding]:
        """One id a word, between two specials."""
        limit = self.max_tokens - 2 if truncate else None
        return [[0, *(_word_id(word) for word in text.split()[:limit]), 1] for text in texts]

    def collate(self, encodings: Sequence[Encoding]) -> StubBatch:
        """Keep the encodings."""
        return StubBatch(tuple(encodings))

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Take `stub_forward_ms` and return a vector a text."""
        if not isinstance(batch, StubBatch):
            msg = f"not a batch of this backend: {type(batch).__name__}"
            raise TypeError(msg)
        wrong = self._strike("warm" if batch.is_probe else "forward", batch)
        if self._settings.stub_forward_ms:  # even a sleep of nothing costs more than all the rest
            time.sleep(self._settings.stub_forward_ms / 1e3)
        vectors = np.stack([self._vector(encoding) for encoding in batch.encodings])
        return vectors * np.float32("nan") if wrong else vectors

    def memory(self) -> DeviceMemory | None:
        """Return nothing: there is no device."""

    def trim(self) -> None:
        """Nothing to give back."""

    def _vector(self, encoding: Encoding) -> NDArray[np.float32]:
        seed = hashlib.blake2b(bytes(i % 256 for i in encoding), digest_size=8).digest()
        vector = np.random.default_rng(int.from_bytes(seed)).standard_normal(self.dimension, dtype=np.float32)
        return vector / np.linalg.norm(vector)

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
                and all(_word_id(fault.text) not in encoding for encoding in batch.encodings)
            ):
                continue
            if batch is not None and fault.max_tokens and batch.tokens <= fault.max_tokens:
                continue
            wrong = wrong or fault.kind == "wrong"
            fault.strike()
        return wrong


def _word_id(word: str) -> int:
    return (
        2 + int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=2).digest()) % HASHED
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
