"""Which loader is home to a lane: rendezvous hashing over the able loaders, with an even share for each. Pure.

Plain rendezvous hashing would often give one of two loaders 20 of 32 lanes, and a fleet is as fast as its busiest member. So
the lanes of an entry choose in turn, and a loader that has its share is passed over. All ranks compute the same homes from
the same addresses: a window is decoded by one loader only.
"""

from __future__ import annotations

from stoker_proto.hashing import key64


class Homes:
    """Remembers what it worked out, per entry and set of able loaders."""

    def __init__(self, addresses: tuple[str, ...], lanes: int) -> None:
        """lanes: of each entry."""
        self._addresses, self._lanes = addresses, lanes
        self._known: dict[tuple[int, frozenset[int]], list[list[int]]] = {}

    def __call__(self, entry: int, able: frozenset[int]) -> list[list[int]]:
        """For each lane of the entry the able loaders (numbers of addresses), its home first, the others by hash."""
        known = self._known.get((entry, able))
        if known is not None:
            return known
        share = -(-self._lanes // max(len(able), 1))
        taken = dict.fromkeys(able, 0)
        preferences: list[list[int]] = []
        for index in range(self._lanes):
            ranked = sorted(((key64("home", self._addresses[n], entry, index), n) for n in able), reverse=True)
            by_hash = [number for _, number in ranked]
            home = next((number for number in by_hash if taken[number] < share), None)
            if home is not None:
                taken[home] += 1
                by_hash = [home, *(number for number in by_hash if number != home)]
            preferences.append(by_hash)
        self._known[entry, able] = preferences
        return preferences
