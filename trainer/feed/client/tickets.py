"""The tickets of one rank: sent, sent again, answered, and delivered in order. Pure: time is an argument.

A ticket keeps its number over all attempts, and numbers are never used twice. So the first answer counts, whichever loader
sends it; later answers find the ticket done or gone and are dropped.

Where loaders hold parts of an entry, one that lacks a shard answers with the shard of each row. The ticket is then divided into
parts by who holds the rows; each part is a ticket of its own, and their pieces are merged:

    ticket 7, rows 0-7   ->  SHARDS 0 0 1 0 1 1 0 0  ->  ticket 8, rows 0 1 3 6 7 (loader a)  ticket 9, rows 2 4 5 (loader b)

A part that no loader can answer alone any more is divided again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import DataError, DeadlineError, LocalProtocolError, StokerError
from stoker_proto.wire.messages import Failure, Piece, Shards, Ticket
from stoker_proto.wire.peer_text import plain
from stoker_proto.wire.row_bits import MAX_CHOSEN, pack_rows
from trainer.feed.client.merge import merge_pieces
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.pace import Attempt, Pace
from trainer.feed.client.schedule import Slice

_MAX_MESSAGE = 2000  # characters of what a loader says of bad data
_FIRST_RETRY_S = 0.25
_LONGEST_RETRY_S = 8.0

_NOBODY = -1

Choices = Callable[[int, int, frozenset[int]], list[int]]
"""(lane, epoch, shards that are needed) -> loaders that can answer, best first. Without shards: they are not known."""


@dataclass(slots=True)
class PendingTicket:
    """A ticket that is not delivered yet."""

    ticket: Ticket
    attempts: list[Attempt] = field(default_factory=list)
    """Those that may still be answered."""
    num_attempts: int = 0
    tried: set[int] = field(default_factory=set)
    """Loaders that failed this ticket in this round."""
    rounds: int = 0
    """How often all loaders that can answer were tried."""
    failed: bool = False
    """A loader of this round answered with a failure; the others only missed their deadlines."""
    suspects: set[int] = field(default_factory=set)
    """Loaders that went away while they worked on this. If another incarnation comes back, the first one died."""
    deaths: int = 0
    """Loaders and workers that ended while they worked on this."""
    retry_at: float = 0.0
    """No new attempt before this time."""
    history: deque[str] = field(default_factory=lambda: deque(maxlen=3))
    """How the last attempts ended."""
    outcome: Piece | StokerError | None = None
    shards: NDArray[np.int64] | None = None
    """Shard of each wanted row, once a loader has told."""
    needed: frozenset[int] = frozenset()
    """The different ones among them."""
    parts: list[PendingTicket] = field(default_factory=list)
    """Of a divided ticket, which is itself not sent any more."""
    whole: PendingTicket | None = None
    """Of a part: the ticket that was divided."""
    rows: NDArray[np.int64] | None = None
    """Of a part: the places of its rows among those of the whole, ascending."""

    @property
    def asked(self) -> list[PendingTicket]:
        """The tickets that are sent for it: itself, or its parts."""
        return self.parts or [self]

    def __str__(self) -> str:
        """Its place in the stream, and how the last attempts ended."""
        asked, tried = self.ticket, "; ".join(self.history)
        samples = f"samples {asked.start} to {asked.start + asked.count - 1}"
        place = f"lane {asked.lane}, {samples} of {asked.split} epoch {asked.epoch}"
        return f"{place} ({tried})" if tried else place


@dataclass(slots=True)
class PendingBatch:
    """A micro-batch that is not delivered yet."""

    slice: Slice
    tickets: list[PendingTicket]


@dataclass(slots=True)
class TicketCounters:
    """Of one rank, since its start."""

    tickets: int = 0
    """Sent, each counted once."""
    reissued: int = 0
    """Sent again: the loader went away, failed, or did not answer in time."""
    hedges: int = 0
    """Sent to a second loader while the first may still answer."""
    hedges_won: int = 0
    """Hedges that the second loader answered first."""
    takeovers: int = 0
    """How often other loaders took over lanes of a slow one."""
    duplicates: int = 0
    """Answers dropped, because the ticket already had one or is no longer needed."""


class Tickets:
    """All tickets that are not delivered yet, in the order of delivery."""

    def __init__(self, options: CoreOptions, pace: Pace, addresses: Sequence[str]) -> None:
        """pace: hears of every attempt, and says how long to wait for it. addresses: by loader number; may grow."""
        self.options, self._pace, self._addresses = options, pace, addresses
        self.batches: deque[PendingBatch] = deque()  # not delivered, in order
        self._pending: dict[int, PendingTicket] = {}  # by ticket number, in order: the tickets of `batches`
        self._next_ticket = 0
        self._look_at = 0.0  # no attempt needs a look before this time
        self.counters = TicketCounters()

    @property
    def num_tickets(self) -> int:
        """Tickets not yet delivered, divided or not: bounds the pieces held here and at the loaders."""
        return sum(len(batch.tickets) for batch in self.batches)

    @property
    def oldest(self) -> PendingTicket | None:
        """The first ticket without an answer, for which the whole rank waits."""
        tickets = (pending for batch in self.batches for pending in batch.tickets if pending.outcome is None)
        return next((part for pending in tickets for part in pending.asked if part.outcome is None), None)

    def room_for(self, count: int) -> bool:
        """Whether `count` more tickets fit below the limit; with none pending, any micro-batch fits."""
        return not self.batches or self.num_tickets + count <= self.options.max_tickets

    def add(self, slice_: Slice) -> None:
        """Append the tickets of the next micro-batch; `assign` sends them."""
        tickets = []
        for run in slice_.runs:
            ticket = Ticket(
                ticket=self._next_ticket,
                split=self.options.split,
                epoch=run.epoch,
                lane=run.lane,
                start=run.start,
                count=run.count,
            )
            self._next_ticket += 1
            tickets.append(PendingTicket(ticket))
            self._pending[ticket.ticket] = tickets[-1]
        self.batches.append(PendingBatch(slice_, tickets))

    def join(self, loader: int) -> None:
        """The number stands for another loader now, which has tried nothing yet."""
        for pending in self._pending.values():
            pending.tried.discard(loader)

    def clear(self, now: float) -> None:
        """Forget all tickets; answers that come later are dropped."""
        for pending in self._pending.values():
            for attempt in pending.attempts:
                self._pace.ended(attempt, now)
        self.batches.clear()
        self._pending.clear()

    # -- answers

    def piece(self, loader: int, piece: Piece, now: float) -> str | None:
        """Accept a piece. Returns what is wrong with it where it does not fit its ticket: the loader must be excluded then."""
        pending = self._find_pending(loader, piece.ticket)
        if pending is None:
            return None
        if piece.num_rows != pending.ticket.num_rows:
            return f"answered a ticket of {pending.ticket.num_rows} rows with {piece.num_rows}"
        pending.outcome = piece
        for attempt in pending.attempts:
            if attempt.loader == loader:
                self._pace.answered(attempt, pending.ticket, now)
                self.counters.hedges_won += attempt.is_hedge
            else:
                self._pace.beaten(attempt, now)
        pending.attempts.clear()
        self._merge(pending)
        return None

    def shards(self, loader: int, answer: Shards, now: float) -> str | None:
        """Accept the shards of a ticket's rows, some of which are not at that loader. Returns what is wrong, as `piece`."""
        pending = self._find_pending(loader, answer.ticket)
        if pending is None:
            return None
        if pending.whole is not None:
            return "answered with the shards of rows that it says it holds"
        if len(answer.shards) != pending.ticket.count or min(answer.shards) < 0:
            return f"answered a ticket of {pending.ticket.count} rows with the shards of {len(answer.shards)}"
        for attempt in pending.attempts:
            self._pace.ended(attempt, now)
        pending.attempts.clear()
        pending.shards = np.array(answer.shards, np.int64)
        return None

    def failure(self, loader: int, failure: Failure, now: float) -> None:
        """Accept a FAILURE: bad data ends the run when the ticket's turn comes; anything else leads to another attempt."""
        pending = self._find_pending(loader, failure.ticket)
        if pending is None:
            return
        address = self._addresses[loader]
        if failure.reason == "data":
            pending.outcome = DataError(plain(failure.message, _MAX_MESSAGE))
        elif failure.reason == "rejected":
            pending.outcome = LocalProtocolError(
                f"the loader at {address} rejects {pending.ticket}: {plain(failure.message)}"
            )
        else:
            pending.failed = True
            pending.deaths += failure.reason == "died"
            self._end(pending, loader, f"{address} {plain(failure.reason, 40)}: {plain(failure.message)}", now)
            return
        for attempt in pending.attempts:
            self._pace.ended(attempt, now)
        pending.attempts.clear()
        self._merge(pending)

    def loader_gone(self, loader: int, why: str, now: float) -> None:
        """The loader is gone: its tickets must go to other loaders."""
        for pending in self._pending.values():
            if any(attempt.loader == loader for attempt in pending.attempts):
                pending.suspects.add(loader)
                self._end(pending, loader, why, now)
        self._pace.gone(loader)

    def loader_back(self, loader: int, now: float, *, died: bool) -> None:
        """The loader may be asked again at once for what it failed at. died: this is another incarnation than before."""
        for pending in self._pending.values():
            pending.deaths += died and loader in pending.suspects
            pending.suspects.discard(loader)
            pending.tried.discard(loader)
            pending.retry_at = min(pending.retry_at, now)

    def _find_pending(self, loader: int, number: int) -> PendingTicket | None:
        pending = self._pending.get(number)
        if (
            pending is None
            or pending.outcome is not None
            or all(attempt.loader != loader for attempt in pending.attempts)
        ):
            self.counters.duplicates += 1
            return None
        return pending

    @staticmethod
    def _merge(part: PendingTicket) -> None:
        """A part has an outcome: the whole has one too, if this is an error or the last piece."""
        whole = part.whole
        if whole is None or whole.outcome is not None:
            return
        if isinstance(part.outcome, StokerError):
            whole.outcome = part.outcome
            return
        pieces = [
            (one.rows, one.outcome) for one in whole.parts if one.rows is not None and isinstance(one.outcome, Piece)
        ]
        if len(pieces) == len(whole.parts):
            try:
                whole.outcome = merge_pieces(whole.ticket.ticket, pieces)
            except StokerError as error:
                whole.outcome = error

    def _end(self, pending: PendingTicket, loader: int, why: str, now: float) -> None:
        for attempt in [attempt for attempt in pending.attempts if attempt.loader == loader]:
            self._pace.ended(attempt, now)
            pending.attempts.remove(attempt)
        pending.tried.add(loader)
        pending.history.append(why)
        pending.retry_at = now

    # -- asking

    def assign(self, choices: Choices, now: float) -> list[tuple[int, Ticket]]:
        """(loader, ticket) to be sent now. Raises DeadlineError."""
        sends = []
        pending_tickets = list(self._pending.values())
        for pending in pending_tickets:  # parts come at its end
            attempts = pending.attempts
            if pending.outcome is not None or (attempts and not attempts[-1].late):  # most tickets
                continue
            if any(not attempt.late for attempt in attempts) or now < pending.retry_at:
                continue
            able = choices(pending.ticket.lane, pending.ticket.epoch, pending.needed)
            if pending.shards is not None and not attempts and (pending.whole is None or not able):
                parts = self._divide(pending, pending.shards, choices)
                pending_tickets += parts
                if parts:
                    continue
            fresh = [loader for loader in able if loader not in pending.tried]
            if able and not fresh:
                if not self._next_round(pending, now):
                    continue
                fresh = able
            if not fresh:
                continue
            if pending.num_attempts:
                self.counters.reissued += 1
            else:
                self.counters.tickets += 1
                self._pace.budget.ticket()
            sends.append((fresh[0], self._ask(pending, fresh[0], now).ticket))
        return sends

    def _divide(self, pending: PendingTicket, shards: NDArray[np.int64], choices: Choices) -> list[PendingTicket]:
        """The parts of a ticket by who is asked for their rows first. None where that is the part which it is already."""
        asked = pending.ticket
        first: dict[int, int] = {}
        for shard in np.unique(shards).tolist():
            able = choices(asked.lane, asked.epoch, frozenset((shard,)))
            first[shard] = able[0] if able else _NOBODY
        rows = np.arange(asked.count) if pending.rows is None else pending.rows
        groups: dict[tuple[int, int], list[int]] = {}
        for number, (row, shard) in enumerate(zip(rows.tolist(), shards.tolist(), strict=True)):
            groups.setdefault((first[shard], row // MAX_CHOSEN), []).append(number)
        whole = pending.whole or pending
        if whole is not pending and len(groups) == 1:
            return []
        parts = [self._part(whole, pending, rows[numbers], shards[numbers]) for numbers in groups.values()]
        whole.parts = sorted(
            [*(part for part in whole.parts if part is not pending), *parts], key=lambda part: part.ticket.start
        )
        del self._pending[asked.ticket]
        self._pending |= {part.ticket.ticket: part for part in parts}
        return parts

    def _part(
        self, whole: PendingTicket, before: PendingTicket, rows: NDArray[np.int64], shards: NDArray[np.int64]
    ) -> PendingTicket:
        """A ticket of some rows of a whole; before: what it is divided from."""
        asked, first, count = whole.ticket, int(rows[0]), int(rows[-1] - rows[0]) + 1
        ticket = replace(
            asked,
            ticket=self._next_ticket,
            start=asked.start + first,
            count=count,
            rows=pack_rows(rows - first, count),
        )
        self._next_ticket += 1
        return PendingTicket(
            ticket,
            suspects=set(before.suspects),
            deaths=before.deaths,
            history=before.history.copy(),
            shards=shards,
            needed=frozenset(shards.tolist()),
            whole=whole,
            rows=rows,
        )

    def _next_round(self, pending: PendingTicket, now: float) -> bool:
        """All loaders that can answer have failed the ticket: returns whether to try them again at once, else after a pause."""
        failed, pending.failed = pending.failed, False
        pending.tried.clear()
        pending.rounds += 1
        if pending.attempts and not failed:  # all are only late: asking again puts no load on a loader that fails
            return True
        pause_s = _FIRST_RETRY_S * 2.0 ** min(pending.rounds, 30)
        pending.retry_at = now + min(pause_s, _LONGEST_RETRY_S, self.options.feed.ticket_deadline_s)
        return False

    def _ask(self, pending: PendingTicket, loader: int, now: float, *, is_hedge: bool = False) -> PendingTicket:
        again = [attempt for attempt in pending.attempts if attempt.loader == loader]
        pending.num_attempts += not again  # a late loader still works on it: that is no new attempt
        if pending.deaths >= self.options.max_deaths:
            raise DeadlineError(
                f"{pending.deaths} loaders or workers ended, one after the other, while they worked on {pending}; look into the "
                "loaders' logs for what these samples, or others asked for with them, do to them"
            )
        for attempt in again:
            self._pace.ended(attempt, now)
            pending.attempts.remove(attempt)
        attempt = self._pace.asked(loader, pending.ticket, pending.rounds, now)
        attempt.is_hedge = is_hedge
        pending.attempts.append(attempt)
        self._look_at = min(self._look_at, attempt.look_at)
        return pending

    def hedge(self, num_batches: int, choices: Choices, now: float) -> list[tuple[int, Ticket]]:
        """(loader, ticket) to be sent to a second loader: late tickets of the first micro-batches, as far as the budget goes.

        choices: without loaders that may be slow themselves.
        """
        sends: list[tuple[int, Ticket]] = []
        if num_batches <= 0 or not self._pace.budget.has_any:
            return sends
        for batch in islice(self.batches, num_batches):
            for pending in (part for one in batch.tickets for part in one.asked):
                if pending.outcome is not None or len(pending.attempts) != 1 or now < pending.attempts[0].hedge_at:
                    continue
                if pending.deaths:  # perhaps loaders die of this ticket: one at a time
                    continue
                able = choices(pending.ticket.lane, pending.ticket.epoch, pending.needed)
                fresh = [
                    loader for loader in able if loader != pending.attempts[0].loader and loader not in pending.tried
                ]
                if fresh and not pending.attempts[0].late and self._pace.budget.spend():
                    self.counters.hedges += 1
                    sends.append((fresh[0], self._ask(pending, fresh[0], now, is_hedge=True).ticket))
        return sends

    def overdue(self, now: float) -> tuple[set[int], set[int]]:
        """(loaders with an answer that takes unusually long, loaders that missed a deadline: their tickets may go to others)."""
        unusual: set[int] = set()
        expired: set[int] = set()
        if now < self._look_at:
            return unusual, expired
        self._look_at = float("inf")
        for pending in self._pending.values():
            for attempt in pending.attempts:
                if now >= attempt.look_at:
                    unusual.add(attempt.loader)
                    self._pace.still_open(attempt, pending.ticket, pending.rounds, now)
                if not attempt.late and now >= attempt.deadline:
                    expired.add(attempt.loader)
                    self._pace.expired(attempt, now)
                    self._mark_late(pending, attempt, "did not answer in time")
                self._look_at = min(self._look_at, attempt.look_at)
        return unusual, expired

    def give_up_on(self, silent: set[int], choices: Choices) -> None:
        """Ask other loaders for the tickets of silent ones, where there are others. choices: silent loaders last."""
        for pending in self._pending.values():
            for attempt in pending.attempts:
                if not attempt.late and attempt.loader in silent:
                    able = choices(pending.ticket.lane, pending.ticket.epoch, pending.needed)
                    if able and able[0] not in silent:
                        self._mark_late(pending, attempt, "is silent")

    def move(self, loader: int, choices: Choices) -> None:
        """Open tickets of lanes that the loader has lost go to the lanes' new homes."""
        for pending in self._pending.values():
            for attempt in pending.attempts:
                if not attempt.late and attempt.loader == loader:
                    able = choices(pending.ticket.lane, pending.ticket.epoch, pending.needed)
                    if able and able[0] != loader:
                        self._mark_late(pending, attempt, "lost the lane to a faster loader")

    def _mark_late(self, pending: PendingTicket, attempt: Attempt, why: str) -> None:
        attempt.late, attempt.look_at = True, float("inf")
        pending.tried.add(attempt.loader)
        pending.history.append(f"{self._addresses[attempt.loader]} {why}")

    def next_time(self, now: float, num_batches: int) -> float:
        """The next time after `now` at which a deadline or a pause ends, or a ticket of the first micro-batches may be hedged."""
        first = self._look_at
        for pending in self._pending.values():
            if now < pending.retry_at < first and pending.outcome is None:
                first = pending.retry_at
        if num_batches > 0 and self._pace.budget.has_any:
            for batch in islice(self.batches, num_batches):
                for pending in (part for one in batch.tickets for part in one.asked):
                    for attempt in pending.attempts:
                        if now < attempt.hedge_at < first and not attempt.late:
                            first = attempt.hedge_at
        return first

    # -- delivery

    def deliver(self) -> tuple[list[tuple[Slice, list[Piece]]], StokerError | None]:
        """The complete micro-batches that are next in order, and the error of the one after them, if it has one."""
        done: list[tuple[Slice, list[Piece]]] = []
        while self.batches:
            pieces = []
            for pending in self.batches[0].tickets:
                if isinstance(pending.outcome, StokerError):
                    return done, pending.outcome
                if pending.outcome is None:
                    return done, None
                pieces.append(pending.outcome)
            batch = self.batches.popleft()
            for pending in batch.tickets:
                for part in pending.asked:
                    del self._pending[part.ticket.ticket]
            done.append((batch.slice, pieces))
        return done, None
