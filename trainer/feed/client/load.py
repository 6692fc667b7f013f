"""Which loader is overloaded while another idles: from the time that each owes tickets and from what it gives in it. Pure.

Latencies do not tell: where the trainer takes all that comes, the open tickets gather at whoever is slowest, be it by a tenth,
and its latency is many times that of the others. What tells is the pace, samples per second of the time in which something
was owed, and that somebody else had nothing to do meanwhile. Nobody is relieved while the trainer has what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from trainer.feed.client.options import CoreOptions

_NEW = 0.5
"""Weight of the last look in the averages."""
_BUSY, _IDLE = 0.8, 0.6
"""A loader that owes something for more of the time is busy, and idle for less."""
_MEASURED = 0.05
"""A pace is taken over so much of a look's time at least, be it over several looks: who answers in no time has one too."""
_GRACE = 6
"""Looks after a loader's first ticket in which it is not judged: it reads its first windows."""


@dataclass(slots=True)
class LoaderLoad:
    """Of one loader."""

    num_open: int = 0
    since: float = 0.0
    """From when on something is open that is not in `busy_s`."""
    busy_s: float = 0.0
    samples: int = 0
    num_looks: int = 0
    """Since its first ticket."""
    busy: float = 0.0
    """Averaged share of the time."""
    paced_s: float = 0.0
    """Busy seconds that are not in `pace` yet, with `paced_samples`."""
    paced_samples: int = 0
    pace: float | None = None
    """Averaged samples per busy second."""


class Load:
    """Of all loaders of one rank."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        self._options = options
        self.of = [LoaderLoad() for _ in options.addresses]
        self._looked_at = self._told_at = now
        self._starving, self._starved_s = False, 0.0

    def asked(self, loader: int, now: float) -> None:
        """One more ticket is open there."""
        load = self.of[loader]
        load.num_looks = load.num_looks or 1
        if not load.num_open:
            load.since = now
        load.num_open += 1

    def settled(self, loader: int, samples: int, now: float) -> None:
        """One less; samples: what came of it."""
        load = self.of[loader]
        load.num_open -= 1
        load.samples += samples
        if not load.num_open:
            load.busy_s += now - load.since

    def forget(self, loader: int) -> None:
        """The incarnation is gone; nothing is open there any more."""
        self.of[loader] = LoaderLoad()

    def renew(self, loader: int) -> None:
        """It is given lanes again: its pace of before, perhaps its worst, is not that of today."""
        load = self.of[loader]
        load.pace, load.paced_s, load.paced_samples = None, 0.0, 0

    def starving(self, starving: bool, now: float) -> None:
        """Whether the trainer wants what is not there."""
        self._starved_s += (now - self._told_at) * self._starving
        self._starving, self._told_at = starving, now

    def next_time(self) -> float:
        """When `look` has something to find."""
        return self._looked_at + self._options.look_s if self._starving else float("inf")

    def look(self, now: float, helps: Callable[[int, int], bool]) -> list[tuple[int, int]] | None:
        """(overloaded loader, the level that its pace asks for) of each; None: it is too early to look again.

        helps: (loader, another) -> whether the other is able, and holds what the first holds.
        """
        elapsed = now - self._looked_at
        if now < self._looked_at + self._options.look_s:
            return None
        self.starving(self._starving, now)
        starved = self._starved_s >= elapsed / 2
        self._looked_at, self._starved_s = now, 0.0
        for load in self.of:
            self._average(load, elapsed, now)
        ratio = self._options.takeover_ratio
        if not starved or not ratio:
            return []
        found = []
        for number, load in enumerate(self.of):
            if load.busy < _BUSY or load.num_looks <= _GRACE or load.pace is None:
                continue
            paces = [
                other.pace
                for index, other in enumerate(self.of)
                if other.pace is not None and other.busy < _IDLE and helps(number, index)
            ]
            faster = max(paces, default=0.0) / max(load.pace, 1e-9)
            if faster >= ratio:
                found.append((number, math.ceil(math.log2(faster))))
        return found

    @staticmethod
    def _average(load: LoaderLoad, elapsed: float, now: float) -> None:
        if load.num_open:
            load.busy_s += now - load.since
            load.since = now
        load.num_looks += load.num_looks > 0
        load.busy += _NEW * (load.busy_s / elapsed - load.busy)
        load.paced_s, load.paced_samples = load.paced_s + load.busy_s, load.paced_samples + load.samples
        if load.paced_s > _MEASURED * elapsed:
            pace = load.paced_samples / load.paced_s
            load.pace = pace if load.pace is None else load.pace + _NEW * (pace - load.pace)
            load.paced_s, load.paced_samples = 0.0, 0
        load.busy_s, load.samples = 0.0, 0
