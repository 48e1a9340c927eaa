"""Which of two orders decides: the one whose shadow gets more hits, with a bias to the first.

Both orders are played on all traffic, one of them for real. Hits fade, so that the last few
thousand prompts count; the other one takes over where it leads by a margin of what was asked for,
and gives the lead back likewise: a tie changes nothing (set duelling, M. Qureshi et al., "Adaptive
insertion policies", ISCA 2007, with whole shadows in place of sampled sets).
"""

from __future__ import annotations

__all__ = ["Duel"]

FADE = 1 / 512  # a prompt
MARGIN = 0.002  # of the blocks asked for


class Duel:
    """`second`: whether the second order decides."""

    def __init__(self) -> None:
        self.second = False
        self.switches = 0
        self._lead = 0.0  # hits of the first over those of the second
        self._asked = 0.0

    def played(self, asked: int, first: int, second: int) -> None:
        """A prompt of `asked` blocks had so many hits under each."""
        self._lead += first - second - FADE * self._lead
        self._asked += asked - FADE * self._asked
        edge = MARGIN * self._asked
        if self._lead < -edge if not self.second else self._lead > edge:
            self.second = not self.second
            self.switches += 1
