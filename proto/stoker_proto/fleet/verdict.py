"""What limits the training, in words: the rules that the trainer's log line and `loader-top` share. Pure: time is an argument.

    trainer-bound: loaders could give 2.3x          the trainer hardly waits, and the loaders idle
    decode-bound: add 2 loaders                     the trainer waits, and the loaders' threads are busy; the largest stage
    delivery-bound: ...                             the trainer waits, and the loaders idle too
    loader 3 is slow: half the pace of its peers since 14:02

Counters of two moments make a window (`work_between`); what a thread cannot do faster is its pace, whatever it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median

WAITS = 0.05
"""Share of the step time from which on the trainer counts as waiting for data."""
_IDLE = 0.5
"""Loaders whose threads are busy for less than this share are not what a waiting trainer waits for."""
_SLOW = 0.67
"""A loader below this share of its peers' pace is slow."""
_ENOUGH_RECORDS = 5
"""Decoded in the window, for a pace."""
_MOST = 20.0
"""Larger factors are not told apart: loaders that hardly work are measured badly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Of one loader at one moment, since its start."""

    uptime_s: float
    samples: float
    records: float
    """Decoded."""
    threads: float
    stage_s: Mapping[str, float]
    """Busy seconds over all threads, by stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderWork:
    """What one loader did in a window."""

    name: str
    seconds: float
    samples: float
    records: float
    threads: float
    stage_s: Mapping[str, float]

    @property
    def samples_per_s(self) -> float:
        """Sent."""
        return self.samples / self.seconds

    @property
    def busy(self) -> float:
        """Share of its threads' time, 0 to 1."""
        return min(sum(self.stage_s.values()) / (self.threads * self.seconds), 1.0)

    @property
    def capacity(self) -> float:
        """Samples per second if its threads were always busy."""
        return self.samples_per_s / max(self.busy, 1.0 / _MOST)

    @property
    def pace(self) -> float | None:
        """Records that one thread decodes in a second; None: too few for a figure. Pieces of records in memory do not count."""
        busy_s = sum(seconds for stage, seconds in self.stage_s.items() if stage != "pack")
        return self.records / busy_s if self.records >= _ENOUGH_RECORDS and busy_s > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerWork:
    """What the trainer did in a window."""

    samples: float
    step_s: float
    """Seconds of its steps, with the wait."""
    wait_s: float

    @property
    def wait(self) -> float:
        """Share of the step time, 0 to 1."""
        return min(self.wait_s / self.step_s, 1.0) if self.step_s > 0 else 0.0

    @property
    def wanted(self) -> float:
        """Samples per second that it would take if it never waited."""
        return self.samples / max(self.step_s - self.wait_s, self.step_s / _MOST) if self.step_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """One finding."""

    kind: str
    """trainer-bound, delivery-bound, slow, or a stage and `-bound`."""
    text: str
    loader: str = ""
    """The loader that it is about, if one."""


def work_between(name: str, before: Counters, after: Counters) -> LoaderWork | None:
    """The window between two moments; None where it is empty, or the loader restarted in it."""
    seconds = after.uptime_s - before.uptime_s
    if seconds <= 0 or after.samples < before.samples or after.records < before.records:
        return None
    return LoaderWork(
        name=name,
        seconds=seconds,
        samples=after.samples - before.samples,
        records=after.records - before.records,
        threads=max(after.threads, 1.0),
        stage_s={stage: max(s - before.stage_s.get(stage, 0.0), 0.0) for stage, s in after.stage_s.items()},
    )


class Judge:
    """Applies the rules to one window after another, and remembers since when a loader is slow."""

    def __init__(self) -> None:
        self._slow_since: dict[str, datetime] = {}

    def look(self, loaders: Sequence[LoaderWork], trainer: TrainerWork | None, now: datetime) -> list[Verdict]:
        """The verdicts of a window that ends now. trainer: None where nothing is known of one; then only loaders are compared."""
        slow = _slow_loaders(loaders)
        known = {one.name for one in loaders if one.pace is not None}
        self._slow_since = {
            name: since for name, since in self._slow_since.items() if name in slow or name not in known
        }
        verdicts = []
        for name, share in slow.items():
            since = self._slow_since.setdefault(name, now)
            text = f"{name} is slow: {_words(share)} the pace of its peers since {since:%H:%M}"
            verdicts.append(Verdict("slow", text, name))
        return [*(() if trainer is None else _limits(loaders, trainer)), *verdicts]


def _slow_loaders(loaders: Sequence[LoaderWork]) -> dict[str, float]:
    """Name of each slow loader -> its pace as a share of the median of the others."""
    paces = {one.name: one.pace for one in loaders if one.pace is not None}
    found = {}
    for name, pace in paces.items():
        others = [other for peer, other in paces.items() if peer != name]
        if others and pace < _SLOW * median(others):
            found[name] = pace / median(others)
    return found


def _limits(loaders: Sequence[LoaderWork], trainer: TrainerWork) -> list[Verdict]:
    capacity, given = sum(one.capacity for one in loaders), sum(one.samples_per_s for one in loaders)
    if trainer.samples <= 0 or given <= 0:
        return []
    if trainer.wait < WAITS:
        factor = capacity / given
        shown = f"{factor:.1f}x" if factor < _MOST - 0.5 else f"more than {_MOST:.0f}x"
        return [Verdict("trainer-bound", f"trainer-bound: loaders could give {shown}")]
    threads = sum(one.threads for one in loaders)
    busy = sum(one.busy * one.threads for one in loaders) / threads
    if busy < _IDLE:
        text = (
            f"delivery-bound: the trainer waits {trainer.wait:.0%} of the time, and the loaders' threads work {busy:.0%} of it: "
            "raise trainer.feed.prefetch, or look at the network"
        )
        return [Verdict("delivery-bound", text)]
    stages: dict[str, float] = {}
    for one in loaders:
        for stage, seconds in one.stage_s.items():
            stages[stage] = stages.get(stage, 0.0) + seconds / one.seconds
    largest = max(stages, key=lambda stage: stages[stage])
    more = max(math.ceil(len(loaders) * (trainer.wanted / capacity - 1)), 1)
    return [Verdict(f"{largest}-bound", f"{largest}-bound: add {more} {'loader' if more == 1 else 'loaders'}")]


def _words(share: float) -> str:
    for value, word in ((1 / 2, "half"), (1 / 3, "a third of"), (1 / 4, "a quarter of")):
        if abs(share / value - 1) < 0.13:
            return word
    return f"{share:.0%} of"
