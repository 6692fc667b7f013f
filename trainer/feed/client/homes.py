"""Which loader is home to a lane: rendezvous hashing over the loaders that can answer, with equal shares for equals. Pure.

Plain rendezvous hashing would often give one of two loaders 20 of 32 lanes, and a fleet is as fast as its busiest member. So
the lanes of an entry choose in turn, and a loader that has its share is passed over. All ranks compute the same homes from
the same addresses, so only one loader decodes a window. Each level of `pace.LaneShares` halves a loader's share. Each rank finds
the levels by itself, so ranks may disagree about the lanes of a slow loader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stoker_proto.hashing import key64
from trainer.feed.client.pace import NO_LANES

_MOST_KNOWN = 256


class Homes:
    """Remembers its results, by entry and by the levels of the loaders."""

    def __init__(self, addresses: Sequence[str], lanes: int) -> None:
        """addresses: by loader number; may grow, see `forget`. lanes: number of lanes of each entry."""
        self._addresses, self._lanes = addresses, lanes
        self._known: dict[tuple[int, tuple[tuple[int, int], ...]], list[list[int]]] = {}

    def __call__(self, entry: int, able: Mapping[int, int]) -> list[list[int]]:
        """For each lane of the entry the loaders (indices of addresses), its home first, the others by hash.

        able: loader that can answer -> level; if all have NO_LANES, they get equal shares.
        """
        key = (entry, tuple(able.items()))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[key] = self._work_out(entry, able)
        return known

    def forget(self) -> None:
        """A number stands for another address now."""
        self._known.clear()

    def _work_out(self, entry: int, able: Mapping[int, int]) -> list[list[int]]:
        left = self._shares(able)
        best = min(able.values(), default=0)
        preferences: list[list[int]] = []
        for index in range(self._lanes):
            ranked = sorted(((key64("home", self._addresses[n], entry, index), n) for n in able), reverse=True)
            by_hash = [number for _, number in ranked]
            home = next((n for n in by_hash if left[n]), None)
            if home is None:  # all shares were rounded down
                home = next((n for n in by_hash if able[n] == best), None)
            else:
                left[home] -= 1
            preferences.append([n for n in by_hash if n == home] + [n for n in by_hash if n != home])
        return preferences

    def _shares(self, able: Mapping[int, int]) -> dict[int, int]:
        """Lanes that each loader may have: rounded up for the best level, down for the others."""
        best = min(able.values(), default=0)
        weights = {n: 0.5 ** (level - best) if level < NO_LANES or level == best else 0.0 for n, level in able.items()}
        total = sum(weights.values())
        return {
            n: -int(-self._lanes * weight // total) if able[n] == best else int(self._lanes * weight / total)
            for n, weight in weights.items()
        }
