"""What is known of the loaders' pace, and what follows from it: waits, hedges, and who is home to how many lanes. Pure."""

from __future__ import annotations

from collections.abc import Callable

from stoker_proto.wire.messages import Ticket
from trainer.feed.client.hedging import HedgeBudget
from trainer.feed.client.latency import ENOUGH, Latencies
from trainer.feed.client.load import Load
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.standing import Standings
from trainer.feed.client.work import Ask

_MOST_PATIENCE = 4
"""A ticket's deadline doubles from round to round up to so many times the first, or to the longest deadline: a loader may need
longer than thought, but what was lost in an outage must be asked for again soon after, long before the data deadline."""


class Balance:
    """Of one rank. Told of every ask and how it ended."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        self._options = options
        self.latencies = Latencies(options)
        self.load = Load(options, now)
        self.standings = Standings(options)
        self.budget = HedgeBudget(options.hedge_share)
        self._seen = [0] * len(options.addresses)  # answers of each loader when its share was last changed

    # -- asks

    def asked(self, loader: int, ticket: Ticket, rounds: int, now: float) -> Ask:
        """A ticket goes to a loader; rounds: how often all loaders had been tried."""
        self.load.asked(loader, now)
        hedge_s, deadline_s = self._waits(loader, ticket, rounds)
        look_at = now + min(hedge_s, deadline_s, self._options.shortest_deadline_s)
        return Ask(loader, now, now + hedge_s, now + deadline_s, look_at)

    def owed(self, ask: Ask, ticket: Ticket, rounds: int, now: float) -> None:
        """It is open for long: what was learned since it was asked may shorten the wait."""
        hedge_s, deadline_s = self._waits(ask.loader, ticket, rounds)
        ask.hedge_at = min(ask.hedge_at, ask.asked_at + hedge_s)
        ask.deadline = min(ask.deadline, ask.asked_at + deadline_s)
        ask.look_at = min(ask.deadline, now + self._options.shortest_deadline_s)

    def _waits(self, loader: int, ticket: Ticket, rounds: int) -> tuple[float, float]:
        hedge_s, first_s = self.latencies.waits(loader, ticket)
        longest_s = max(_MOST_PATIENCE * first_s, self._options.ticket_deadline_s)
        return hedge_s, min(first_s * 2.0 ** min(rounds, 30), longest_s)

    def answered(self, ask: Ask, ticket: Ticket, now: float) -> None:
        """Its piece came first, and no other is waited for any more."""
        self.load.settled(ask.loader, ticket.count, now)
        self.latencies.answered(ask.loader, ticket, now - ask.asked_at)

    def beaten(self, ask: Ask, now: float) -> None:
        """Another loader's piece came first."""
        self.load.settled(ask.loader, 0, now)
        if not ask.late:
            self.latencies.owed(ask.loader, now - ask.asked_at)

    def ended(self, ask: Ask, now: float) -> None:
        """It was answered otherwise, or is wanted no more."""
        self.load.settled(ask.loader, 0, now)

    def expired(self, ask: Ask, now: float) -> None:
        """It is past its deadline, and may still be answered."""
        self.latencies.owed(ask.loader, now - ask.asked_at)

    def gone(self, loader: int) -> None:
        """The incarnation is gone, after all its asks have ended."""
        self.latencies.forget(loader)
        self.load.forget(loader)

    # -- lanes

    def relieve(self, loader: int, level: int, now: float) -> bool:
        """Lower a loader's share of the lanes to this level, at least by one; whether that changed anything."""
        changed = self.standings.relieve(loader, max(level, self.standings.of[loader].level + 1), now)
        if changed:
            self._seen[loader] = self.latencies.of[loader].num_seen
        return changed

    def look(self, now: float, helps: Callable[[int, int], bool]) -> list[int]:
        """Relieve the overloaded, give lanes back where a hold is over; loaders whose share was lowered. helps: as in `Load`."""
        found = self.load.look(now, helps)
        if found is None:
            return []
        for loader in self.standings.due_back(now):
            measured = self.latencies.of[loader].num_seen - self._seen[loader] >= ENOUGH
            still_slow = measured and self.latencies.is_slow(loader)
            self.standings.give_back(loader, now, still_slow=still_slow)
            self._seen[loader] = self.latencies.of[loader].num_seen
            if not still_slow:
                self.load.renew(loader)
        return [loader for loader, level in found if self.relieve(loader, level, now)]
