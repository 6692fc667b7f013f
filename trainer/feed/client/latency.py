"""How long loaders take to answer, and how long it is therefore worth waiting for one. Pure: time is an argument.

What counts as long is not a matter of the loader that is waited for alone: one that hangs or slows down would earn itself
longer and longer waits. So the measure is the larger of what this loader usually takes (the median, which stays while fewer
than half of the recent answers are bad) and of what the best of the others takes at worst (a high quantile).
"""

from __future__ import annotations

from collections import deque

from stoker_proto.wire.messages import Ticket
from trainer.feed.client.options import CoreOptions

_RECENT = 64
"""Answers of a loader that the estimate looks back on."""
ENOUGH = 8
"""With fewer answers than this nothing is concluded: the first of them wait for the loader's first windows."""
_EVERY = 8
"""Answers after which the quantiles are worked out again."""
_HIGH = 0.95
_DEADLINE = 8.0
"""A ticket's deadline, in units of the measure."""
_COLD = 4.0
"""So many times longer may the first answer for a lane take: its window must be read and decoded first."""


class Latency:
    """Of one loader's recent answers, in seconds."""

    __slots__ = ("_recent", "high", "lately", "middle", "num_seen")

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.num_seen = 0
        self.middle = self.high = self.lately = 0.0

    @property
    def known(self) -> bool:
        """Whether there were enough answers to say anything."""
        return self.num_seen >= ENOUGH

    def observe(self, seconds: float) -> None:
        """One answer; or, for one given up on, the time that it has taken at least."""
        self._recent.append(seconds)
        self.num_seen += 1
        if self.num_seen < ENOUGH or self.num_seen % _EVERY == 0:
            ordered, newest = sorted(self._recent), sorted(list(self._recent)[-_EVERY:])
            self.middle, self.high = ordered[len(ordered) // 2], ordered[int(_HIGH * len(ordered))]
            self.lately = newest[len(newest) // 2]


class Latencies:
    """Of all loaders of one rank, with the lanes that each has answered for: it has their windows at hand."""

    def __init__(self, options: CoreOptions) -> None:
        self._options = options
        self.of = [Latency() for _ in options.addresses]
        self._warm: list[dict[int, int]] = [{} for _ in options.addresses]  # loader -> lane -> its newest epoch

    def answered(self, loader: int, ticket: Ticket, seconds: float) -> None:
        """A piece came."""
        self.of[loader].observe(seconds)
        warm = self._warm[loader]
        warm[ticket.lane] = max(warm.get(ticket.lane, 0), ticket.epoch)

    def owed(self, loader: int, seconds: float) -> None:
        """What was asked of the loader has taken so long and is waited for no more."""
        self.of[loader].observe(seconds)

    def forget(self, loader: int) -> None:
        """The incarnation is gone: what comes after it begins cold."""
        self.of[loader] = Latency()
        self._warm[loader].clear()

    def measure(self, loader: int) -> float | None:
        """Seconds that an answer may well take, or None where too few came, of whichever loader, to tell."""
        own = self.of[loader]
        others = [latency for number, latency in enumerate(self.of) if number != loader and latency.num_seen]
        if sum(latency.num_seen for latency in others) >= ENOUGH:
            return max(own.middle, min(latency.high for latency in others))
        return own.high if own.known else None

    def is_slow(self, loader: int) -> bool:
        """Whether its last answers took twice as long as those of another, who is not the busier for it."""
        own = self.of[loader]
        others = [latency.lately for number, latency in enumerate(self.of) if number != loader and latency.known]
        return own.known and bool(others) and own.lately > 2 * max(min(others), self._options.shortest_hedge_s / 4)

    def waits(self, loader: int, ticket: Ticket) -> tuple[float, float]:
        """Seconds after which another loader is asked as well (a hedge), and after which it is asked instead (the deadline)."""
        options, measure = self._options, self.measure(loader)
        if measure is None:
            return float("inf"), options.ticket_deadline_s
        newest = self._warm[loader].get(ticket.lane, -1)
        patience = 1.0 if ticket.epoch <= newest <= ticket.epoch + 1 else _COLD
        hedge_s = patience * max(options.hedge_multiple * measure, options.shortest_hedge_s)
        if not self.of[loader].known:
            hedge_s = float("inf")
        deadline_s = patience * max(_DEADLINE * measure, options.shortest_deadline_s)
        return hedge_s, min(deadline_s, options.ticket_deadline_s)
