# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a model, whatever computes it. Arbiter (load only) and worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

PROBE_WORD = "the"
"""The word that warm-up texts are made of: most vocabularies have it whole."""

Encoding = list[int]
"""Token ids of one text, specials included, without padding."""


@dataclass(frozen=True)
class DeviceMemory:
    """What this process holds on its device, in bytes, as its allocator knows it."""

    allocated_bytes: int
    reserved_bytes: int
    peak_bytes: int


class Batch(Protocol):
    """A collated batch; only the backend that made it knows what is inside."""

    @property
    def texts(self) -> int:
        """Number of texts."""

    @property
    def tokens(self) -> int:
        """Tokens that a forward pass computes, padding included."""


class Backend(Protocol):
    """One model copy. `load` may run in the arbiter; all else belongs to the worker's model thread.

    Attributes:
        preloadable: whether `load` may run in the arbiter, before the fork.
        max_tokens: longest text in tokens, specials included; longer ones are cut.
        dimension: length of a vector.
        normalized: whether the vectors have unit length.
        dtype: precision in use, such as `float32`.
    """

    preloadable: ClassVar[bool]
    max_tokens: int
    dimension: int
    normalized: bool
    dtype: str

    def forked(self, slot: int, generation: int) -> None:
        """Worker: this copy now belongs to a slot, whose worker is the `generation`-th."""

    def load(self) -> None:
        """Bring the weights into host memory.

        Raises:
            ModelError: the model cannot be loaded.
        """

    def place(self) -> None:
        """Move the model to this worker's device (`cuda:0` once pinned, else the CPU) and set threads."""

    def tokenize(self, texts: Sequence[str], *, truncate: bool) -> list[Encoding]:
        """Return the token ids of each text; cut at `max_tokens` if `truncate`."""

    def collate(self, encodings: Sequence[Encoding]) -> Batch:
        """Make one batch of the encodings, in order."""

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Compute the vectors of a batch: float32, shape (texts, dimension), in host memory.

        Raises:
            OutOfMemoryError: the device has no room for the batch.
            DeviceLostError: the device can no longer be used by this process.
        """

    def memory(self) -> DeviceMemory | None:
        """Return device memory in use, or None on a CPU."""

    def trim(self) -> None:
        """Give cached device memory back."""
