"""Oracles over what a rank asks of whom: hedges within their budget and never of a cold loader, backoff, nothing counted twice.

They keep books of their own; of the core they read only what it believes of connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker_proto.wire.messages import Failure, Piece, Ticket
from stoker_proto.wire.row_bits import unpack_rows
from tests.faults.parts import shards_of
from tests.faults.reference import LANES, Violation
from trainer.feed.client.epochs import Pass
from trainer.feed.client.fleet import State
from trainer.feed.client.pace import BURST

if TYPE_CHECKING:
    from tests.faults.ranks import SimulatedRank


class AskOracle:
    """Of one rank in one life."""

    def __init__(self, rank: SimulatedRank) -> None:
        self.rank, options = rank, rank.options
        count = len(options.addresses)
        self.num_tickets = self.num_hedges = self.num_early = 0
        self._asks: dict[int, dict[int, float]] = {}  # ticket -> loader -> when
        self._answers = [0] * count  # pieces of each loader since it joined
        self._failures, self._joined_at, self._barred_until = [0] * count, [0.0] * count, [0.0] * count
        self.first_asked_at = [0.0] * count
        """Loader -> when it was last the first to be asked for a ticket."""

    # -- what the rank is told

    def joined(self, loader: int) -> None:
        """A WELCOME on a new connection."""
        options, now = self.rank.options, self.rank.world.now
        self._joined_at[loader], self._answers[loader] = now, 0
        if self._failures[loader] >= 2:
            backoff_s = options.first_backoff_s * 2 ** (self._failures[loader] - 2)
            self._barred_until[loader] = now + min(backoff_s, options.feed.backoff_s)

    def lost(self, loader: int) -> None:
        """What was asked on a connection is answered no more."""
        for asks in self._asks.values():
            asks.pop(loader, None)

    def failed(self, loader: int) -> None:
        """A loader that was ready is lost, and had not announced it."""
        steady = self.rank.world.now - self._joined_at[loader] >= self.rank.options.steady_s
        self._failures[loader] = 1 if steady else self._failures[loader] + 1

    def arrived(self, loader: int, message: object) -> None:
        """A message from a loader."""
        self._answers[loader] += isinstance(message, Piece)
        if isinstance(message, Failure):
            self._asks.get(message.ticket, {}).pop(loader, None)

    # -- what it asks

    def asked(self, loader: int, ticket: Ticket, *, is_hedge: bool) -> None:
        """A ticket goes out."""
        options, now = self.rank.options, self.rank.world.now
        is_new = ticket.ticket not in self._asks
        before = self._asks.setdefault(ticket.ticket, {})
        if is_hedge:
            self.num_hedges += 1
            if not before or loader in before:
                raise Violation("hedges", f"{self.rank.name} hedges {ticket} with {loader}, asked before: {before}")
            if all(self._answers[other] == 0 for other in before):
                raise Violation("cold start", f"{self.rank.name} hedges {ticket}, though {before} only begins")
            if self.num_hedges > options.feed.hedge_share * self.num_tickets + BURST + 1e-9:
                raise Violation("hedges", f"{self.rank.name} sent {self.num_hedges} for {self.num_tickets} tickets")
        elif not is_new:
            for silent in [other for other in before if not self._lives(other)]:
                before[silent] = float("-inf")  # given up on, and so it stays where it says something soon after
            self.num_early += any(now - at < options.shortest_deadline_s for at in before.values())
            taken_over = self.rank.core.tickets.counters.takeovers * max(options.max_tickets, options.micro_batch_size)
            if self.num_early > taken_over:
                raise Violation("hedges", f"{self.rank.name} asked for {ticket} again at once, and calls it no hedge")
        else:
            self.num_tickets += 1
            self.first_asked_at[loader] = now
            self._check_backoff(loader, ticket)
        before[loader] = now

    def _lives(self, loader: int) -> bool:
        fleet, now = self.rank.core.fleet, self.rank.world.now
        known = fleet.loaders[loader]
        return known.state is State.READY and not known.draining and not fleet.silent(loader, now)

    def _check_backoff(self, loader: int, ticket: Ticket) -> None:
        now = self.rank.world.now
        if now >= self._barred_until[loader]:
            return
        for other, known in enumerate(self.rank.core.fleet.loaders):
            holds = Pass(ticket.epoch, ticket.lane // LANES) in known.answered and self._has_rows(other, ticket)
            if holds and self._lives(other) and now >= self._barred_until[other]:
                raise Violation(
                    "backoff",
                    f"{self.rank.name} asks {loader} first for {ticket}, which flaps, though {other} is there",
                )

    def _has_rows(self, loader: int, ticket: Ticket) -> bool:
        """Whether the loader holds the shards of the rows, where the ticket is for some rows."""
        lacks = self.rank.trainer.loaders[loader].lacks
        if not ticket.rows or not lacks:
            return True
        shards = shards_of(ticket.epoch, ticket.lane, ticket.start, ticket.count)
        return not any(shards[row] in lacks for row in unpack_rows(ticket.rows, ticket.count).tolist())

    def delivered(self, ticket: int) -> None:
        """A piece was handed on."""
        self._asks.pop(ticket, None)

    def began_anew(self) -> None:
        """All that was asked for is forgotten."""
        self._asks.clear()

    def ended(self) -> None:
        """All is trained: the core's own books must say the same, and nothing be open in them."""
        core, name = self.rank.core, self.rank.name
        counters = core.tickets.counters
        ours = (self.num_tickets, self.num_hedges)
        if (counters.tickets, counters.hedges) != ours or counters.hedges_won > counters.hedges:
            raise Violation("counts", f"{name} counted {counters}; tickets and hedges were {ours}")
        if any(load.num_open for load in core.pace.load.of):
            raise Violation("counts", f"{name} has open tickets in its books: {core.pace.load.of}")
