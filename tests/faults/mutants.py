"""The core, broken on purpose: each mutant lacks one thing that a client of such a protocol can get wrong.

They are tests of the simulator: one that no oracle notices shows an oracle, or a fault, that is missing.
"""

from __future__ import annotations

from stoker_proto.errors import StokerError
from stoker_proto.wire.messages import Piece
from tests.faults.mixture_mutants import MIXTURE_MUTANTS
from tests.faults.straggler_mutants import STRAGGLER_MUTANTS
from tests.faults.substitutes import with_fleet, with_tickets
from tests.faults.trainer import MakeCore
from trainer.feed.client.core import Core
from trainer.feed.client.fleet import Fleet
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.pace import Pace
from trainer.feed.client.schedule import Slice
from trainer.feed.client.tickets import Attempt, Choices, PendingBatch, PendingTicket, Tickets


class _NoDedup(Tickets):
    """An answer that comes a second time counts a second time."""

    def __init__(self, options: CoreOptions, pace: Pace) -> None:
        super().__init__(options, pace)
        self._done: dict[int, PendingBatch] = {}

    def deliver(self) -> tuple[list[tuple[Slice, list[Piece]]], StokerError | None]:
        batches = list(self.batches)
        done, error = super().deliver()
        self._done |= {pending.ticket.ticket: batch for batch in batches[: len(done)] for pending in batch.tickets}
        return done, error

    def piece(self, loader: int, piece: Piece, now: float) -> str | None:
        batch = self._done.pop(piece.ticket, None)
        if batch is not None:
            self.batches.appendleft(batch)
            self._pending |= {pending.ticket.ticket: pending for pending in batch.tickets}
        return super().piece(loader, piece, now)


class _NoReissue(Tickets):
    """Every ticket is asked for once, whatever becomes of the loader."""

    def _end(self, pending: PendingTicket, loader: int, why: str, now: float) -> None:
        super()._end(pending, loader, why, now)
        pending.retry_at = float("inf")

    def _mark_late(self, pending: PendingTicket, attempt: Attempt, why: str) -> None:
        super()._mark_late(pending, attempt, why)
        pending.retry_at = float("inf")


class _HastyPoison(Tickets):
    """Whatever ends an attempt counts as a loader that died of the ticket."""

    def _end(self, pending: PendingTicket, loader: int, why: str, now: float) -> None:
        super()._end(pending, loader, why, now)
        pending.deaths += 1

    def _mark_late(self, pending: PendingTicket, attempt: Attempt, why: str) -> None:
        super()._mark_late(pending, attempt, why)
        pending.deaths += 1


class _NoDeadline(Tickets):
    """A ticket is waited for as long as its loader's connection stands."""

    def overdue(self, now: float) -> tuple[set[int], set[int]]:
        return set(), set()

    def give_up_on(self, silent: set[int], choices: Choices) -> None:
        return

    def next_time(self, now: float, num_batches: int) -> float:
        return min(
            (pending.retry_at for pending in self._pending.values() if pending.retry_at > now), default=float("inf")
        )


class _NoReorder(Tickets):
    """Micro-batches are delivered as they become complete."""

    def deliver(self) -> tuple[list[tuple[Slice, list[Piece]]], StokerError | None]:
        self.batches = type(self.batches)(
            sorted(self.batches, key=lambda batch: any(pending.outcome is None for pending in batch.tickets))
        )
        return super().deliver()


class _StaleRetry(Tickets):
    """Numbers begin anew with every session, so that a late answer to an earlier one fits a ticket of this one."""

    def clear(self, now: float) -> None:
        super().clear(now)
        self._next_ticket = 0


class _MixedUp(Tickets):
    """An answer is taken for the oldest open ticket of its loader, whatever number it bears."""

    def _find_pending(self, loader: int, number: int) -> PendingTicket | None:
        for pending in self._pending.values():
            if pending.outcome is None and any(attempt.loader == loader for attempt in pending.attempts):
                return pending
        return super()._find_pending(loader, number)


class _SizeUnchecked(Tickets):
    """A piece with too many samples is taken."""

    def piece(self, loader: int, piece: Piece, now: float) -> str | None:
        pending = self._pending.get(piece.ticket)
        if pending is not None and pending.outcome is None:
            pending.outcome = piece
            pending.attempts.clear()
        return None


class _NoTicketLimit(Tickets):
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
        self._untaken += sum(
            attempt.loader == loader for pending in self.tickets._pending.values() for attempt in pending.attempts
        )
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
        return min(self.fleet.next_time(now), self.tickets.next_time(now, self._num_near()))


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
    "no-dedup": with_tickets(_NoDedup),
    "no-reissue": with_tickets(_NoReissue),
    "hasty-poison": with_tickets(_HastyPoison),
    "no-deadline": with_tickets(_NoDeadline),
    "no-reorder": with_tickets(_NoReorder),
    "stale-retry": with_tickets(_StaleRetry),
    "mixed-up": with_tickets(_MixedUp),
    "size-unchecked": with_tickets(_SizeUnchecked),
    "no-ticket-limit": with_tickets(_NoTicketLimit),
    "dead-for-ever": with_fleet(_DeadForEver),
    "asked-once": with_fleet(_AskedOnce),
    "credit-leak": _CreditLeak,
    "no-window": _NoWindow,
    "wrong-resume": _WrongResume,
    "no-data-deadline": _NoDataDeadline,
    "hasty-deadline": _HastyDeadline,
}
"""Name -> what stands in for the core."""
