"""What share of the lanes a loader is given: all its due, less while it is slow, none while it flaps. Pure.

A *level* of 0 is a full share, each further one halves it, NO_LANES gives none. Lanes move as a whole and stay for a while, so
that windows stay where they were decoded.

    slow        the level that its pace asks for, at once; after a hold one level back, and so on. The hold doubles where the
                loader had to be relieved again soon after.
    flapping    from the second failure in a row on NO_LANES for 1, 2, 4 ... s after it has come back
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.feed.client.options import CoreOptions

NO_LANES = 5
_LONGEST_HOLD = 16
"""A hold doubles up to so many times the first."""


@dataclass(slots=True)
class Standing:
    """Of one address, through all its incarnations."""

    level: int = 0
    relieved_at: float = float("-inf")
    hold_s: float = 0.0
    hold_until: float = 0.0
    failures: int = 0
    """In a row, none of them long after the loader had joined."""
    joined_at: float = 0.0
    trusted_at: float = float("-inf")
    """Not home to lanes before."""


class Standings:
    """Of all loaders of one rank."""

    def __init__(self, options: CoreOptions) -> None:
        self._options = options
        self.of = [Standing() for _ in options.addresses]

    def level(self, loader: int, now: float) -> int:
        """0: a full share of the lanes; NO_LANES: none, as long as others are able."""
        standing = self.of[loader]
        return NO_LANES if now < standing.trusted_at else standing.level

    # -- flapping

    def joined(self, loader: int, now: float) -> None:
        """It said WELCOME."""
        standing, options = self.of[loader], self._options
        standing.joined_at = now
        if standing.failures >= 2:  # one failure is a failure, two are a habit
            backoff_s = options.first_backoff_s * 2.0 ** min(standing.failures - 2, 30)
            standing.trusted_at = now + min(backoff_s, options.backoff_s)

    def failed(self, loader: int, now: float) -> None:
        """It was ready, and is gone without having said so."""
        standing = self.of[loader]
        steady = now >= standing.joined_at + self._options.steady_s
        standing.failures = 1 if steady else standing.failures + 1

    # -- slow

    def relieve(self, loader: int, level: int, now: float) -> bool:
        """Lower its share to this level, for a hold; whether that changed anything. At most once in a look's time."""
        standing, options = self.of[loader], self._options
        level = min(level, NO_LANES)
        if level <= standing.level or now < standing.relieved_at + options.look_s:
            return False
        again = now < standing.relieved_at + 4 * max(standing.hold_s, options.hold_s)
        longest = _LONGEST_HOLD * options.hold_s
        standing.hold_s = min(2 * standing.hold_s, longest) if again and standing.hold_s else options.hold_s
        standing.level, standing.relieved_at, standing.hold_until = level, now, now + standing.hold_s
        return True

    def due_back(self, now: float) -> list[int]:
        """Loaders whose hold is over."""
        return [number for number, one in enumerate(self.of) if one.level and now >= one.hold_until]

    def give_back(self, loader: int, now: float, *, still_slow: bool) -> None:
        """Raise its share by a level, or hold on while it is still slow."""
        standing = self.of[loader]
        standing.level -= not still_slow
        standing.hold_until = now + standing.hold_s
