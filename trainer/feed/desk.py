"""The tickets of one rank: asked, asked again, answered, and delivered in order. Pure: time is an argument.

A ticket keeps its number over all attempts, so that whichever answer comes first is the answer, whoever gives it; every
later one finds the ticket done, or gone, and is dropped. Numbers are never used twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from stoker_proto.errors import DataError, DeadlineError, LocalProtocolError, StokerError
from stoker_proto.messages import Failure, Piece, Ticket
from trainer.feed.commands import CoreOptions
from trainer.feed.schedule import Slice

_FIRST_RETRY_S = 0.25
_LONGEST_RETRY_S = 8.0
_MOST_PATIENCE = 4
"""A ticket's deadline doubles from round to round up to so many times the first: a loader may need longer than thought, but
what was lost in an outage must be asked for again soon after, long before the data deadline."""


@dataclass(slots=True)
class Ask:
    """One attempt that may still be answered."""

    loader: int
    deadline: float
    late: bool = False
    """Past its deadline: another may be asked, but this answer is still welcome."""


@dataclass(slots=True)
class Work:
    """One ticket on its way."""

    ticket: Ticket
    asks: list[Ask] = field(default_factory=list)
    attempts: int = 0
    tried: set[int] = field(default_factory=set)
    """Loaders that failed this ticket since all able ones had been tried."""
    rounds: int = 0
    """How often all able loaders had been tried."""
    retry_at: float = 0.0
    """Not asked again before."""
    history: list[str] = field(default_factory=list)
    """How the attempts ended."""
    outcome: Piece | StokerError | None = None


@dataclass(slots=True)
class Job:
    """One micro-batch on its way."""

    slice: Slice
    works: list[Work]


class Desk:
    """Tickets in the order in which they are delivered."""

    def __init__(self, options: CoreOptions) -> None:
        self.options = options
        self.jobs: deque[Job] = deque()  # not delivered, in order
        self._works: dict[int, Work] = {}  # ticket number -> work, in order; those of `jobs`
        self._next_ticket = 0
        self.num_dropped = 0
        """Answers that came twice, too late, or of an earlier session."""

    @property
    def num_tickets(self) -> int:
        """Tickets not yet delivered: the pieces that may be held here and at the loaders."""
        return len(self._works)

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

    def clear(self) -> None:
        """Forget everything asked for; answers still under way will be dropped."""
        self.jobs.clear()
        self._works.clear()

    # -- answers

    def piece(self, loader: int, piece: Piece) -> str | None:
        """Take a piece in; why the loader must not be asked any more, if it is not what the ticket says."""
        work = self._open_work(loader, piece.ticket)
        if work is None:
            return None
        if piece.num_rows != work.ticket.count:
            return f"answered a ticket of {work.ticket.count} rows with {piece.num_rows}"
        work.outcome = piece
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
            self._end(work, loader, f"{address} {failure.reason}: {failure.message}", now)

    def loader_gone(self, loader: int, why: str, now: float) -> None:
        """All that was asked of this loader must be asked elsewhere."""
        for work in self._works.values():
            if any(ask.loader == loader for ask in work.asks):
                self._end(work, loader, why, now)

    def loader_back(self, loader: int) -> None:
        """A new incarnation is there: what the old one failed at may be asked of it."""
        for work in self._works.values():
            work.tried.discard(loader)

    def _open_work(self, loader: int, number: int) -> Work | None:
        work = self._works.get(number)
        if work is None or work.outcome is not None or all(ask.loader != loader for ask in work.asks):
            self.num_dropped += 1
            return None
        return work

    def _end(self, work: Work, loader: int, why: str, now: float) -> None:
        work.asks = [ask for ask in work.asks if ask.loader != loader]
        work.tried.add(loader)
        work.history.append(why)
        work.retry_at = now

    # -- asking

    def assign(self, choices: Callable[[int, int], list[int]], now: float) -> list[tuple[int, Ticket]]:
        """(loader, ticket) to be sent now. choices: (lane, epoch) -> able loaders, best first. Raises DeadlineError."""
        sends = []
        for work in self._works.values():
            if work.outcome is not None or any(not ask.late for ask in work.asks) or now < work.retry_at:
                continue
            able = choices(work.ticket.lane, work.ticket.epoch)
            fresh = [loader for loader in able if loader not in work.tried]
            if able and not fresh:
                if not self._next_round(work, now):
                    continue
                fresh = able
            if not fresh:
                continue
            sends.append((fresh[0], self._ask(work, fresh[0], now)))
        return sends

    def _next_round(self, work: Work, now: float) -> bool:
        """All able loaders have failed the ticket: whether they may be tried again at once (else after a pause)."""
        work.tried.clear()
        work.rounds += 1
        if work.asks:  # they are late, not failed: nothing is hammered by asking again
            return True
        work.retry_at = now + min(_FIRST_RETRY_S * 2**work.rounds, _LONGEST_RETRY_S)
        return False

    def _ask(self, work: Work, loader: int, now: float) -> Ticket:
        work.attempts += 1
        if work.attempts > self.options.max_attempts:
            raise DeadlineError(
                f"lane {work.ticket.lane}, samples {work.ticket.start} to {work.ticket.start + work.ticket.count - 1} of "
                f"{work.ticket.split} epoch {work.ticket.epoch} were asked for {self.options.max_attempts} times in vain "
                f"({'; '.join(work.history[-3:])}); look into the loaders' logs for what these samples do to them"
            )
        deadline = now + self.options.ticket_deadline_s * min(2**work.rounds, _MOST_PATIENCE)
        work.asks = [ask for ask in work.asks if ask.loader != loader]
        work.asks.append(Ask(loader, deadline))
        return work.ticket

    def expire(self, now: float) -> None:
        """Mark what is past its deadline, so that another loader is asked."""
        for work in self._works.values():
            for ask in work.asks:
                if not ask.late and now >= ask.deadline:
                    self._mark_late(work, ask, "did not answer in time")

    def give_up_on(self, silent: set[int], choices: Callable[[int, int], list[int]]) -> None:
        """Do not wait for silent loaders where another can be asked. choices: as for `assign`, silent ones last."""
        for work in self._works.values():
            for ask in work.asks:
                if not ask.late and ask.loader in silent:
                    able = choices(work.ticket.lane, work.ticket.epoch)
                    if able and able[0] not in silent:
                        self._mark_late(work, ask, "is silent")

    def _mark_late(self, work: Work, ask: Ask, why: str) -> None:
        ask.late = True
        work.tried.add(ask.loader)
        work.history.append(f"{self.options.addresses[ask.loader]} {why}")

    def next_time(self, now: float) -> float:
        """When a deadline or a pause next ends, after now."""
        times = [float("inf")]
        for work in self._works.values():
            if work.outcome is None:
                times.extend(ask.deadline for ask in work.asks if not ask.late)
                times.append(work.retry_at if work.retry_at > now else float("inf"))
        return min(times)

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
