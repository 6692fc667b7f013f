"""Counts who was refused, by reason, and chooses which refusals the log gets."""

from __future__ import annotations

from collections import Counter

_FIRST, _THEN_EACH = 20, 1000


class Refusals:
    """The log gets the first refusals of each reason, then each thousandth.

    So a peer that asks again and again neither fills the log nor hides another reason."""

    def __init__(self) -> None:
        self._by_reason: Counter[str] = Counter()

    def add(self, reason: str) -> bool:
        """Count one; returns whether to log it. reason: one of few, with nothing in it that the peer chose."""
        self._by_reason[reason] += 1
        count = self._by_reason[reason]
        return count < _FIRST or count % _THEN_EACH == 0

    @property
    def total(self) -> int:
        """Of all reasons."""
        return self._by_reason.total()
