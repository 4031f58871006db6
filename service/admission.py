# SPDX-License-Identifier: Apache-2.0
"""How much work a worker takes on, counted in texts, and when to come back for the rest. Worker.

Decided in microseconds and before a text is tokenised: under overload a refusal must cost nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.errors import OverloadedError, TooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GAIN = 0.1
"""Weight of the newest batch in the drain rate: it follows within ten batches."""


@dataclass
class Admission:
    """Permits, one a text.

    Attributes:
        max_texts: admitted at once.
        max_client_batch: texts of one request.
        rejected: told of the texts for which there was no room.
        texts: admitted and not answered.
        requests: the same, counted in requests.
        seconds_per_text: of the last batches; 0 until there was one.
    """

    max_texts: int
    max_client_batch: int
    rejected: Callable[[int], None] = lambda _texts: None
    texts: int = 0
    requests: int = 0
    seconds_per_text: float = 0.0

    @property
    def extra_load(self) -> int:
        """Texts admitted beyond one a request."""
        return self.texts - self.requests

    @contextmanager
    def permit(self, texts: int) -> Iterator[None]:
        """Hold a permit for each text of a request.

        Raises:
            TooLargeError: more texts than one request may have, or than could ever be admitted.
            OverloadedError: no room now; says when the queue will have drained.
        """
        if texts > self.max_client_batch:
            msg = f"{texts} texts in one request; at most {self.max_client_batch} are taken, split it"
            raise TooLargeError(msg)
        if texts > self.max_texts:
            msg = f"{texts} texts can never be admitted; at most {self.max_texts} are, split it"
            raise TooLargeError(msg)
        if self.texts + texts > self.max_texts:
            self.rejected(texts)
            msg = f"{self.texts} texts are in work, of {self.max_texts} at most; try again later"
            raise OverloadedError(msg, retry_after_s=self.texts * self.seconds_per_text)
        self.texts += texts
        self.requests += 1
        try:
            yield
        finally:
            self.texts -= texts
            self.requests -= 1

    def drained(self, texts: int, seconds: float) -> None:
        """Learn the drain rate from a batch."""
        rate = seconds / texts
        known = self.seconds_per_text
        self.seconds_per_text = rate if not known else known + GAIN * (rate - known)
