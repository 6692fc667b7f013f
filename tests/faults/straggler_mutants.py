"""The core without one of the parts that deal with stragglers: hedges, measure, probe, takeover, backoff."""

from __future__ import annotations

import dataclasses

from stoker_proto.wire.messages import Piece, Shards, Ticket
from tests.faults.substitutes import with_fleet, with_tickets
from tests.faults.trainer import MakeCore
from trainer.feed.client.core import Core
from trainer.feed.client.fleet import Fleet
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.pace import HedgeBudget, Latency, Load
from trainer.feed.client.tickets import Choices, Tickets


class _HedgeCountedTwice(Core):
    """The second answer to a hedged ticket frees its credit once more."""

    def _answer(self, loader: int, answer: Piece | Shards, now: float) -> None:
        dropped = self.tickets.counters.duplicates
        super()._answer(loader, answer, now)
        self._untaken -= self.tickets.counters.hedges > 0 and self.tickets.counters.duplicates > dropped


class _HedgeUncounted(Tickets):
    """Hedges are sent, and no one writes them down."""

    def hedge(self, num_batches: int, choices: Choices, now: float) -> list[tuple[int, Ticket]]:
        hedges = super().hedge(num_batches, choices, now)
        self.counters.hedges -= len(hedges)
        return hedges


class _NoBudget(Core):
    """Whatever is slow is hedged."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        super().__init__(options, now)
        self.pace.budget = HedgeBudget(1e9)


class _Guessed(Latency):
    known = True  # type: ignore[assignment]


class _ColdHedge(Core):
    """Latencies count as known from the start."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        super().__init__(options, now)
        self.pace.latencies.of = [_Guessed() for _ in options.addresses]
        self.pace.latencies.forget = lambda loader: None  # type: ignore[method-assign]
        self.pace.latencies.expected = lambda loader: 0.0  # type: ignore[method-assign]


class _NoMeasure(Core):
    """The estimate of the latencies is never updated."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        super().__init__(options, now)
        self.pace.latencies.of = [_Unmoved() for _ in options.addresses]
        self.pace.latencies.forget = lambda loader: None  # type: ignore[method-assign]


class _Unmoved(Latency):
    def observe(self, seconds: float) -> None:
        return


class _NoBackoff(Core):
    """A loader that comes back is home to its lanes at once, however often it failed."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        feed = dataclasses.replace(options.feed, backoff_s=0.0)
        super().__init__(dataclasses.replace(options, feed=feed), now)


class _NoTakeover(Core):
    """Lanes stay where they are, however slow the loader is."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        super().__init__(options, now)
        self.pace.shares.lower = lambda loader, level, now: False  # type: ignore[method-assign]


class _NoReturn(Core):
    """Lanes that were taken over are never given back."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        super().__init__(options, now)
        self.pace.shares.ended_holds = lambda now: []  # type: ignore[method-assign]


class _NoMove(Tickets):
    """The open tickets of a lane that was taken over stay where they are, and no deadline is shortened for them."""

    def move(self, loader: int, choices: Choices) -> None:
        return


class _NoProbe(Fleet):
    """Who owes an answer is not asked whether it is alive."""

    def overdue(self, number: int, now: float) -> None:
        return


class _OpenForEver(Load):
    """A ticket that another loader answered first stays open in the books."""

    def settled(self, loader: int, samples: int, now: float) -> None:
        if samples:
            super().settled(loader, samples, now)


def _with_load(options: CoreOptions, now: float) -> Core:
    core = Core(options, now)
    core.pace.load = _OpenForEver(options, now)
    return core


STRAGGLER_MUTANTS: dict[str, MakeCore] = {
    "hedge-counted-twice": _HedgeCountedTwice,
    "hedge-uncounted": with_tickets(_HedgeUncounted),
    "hedge-without-budget": _NoBudget,
    "hedge-at-cold-start": _ColdHedge,
    "latency-never-updated": _NoMeasure,
    "no-backoff": _NoBackoff,
    "no-takeover": _NoTakeover,
    "takeover-without-return": _NoReturn,
    "takeover-without-its-tickets": with_tickets(_NoMove),
    "no-probe": with_fleet(_NoProbe),
    "open-for-ever": _with_load,
}
"""Name -> what stands in for the core."""
