"""How many tickets may be asked of two loaders at once: a token bucket, filled by the tickets themselves. Pure.

A hedge costs another loader the work a second time, just when the fleet may be slow because it has too much of it. So hedges
are a share of the tickets and a small burst, whatever happens:

    hedges <= share x tickets + BURST
"""

from __future__ import annotations

BURST = 4
"""Hedges beyond the share."""


class HedgeBudget:
    """Filled by each ticket, emptied by each hedge."""

    def __init__(self, share: float) -> None:
        """share: hedges per ticket; 0: none at all."""
        self._share = share
        self._tokens = float(BURST) if share else 0.0

    def ticket(self) -> None:
        """One more ticket was asked for, for the first time."""
        self._tokens = min(self._tokens + self._share, float(BURST))

    def spend(self) -> bool:
        """Whether one more hedge may be sent; if so it is counted."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    @property
    def has_any(self) -> bool:
        """Whether the next hedge may be sent."""
        return self._tokens >= 1.0
