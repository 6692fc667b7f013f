"""The tickets of one rank: asked, asked again, answered, and delivered in order. Pure: time is an argument.

A ticket keeps its number over all attempts, so that whichever answer comes first is the answer, whoever gives it; every
later one finds the ticket done, or gone, and is dropped. Numbers are never used twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice

from stoker_proto.errors import DataError, DeadlineError, LocalProtocolError, StokerError
from stoker_proto.wire.messages import Failure, Piece, Ticket
from trainer.feed.client.balance import Balance
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.schedule import Slice
from trainer.feed.client.work import Ask, Counters, Job, Work

_FIRST_RETRY_S = 0.25
_LONGEST_RETRY_S = 8.0

Choices = Callable[[int, int], list[int]]
"""(lane, epoch) -> able loaders, best first."""


class Desk:
    """Tickets in the order in which they are delivered."""

    def __init__(self, options: CoreOptions, balance: Balance) -> None:
        """balance: told of every ask, says how long each is waited for."""
        self.options, self._balance = options, balance
        self.jobs: deque[Job] = deque()  # not delivered, in order
        self._works: dict[int, Work] = {}  # ticket number -> work, in order; those of `jobs`
        self._next_ticket = 0
        self._look_at = 0.0  # no ask's time comes before
        self.counters = Counters()

    @property
    def num_tickets(self) -> int:
        """Tickets not yet delivered: the pieces that may be held here and at the loaders."""
        return len(self._works)

    @property
    def oldest(self) -> Work | None:
        """What everything waits for: the first ticket without an answer."""
        return next((work for work in self._works.values() if work.outcome is None), None)

    def room_for(self, count: int) -> bool:
        """Whether so many more tickets may be asked for; an empty desk takes any micro-batch."""
        return not self._works or self.num_tickets + count <= self.options.max_tickets

    def add(self, slice_: Slice) -> None:
        """Put the tickets of the next micro-batch down."""
        works = []
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
            works.append(Work(ticket))
            self._works[ticket.ticket] = works[-1]
        self.jobs.append(Job(slice_, works))

    def clear(self, now: float) -> None:
        """Forget everything asked for; answers still under way will be dropped."""
        for work in self._works.values():
            for ask in work.asks:
                self._balance.ended(ask, now)
        self.jobs.clear()
        self._works.clear()

    # -- answers

    def piece(self, loader: int, piece: Piece, now: float) -> str | None:
        """Take a piece in; why the loader must not be asked any more, if it is not what the ticket says."""
        work = self._open_work(loader, piece.ticket)
        if work is None:
            return None
        if piece.num_rows != work.ticket.count:
            return f"answered a ticket of {work.ticket.count} rows with {piece.num_rows}"
        work.outcome = piece
        for ask in work.asks:
            if ask.loader == loader:
                self._balance.answered(ask, work.ticket, now)
                self.counters.hedges_won += ask.is_hedge
            else:
                self._balance.beaten(ask, now)
        work.asks.clear()
        return None

    def failure(self, loader: int, failure: Failure, now: float) -> None:
        """Take a FAILURE in: the run's error when its turn comes, or another attempt."""
        work = self._open_work(loader, failure.ticket)
        if work is None:
            return
        address = self.options.addresses[loader]
        if failure.reason == "data":
            work.outcome = DataError(failure.message)
        elif failure.reason == "rejected":
            work.outcome = LocalProtocolError(f"the loader at {address} rejects {work.ticket}: {failure.message}")
        else:
            work.denied = True
            work.deaths += failure.reason == "died"
            self._end(work, loader, f"{address} {failure.reason}: {failure.message}", now)
            return
        for ask in work.asks:
            self._balance.ended(ask, now)
        work.asks.clear()

    def loader_gone(self, loader: int, why: str, now: float) -> None:
        """All that was asked of this loader must be asked elsewhere."""
        for work in self._works.values():
            if any(ask.loader == loader for ask in work.asks):
                work.suspects.add(loader)
                self._end(work, loader, why, now)
        self._balance.gone(loader)

    def loader_back(self, loader: int, now: float, *, died: bool) -> None:
        """What the loader failed at may be asked of it again, at once. died: it is another incarnation than was there before."""
        for work in self._works.values():
            work.deaths += died and loader in work.suspects
            work.suspects.discard(loader)
            work.tried.discard(loader)
            work.retry_at = min(work.retry_at, now)

    def _open_work(self, loader: int, number: int) -> Work | None:
        work = self._works.get(number)
        if work is None or work.outcome is not None or all(ask.loader != loader for ask in work.asks):
            self.counters.duplicates += 1
            return None
        return work

    def _end(self, work: Work, loader: int, why: str, now: float) -> None:
        for ask in [ask for ask in work.asks if ask.loader == loader]:
            self._balance.ended(ask, now)
            work.asks.remove(ask)
        work.tried.add(loader)
        work.history.append(why)
        work.retry_at = now

    # -- asking

    def assign(self, choices: Choices, now: float) -> list[tuple[int, Ticket]]:
        """(loader, ticket) to be sent now. Raises DeadlineError."""
        sends = []
        for work in self._works.values():
            asks = work.asks
            if work.outcome is not None or (asks and not asks[-1].late):  # so it is with most
                continue
            if any(not ask.late for ask in asks) or now < work.retry_at:
                continue
            able = choices(work.ticket.lane, work.ticket.epoch)
            fresh = [loader for loader in able if loader not in work.tried]
            if able and not fresh:
                if not self._next_round(work, now):
                    continue
                fresh = able
            if not fresh:
                continue
            if work.attempts:
                self.counters.reissued += 1
            else:
                self.counters.tickets += 1
                self._balance.budget.ticket()
            sends.append((fresh[0], self._ask(work, fresh[0], now).ticket))
        return sends

    def _next_round(self, work: Work, now: float) -> bool:
        """All able loaders have failed the ticket: whether they may be tried again at once (else after a pause)."""
        denied, work.denied = work.denied, False
        work.tried.clear()
        work.rounds += 1
        if work.asks and not denied:  # they are late, not failed: nothing is hammered by asking again
            return True
        pause_s = _FIRST_RETRY_S * 2.0 ** min(work.rounds, 30)
        work.retry_at = now + min(pause_s, _LONGEST_RETRY_S, self.options.ticket_deadline_s)
        return False

    def _ask(self, work: Work, loader: int, now: float, *, is_hedge: bool = False) -> Work:
        again = [ask for ask in work.asks if ask.loader == loader]
        work.attempts += not again  # who is late works on it still: that is no new attempt
        if work.deaths >= self.options.max_deaths:
            raise DeadlineError(
                f"{work.deaths} loaders or workers ended, one after the other, while they worked on {work}; look into the "
                "loaders' logs for what these samples, or others asked for with them, do to them"
            )
        for ask in again:
            self._balance.ended(ask, now)
            work.asks.remove(ask)
        ask = self._balance.asked(loader, work.ticket, work.rounds, now)
        ask.is_hedge = is_hedge
        work.asks.append(ask)
        self._look_at = min(self._look_at, ask.look_at)
        return work

    def hedge(self, num_jobs: int, choices: Choices, now: float) -> list[tuple[int, Ticket]]:
        """(loader, ticket) to be sent to a second loader, as far as the budget goes: stragglers of the first micro-batches.

        choices: here without loaders that may be slow themselves.
        """
        sends: list[tuple[int, Ticket]] = []
        if num_jobs <= 0 or not self._balance.budget.has_any:
            return sends
        for job in islice(self.jobs, num_jobs):
            for work in job.works:
                if work.outcome is not None or len(work.asks) != 1 or now < work.asks[0].hedge_at:
                    continue
                if work.deaths:  # it may be what they die of: one at a time
                    continue
                able = choices(work.ticket.lane, work.ticket.epoch)
                fresh = [loader for loader in able if loader != work.asks[0].loader and loader not in work.tried]
                if fresh and not work.asks[0].late and self._balance.budget.spend():
                    self.counters.hedges += 1
                    sends.append((fresh[0], self._ask(work, fresh[0], now, is_hedge=True).ticket))
        return sends

    def overdue(self, now: float) -> tuple[set[int], set[int]]:
        """Loaders that owe an answer for longer than usual, and those whose deadline it is: others are asked what they owe."""
        owing: set[int] = set()
        expired: set[int] = set()
        if now < self._look_at:
            return owing, expired
        self._look_at = float("inf")
        for work in self._works.values():
            for ask in work.asks:
                if now >= ask.look_at:
                    owing.add(ask.loader)
                    self._balance.owed(ask, work.ticket, work.rounds, now)
                if not ask.late and now >= ask.deadline:
                    expired.add(ask.loader)
                    self._balance.expired(ask, now)
                    self._mark_late(work, ask, "did not answer in time")
                self._look_at = min(self._look_at, ask.look_at)
        return owing, expired

    def give_up_on(self, silent: set[int], choices: Choices) -> None:
        """Do not wait for silent loaders where another can be asked. choices: silent ones last."""
        for work in self._works.values():
            for ask in work.asks:
                if not ask.late and ask.loader in silent:
                    able = choices(work.ticket.lane, work.ticket.epoch)
                    if able and able[0] not in silent:
                        self._mark_late(work, ask, "is silent")

    def move(self, loader: int, choices: Choices) -> None:
        """A loader's open tickets of lanes that it is not home to any more go with the lanes."""
        for work in self._works.values():
            for ask in work.asks:
                if not ask.late and ask.loader == loader:
                    able = choices(work.ticket.lane, work.ticket.epoch)
                    if able and able[0] != loader:
                        self._mark_late(work, ask, "was relieved of the lane")

    def _mark_late(self, work: Work, ask: Ask, why: str) -> None:
        ask.late, ask.look_at = True, float("inf")
        work.tried.add(ask.loader)
        work.history.append(f"{self.options.addresses[ask.loader]} {why}")

    def next_time(self, now: float, num_jobs: int) -> float:
        """When a deadline or a pause next ends, or one of the first micro-batches may be hedged, after now."""
        first = self._look_at
        for work in self._works.values():
            if now < work.retry_at < first and work.outcome is None:
                first = work.retry_at
        if num_jobs > 0 and self._balance.budget.has_any:
            for job in islice(self.jobs, num_jobs):
                for work in job.works:
                    for ask in work.asks:
                        if now < ask.hedge_at < first and not ask.late:
                            first = ask.hedge_at
        return first

    # -- delivery

    def deliver(self) -> tuple[list[tuple[Slice, list[Piece]]], StokerError | None]:
        """The micro-batches that are complete and next in order, and the error of the one after them if it has one."""
        done: list[tuple[Slice, list[Piece]]] = []
        while self.jobs:
            pieces = []
            for work in self.jobs[0].works:
                if isinstance(work.outcome, StokerError):
                    return done, work.outcome
                if work.outcome is None:
                    return done, None
                pieces.append(work.outcome)
            job = self.jobs.popleft()
            for work in job.works:
                del self._works[work.ticket.ticket]
            done.append((job.slice, pieces))
        return done, None
