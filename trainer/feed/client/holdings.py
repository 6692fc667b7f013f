"""Which shards of an entry a loader lacks, and what several loaders lack together. Pure.

a lacks shards 5 to 9, b lacks 0 to 4 and 8   ->   together they lack 8
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from stoker_proto.wire.messages import Welcome
from stoker_proto.wire.peer_text import plain

_SHOWN = 100  # characters of a shard's name


class Missing(NamedTuple):
    """Shards [first, stop) of an entry, by number, and the names of the first and the last of them."""

    first: int
    stop: int
    of: int
    """Shards of the entry."""
    first_name: str
    last_name: str

    def __str__(self) -> str:
        """For messages."""
        if self.stop - self.first == 1:
            return f"shard {self.first_name}"
        return f"{self.stop - self.first} shards, {self.first_name} to {self.last_name}"


Holdings = Mapping[int, Sequence[Missing]]
"""Entry held -> its shards that are not there, in order; none: the whole entry is there."""


def holdings_of(message: Welcome, split: str) -> dict[int, tuple[Missing, ...]] | None:
    """What a loader says that it holds of a split; None where that makes no sense."""
    found: dict[int, list[Missing]] = {entry: [] for entry in message.held.get(split, [])}
    for row in message.missing.get(split, []):
        entry, first, stop, of, *names = row
        missing = Missing(int(first), int(stop), int(of), *(plain(str(name), _SHOWN) for name in names))
        before = found.get(int(entry))
        low = before[-1].stop if before else 0
        if before is None or not low <= missing.first < missing.stop <= missing.of:
            return None
        before.append(missing)
    return {entry: tuple(missing) for entry, missing in found.items()}


def holds(missing: Sequence[Missing], shards: Iterable[int]) -> bool:
    """Whether none of these shards is missing."""
    return not missing or not any(_lacks(missing, shard) for shard in shards)


def _lacks(missing: Sequence[Missing], shard: int) -> bool:
    place = bisect_right(missing, shard, key=lambda one: one.first)
    return place > 0 and shard < missing[place - 1].stop


def lacked_by_both(one: Sequence[Missing], other: Sequence[Missing]) -> list[Missing]:
    """What is missing in both, in order."""
    found = []
    i = j = 0
    while i < len(one) and j < len(other):
        a, b = one[i], other[j]
        first, stop = max(a.first, b.first), min(a.stop, b.stop)
        if first < stop:
            first_name = a.first_name if a.first == first else b.first_name
            found.append(Missing(first, stop, a.of, first_name, a.last_name if a.stop == stop else b.last_name))
        i, j = i + (a.stop == stop), j + (b.stop == stop)
    return found


def share_a_shard(one: Holdings, other: Holdings) -> bool:
    """Whether there is a shard that both hold."""
    for entry in one.keys() & other.keys():
        reached = of = 0
        for missing in sorted((*one[entry], *other[entry])):
            if missing.first > reached:
                return True
            reached, of = max(reached, missing.stop), missing.of
        if reached < of or not of:
            return True
    return False
