"""The core, broken on purpose: each mutant lacks one thing that a client of such a protocol can get wrong.

They are tests of the simulator: one that no oracle notices shows an oracle, or a fault, that is missing.
"""

from __future__ import annotations

from stoker_proto.errors import StokerError
from stoker_proto.wire.messages import Piece
from tests.faults.mixture_mutants import MIXTURE_MUTANTS
from tests.faults.straggler_mutants import STRAGGLER_MUTANTS
from tests.faults.substitutes import with_desk, with_fleet
from tests.faults.trainer import MakeCore
from trainer.feed.client.balance import Balance
from trainer.feed.client.core import Core
from trainer.feed.client.fleet import Fleet
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.schedule import Slice
from trainer.feed.client.tickets import Choices, Desk
from trainer.feed.client.work import Ask, Job, Work


class _NoDedup(Desk):
    """An answer that comes a second time counts a second time."""

    def __init__(self, options: CoreOptions, balance: Balance) -> None:
        super().__init__(options, balance)
        self._done: dict[int, Job] = {}

    def deliver(self) -> tuple[list[tuple[Slice, list[Piece]]], StokerError | None]:
        jobs = list(self.jobs)
        done, error = super().deliver()
        self._done |= {work.ticket.ticket: job for job in jobs[: len(done)] for work in job.works}
        return done, error

    def piece(self, loader: int, piece: Piece, now: float) -> str | None:
        job = self._done.pop(piece.ticket, None)
        if job is not None:
            self.jobs.appendleft(job)
            self._works |= {work.ticket.ticket: work for work in job.works}
        return super().piece(loader, piece, now)


class _NoReissue(Desk):
    """Every ticket is asked for once, whatever becomes of the loader."""

    def _end(self, work: Work, loader: int, why: str, now: float) -> None:
        super()._end(work, loader, why, now)
        work.retry_at = float("inf")

    def _mark_late(self, work: Work, ask: Ask, why: str) -> None:
        super()._mark_late(work, ask, why)
        work.retry_at = float("inf")


class _HastyPoison(Desk):
    """Whatever ends an attempt counts as a loader that died of the ticket."""

    def _end(self, work: Work, loader: int, why: str, now: float) -> None:
        super()._end(work, loader, why, now)
        work.deaths += 1

    def _mark_late(self, work: Work, ask: Ask, why: str) -> None:
        super()._mark_late(work, ask, why)
        work.deaths += 1


class _NoDeadline(Desk):
    """A ticket is waited for as long as its loader's connection stands."""

    def overdue(self, now: float) -> tuple[set[int], set[int]]:
        return set(), set()

    def give_up_on(self, silent: set[int], choices: Choices) -> None:
        return

    def next_time(self, now: float, num_jobs: int) -> float:
        return min((work.retry_at for work in self._works.values() if work.retry_at > now), default=float("inf"))


class _NoReorder(Desk):
    """Micro-batches are delivered as they become complete."""

    def deliver(self) -> tuple[list[tuple[Slice, list[Piece]]], StokerError | None]:
        self.jobs = type(self.jobs)(sorted(self.jobs, key=lambda job: any(work.outcome is None for work in job.works)))
        return super().deliver()


class _StaleRetry(Desk):
    """Numbers begin anew with every session, so that a late answer to an earlier one fits a ticket of this one."""

    def clear(self, now: float) -> None:
        super().clear(now)
        self._next_ticket = 0


class _MixedUp(Desk):
    """An answer is taken for the oldest open ticket of its loader, whatever number it bears."""

    def _open_work(self, loader: int, number: int) -> Work | None:
        for work in self._works.values():
            if work.outcome is None and any(ask.loader == loader for ask in work.asks):
                return work
        return super()._open_work(loader, number)


class _SizeUnchecked(Desk):
    """A piece with too many samples is taken."""

    def piece(self, loader: int, piece: Piece, now: float) -> str | None:
        work = self._works.get(piece.ticket)
        if work is not None and work.outcome is None:
            work.outcome = piece
            work.asks.clear()
        return None


class _NoTicketLimit(Desk):
    """Open tickets are not counted."""

    def room_for(self, count: int) -> bool:
        return True


class _DeadForEver(Fleet):
    """A loader whose connection broke once is never used again."""

    def __init__(self, *values: object) -> None:
        super().__init__(*values)  # type: ignore[arg-type]
        self._broken: set[int] = set()

    def lost(self, number: int, reason: str) -> None:
        self._broken.add(number)
        super().lost(number, reason)

    def connected(self, number: int, now: float) -> None:
        if number not in self._broken:
            super().connected(number, now)


class _AskedOnce(Fleet):
    """HELLO and EPOCH are sent once."""

    def tick(self, now: float) -> None:
        for loader in self.loaders:
            loader.hello_at = loader.epoch_at = now
        super().tick(now)


class _CreditLeak(Core):
    """The credits of what was asked of a loader that went away are not given back."""

    def lost(self, loader: int, reason: str, now: float) -> None:
        self._untaken += sum(ask.loader == loader for work in self.desk._works.values() for ask in work.asks)
        super().lost(loader, reason, now)


class _NoWindow(Core):
    """What the consumer has not taken is not counted."""

    def _issue(self, now: float) -> None:
        self._untaken = 0
        super()._issue(now)


class _WrongResume(Core):
    """A resume is off by one sample."""

    def start(self, session: int, epoch: int, first: int, num_epochs: int, now: float) -> None:
        super().start(session, epoch, first + (first > 0), num_epochs, now)


class _NoDataDeadline(Core):
    """The core waits for ever."""

    def _check_deadlines(self, now: float) -> None:
        return

    def next_time(self, now: float) -> float:
        return min(self.fleet.next_time(now), self.desk.next_time(now, self._num_near()))


class _HastyDeadline(Core):
    """The data deadline runs from the start of the session, not from the last delivery."""

    def _deliver(self, now: float) -> bool:
        since = self._waiting_since
        delivered = super()._deliver(now)
        self._waiting_since = self._waiting_since if since is None else since
        return delivered


MUTANTS: dict[str, MakeCore] = {
    **STRAGGLER_MUTANTS,
    **MIXTURE_MUTANTS,
    "no-dedup": with_desk(_NoDedup),
    "no-reissue": with_desk(_NoReissue),
    "hasty-poison": with_desk(_HastyPoison),
    "no-deadline": with_desk(_NoDeadline),
    "no-reorder": with_desk(_NoReorder),
    "stale-retry": with_desk(_StaleRetry),
    "mixed-up": with_desk(_MixedUp),
    "size-unchecked": with_desk(_SizeUnchecked),
    "no-ticket-limit": with_desk(_NoTicketLimit),
    "dead-for-ever": with_fleet(_DeadForEver),
    "asked-once": with_fleet(_AskedOnce),
    "credit-leak": _CreditLeak,
    "no-window": _NoWindow,
    "wrong-resume": _WrongResume,
    "no-data-deadline": _NoDataDeadline,
    "hasty-deadline": _HastyDeadline,
}
"""Name -> what stands in for the core."""
