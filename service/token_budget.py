# SPDX-License-Identifier: Apache-2.0
"""How many tokens a pass may have once the device ran out of memory. Pure, the clock an argument. Worker."""

from __future__ import annotations

from dataclasses import dataclass, field

SHRINK = 0.75
"""Of the size that did not fit: halving would cost more passes than the neighbour's memory."""
RECOVER_S = 60.0
"""Without trouble, before each step back up."""
STEP = 0.05
"""Of the declared budget, a step."""
MANY = 3
"""Times out of memory at the floor, within `RECOVER_S` of each other: only a fresh process helps."""


@dataclass
class TokenBudget:
    """Shrinks at once, recovers slowly, and says when it cannot help any more.

    Attributes:
        declared: what warm-up found room for.
        floor: the longest text; a smaller budget would change what is computed.
        now: tokens that a pass may have at present.
        events: times the device was out of memory.
    """

    declared: int
    floor: int
    now: int = field(init=False)
    events: int = 0
    _changed: float = field(default=0.0, init=False)
    _at_floor: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Begin with all of it."""
        self.floor = min(self.floor, self.declared)
        self.now = self.declared

    def shrink(self, tokens: int, time: float) -> bool:
        """A pass of so many tokens did not fit; return whether the process should be replaced."""
        self.events += 1
        recent = time - self._changed < RECOVER_S
        self._at_floor = 0 if not recent else self._at_floor
        self._at_floor += self.now <= self.floor
        self.now = max(self.floor, min(self.now, int(SHRINK * tokens)))
        self._changed = time
        return self._at_floor >= MANY

    def recover(self, time: float) -> bool:
        """Take a step back up if there was no trouble for a while; return whether anything changed."""
        if self.now >= self.declared or time - self._changed < RECOVER_S:
            return False
        self.now = min(self.declared, self.now + max(1, int(STEP * self.declared)))
        self._changed = time
        self._at_floor = 0
        return True
