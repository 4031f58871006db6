# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a model, whatever computes it. Arbiter (load only) and worker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

PROBE_WORD = "the"
"""The word that warm-up texts are made of: most vocabularies have it whole."""

Input = str | tuple[str, str] | list[int]
"""A text, a pair of texts (query and document), or token ids of the model's own vocabulary."""


class Kind(StrEnum):
    """What a model gives for an input."""

    EMBEDDING = "embedding"  # a dense vector
    SPARSE = "sparse"  # a weight for each entry of the vocabulary, nearly all of them zero
    SCORES = "cross-encoder"  # a number for each label, from a pair or a text


class Cut(StrEnum):
    """What becomes of a text that is too long."""

    RIGHT = "right"  # its end is cut off
    LEFT = "left"  # its beginning is
    REFUSE = "refuse"  # the caller refuses it


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids of one input, specials included, without padding.

    Attributes:
        ids: positions in the model's vocabulary.
        types: 0 for the tokens of the first text of a pair, 1 for those of the second; None: all 0.
        prompt_tokens: leading tokens that belong to the prompt, specials included; 0: pool over all.
    """

    ids: Sequence[int]
    types: Sequence[int] | None = None
    prompt_tokens: int = 0

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


class Token(NamedTuple):
    """One token of a text, for people: `start` and `end` count characters."""

    id: int
    text: str
    special: bool
    start: int
    end: int


@dataclass(frozen=True)
class DeviceMemory:
    """What this process holds on its device, in bytes, as its allocator knows it.

    Attributes:
        allocated_bytes: in tensors.
        reserved_bytes: in tensors, and kept for the next ones.
        peak_bytes: most that was ever allocated.
        peak_reserved_bytes: most that was ever reserved.
        free_bytes: of the device, whoever uses the rest.
        total_bytes: of the device.
    """

    allocated_bytes: int
    reserved_bytes: int
    peak_bytes: int
    peak_reserved_bytes: int = 0
    free_bytes: int = 0
    total_bytes: int = 0


class Batch(Protocol):
    """A collated batch; only the backend that made it knows what is inside."""

    @property
    def texts(self) -> int:
        """Number of texts."""

    @property
    def tokens(self) -> int:
        """Tokens that a forward pass computes, padding included."""


class Pending(Protocol):
    """A batch on its way through the device."""

    def done(self) -> bool:
        """Say whether `rows` would return without waiting."""

    def rows(self) -> NDArray[np.float32]:
        """Wait for the result: float32 of shape (texts, width), in host memory, in the batch's order.

        For a batch of token vectors the shape is (tokens, hidden): the texts' tokens, one after another.

        Raises:
            OutOfMemoryError: the device had no room for the batch.
            DeviceLostError: the device can no longer be used by this process.
        """


@dataclass(frozen=True)
class Done:
    """The `Pending` of a backend that computes at once."""

    result: NDArray[np.float32]

    def done(self) -> bool:
        """Say yes."""
        return True

    def rows(self) -> NDArray[np.float32]:
        """Return the result."""
        return self.result


class Backend(Protocol):
    """One model copy. `load` may run in the arbiter; all else belongs to the worker's model thread.

    `tokenize`, `tokens` and `decode` may be called from several threads at once.

    Attributes:
        preloadable: whether `load` may run in the arbiter, before the fork.
        kind: what the model gives for an input.
        max_tokens: longest input in tokens, specials included; longer ones are cut.
        dimension: width of a row: of the vector, the vocabulary, or the labels.
        normalized: whether the rows have unit length.
        dtype: precision in use, such as `float32`.
        padded: whether a batch costs its longest text times its number of texts, instead of the sum.
        packing: how batches are computed, in a word, for `/info`.
        prompts: named prompts that a request may ask for.
        default_prompt: the prompt of requests that name none; mostly empty.
        labels: of a cross-encoder, by column.
        vocabulary: number of token ids.
    """

    preloadable: ClassVar[bool]
    kind: Kind
    max_tokens: int
    dimension: int
    normalized: bool
    dtype: str
    padded: bool
    packing: str
    prompts: Mapping[str, str]
    default_prompt: str
    labels: Sequence[str]
    vocabulary: int

    def forked(self, slot: int, generation: int) -> None:
        """Worker: this copy now belongs to a slot, whose worker is the `generation`-th."""

    def load(self) -> None:
        """Bring the weights into host memory.

        Raises:
            ModelError: the model cannot be loaded.
        """

    def place(self, *, threads: int) -> None:
        """Move the model to this worker's device: `cuda:0` once pinned, else the CPU with so many threads.

        Raises:
            ModelError: the model cannot compute as the settings insist.
        """

    def tokenize(self, inputs: Sequence[Input], *, cut: Cut, prompt: str = "") -> list[Encoding]:
        """Return the token ids of each input, after the prompt; cut at `max_tokens` as told.

        With `Cut.REFUSE` an encoding may be longer than `max_tokens`; it is then not complete.
        """

    def tokens(self, texts: Sequence[str], *, specials: bool, prompt: str = "") -> list[list[Token]]:
        """Return the tokens of each text, uncut, with their place in the text."""

    def decode(self, ids: Sequence[Sequence[int]], *, skip_specials: bool) -> list[str]:
        """Return the text behind each list of token ids."""

    def collate(self, encodings: Sequence[Encoding], *, token_vectors: bool = False) -> Batch:
        """Make one batch of the encodings, in order; of each token's vector, if asked for."""

    def launch(self, batch: Batch) -> Pending:
        """Start computing a batch; on a CPU, compute it.

        Raises:
            OutOfMemoryError: the device has no room for the batch.
            DeviceLostError: the device can no longer be used by this process.
        """

    def memory(self) -> DeviceMemory | None:
        """Return device memory in use, or None on a CPU."""

    def fence(self, limit_bytes: int) -> None:
        """Allocate at most so many bytes on the device from now on; nothing on a CPU."""

    def trim(self) -> None:
        """Give cached device memory back."""


def forward(backend: Backend, batch: Batch) -> NDArray[np.float32]:
    """Compute a batch and wait for it; see `Pending.rows`."""
    return backend.launch(batch).rows()
