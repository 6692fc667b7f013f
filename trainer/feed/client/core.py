"""The client's logic as a pure state machine: events are told to it, `advance` answers with commands.

    events     connected  lost  denied  received  broken    from the sockets
               open  begin  start  taken  ping              from the consumer
    commands   Send  Opened  Deliver  Warn  Fail

No socket, clock, thread or source of chance is imported here or in what it imports, so that every schedule of events can be
replayed from a list. Time is an argument: seconds of a monotonic clock.
"""

from __future__ import annotations

from stoker_proto.errors import DeadlineError, RefusedError, StokerError
from stoker_proto.wire.messages import Drain, Failure, Lanes, Message, Piece, Pong, Refuse, Welcome
from trainer.feed.client import explain
from trainer.feed.client.balance import Balance
from trainer.feed.client.fleet import Fleet
from trainer.feed.client.judge import Judge
from trainer.feed.client.options import Command, CoreOptions, Deliver, Fail, Send, Warn
from trainer.feed.client.peer import State
from trainer.feed.client.schedule import Cursor, Schedule
from trainer.feed.client.tickets import Desk

_STILL_WAITING_S = 5.0
"""After this time without loaders that hold all the data the user is told what is waited for."""


class Core:
    """One rank's client. Each event changes state only; call `advance` after it (or after several)."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        self.options = options
        self._out: list[Command] = []
        self.balance = Balance(options, now)
        self.fleet = Fleet(options, self._out, self.balance.standings)
        self.desk = Desk(options, self.balance)
        self.judge = Judge()
        self._began = now
        self._covered = False  # all entries were held by ready loaders at least once
        self._warned = False
        self._begun = False  # once training has begun a loader that differs is left out; before, it ends the run
        self._cursor: Cursor | None = None
        self._opening: int | None = None  # epoch that the consumer waits for
        self._untaken = 0  # micro-batches asked for and not taken by the consumer
        self._waiting_since: float | None = None
        self.failed = False

    # -- events from the sockets

    def connected(self, loader: int, now: float) -> None:
        """A connection to the loader stands."""
        self._leave(loader, "reconnected", now)
        self.fleet.connected(loader, now)

    def lost(self, loader: int, reason: str, now: float) -> None:
        """The connection broke, or could not be made."""
        self._leave(loader, reason, now)
        self.fleet.lost(loader, reason)

    def denied(self, loader: int, text: str, now: float) -> None:
        """There is no connection, because the keys of the two sides do not fit."""
        self._differs(loader, text, now)

    def broken(self, loader: int, reason: str, now: float) -> None:
        """The loader sent what is no message of the protocol."""
        self._exclude(loader, f"the loader at {self._address(loader)} broke the protocol: {reason}", now)

    def received(self, loader: int, message: Message, now: float) -> None:
        """A message came."""
        fleet = self.fleet
        fleet.heard(loader, now)
        state = fleet.loaders[loader].state
        if isinstance(message, Welcome) and state in (State.GREETING, State.READY):
            self._welcome(loader, message, now)
        elif isinstance(message, Refuse) and state in (State.GREETING, State.READY):
            self._differs(loader, fleet.refused_by_loader(loader, message), now)
        elif state is not State.READY:
            self.desk.counters.duplicates += isinstance(message, Piece | Failure)
        elif isinstance(message, Piece):
            self._piece(loader, message, now)
        elif isinstance(message, Failure):
            self.desk.failure(loader, message, now)
        elif isinstance(message, Lanes):
            self._lanes(loader, message, now)
        elif isinstance(message, Pong):
            fleet.pong(loader, message, now)
        elif isinstance(message, Drain):
            fleet.loaders[loader].draining = message.loader == fleet.loaders[loader].name
        else:
            self.broken(loader, f"a {type(message).__name__} goes from rank to loader, never back", now)

    def _welcome(self, loader: int, message: Welcome, now: float) -> None:
        known = self.fleet.loaders[loader]
        died = (known.name or known.last_name) not in ("", message.loader)
        if died and known.name:  # another incarnation behind the same connection
            self._leave(loader, "restarted", now)
        differences = self.fleet.welcome(loader, message, now)
        if differences:
            self._differs(loader, differences, now)
            return
        self.desk.loader_back(loader, now, died=died)
        self._covered = self._covered or not self.fleet.uncovered()

    def _piece(self, loader: int, piece: Piece, now: float) -> None:
        if piece.loader != self.fleet.loaders[loader].name:  # of an incarnation that is gone
            self.desk.counters.duplicates += 1
            return
        wrong = self.desk.piece(loader, piece, now)
        if wrong:
            self.broken(loader, wrong, now)

    def _lanes(self, loader: int, message: Lanes, now: float) -> None:
        try:
            complete, differences = self.fleet.lanes(loader, message, now)
        except StokerError as error:
            self._fail(error)
            return
        if differences:
            self._differs(loader, differences, now)
        for epoch in complete:
            self._covered = True  # perhaps one after the other, never at the same time
            self._out.append(self.fleet.epochs.opened(epoch))

    def _differs(self, loader: int, text: str, now: float) -> None:
        if self._begun and self._covered:  # never before loaders were accepted: it may be they who are right
            self._exclude(loader, text, now)
        else:
            self._fail(RefusedError(text))

    def _exclude(self, loader: int, text: str, now: float) -> None:
        self._out.append(Warn(text))
        self._leave(loader, text, now)
        self.fleet.refuse(loader, text)

    def _leave(self, loader: int, why: str, now: float) -> None:
        known = self.fleet.loaders[loader]
        if known.state is State.READY and not known.draining:
            self.balance.standings.failed(loader, now)
        self.desk.loader_gone(loader, f"{self._address(loader)}: {why}", now)

    def _address(self, loader: int) -> str:
        return self.options.addresses[loader]

    # -- events from the consumer

    def open(self, epoch: int, now: float) -> None:
        """The lane lengths of an epoch are wanted (`Opened`, now if they are known)."""
        self._opening = epoch
        self.fleet.open(epoch, now)
        if epoch in self.fleet.orders:
            self._out.append(self.fleet.epochs.opened(epoch))

    def begin(self) -> None:
        """The run has begun, be it with another split: no loader that joins from now on may end it."""
        self._begun = True

    def start(self, session: int, epoch: int, first: int, num_epochs: int, now: float) -> None:
        """Micro-batches are wanted from sample `first` of the epoch on, through to the end of epoch num_epochs - 1."""
        self.begin()
        self.desk.clear(now)
        self._untaken, self._opening = 0, None
        self._cursor = Cursor(session, epoch, first, 0, 0, max(num_epochs, epoch + 1))
        self.fleet.close_except({epoch, epoch + 1})
        self.fleet.open(epoch, now)

    def taken(self, session: int) -> None:
        """The consumer took a micro-batch: one credit is free again."""
        if self._cursor is not None and session == self._cursor.session:
            self._untaken -= 1

    def ping(self, now: float) -> dict[int, int]:
        """Ask every ready loader for its counters; loader -> nonce of the PONG to wait for."""
        ready = [number for number, loader in enumerate(self.fleet.loaders) if loader.state is State.READY]
        return {number: self.fleet.ping(number, now) for number in ready}

    # -- what is to be done

    def advance(self, now: float) -> list[Command]:
        """All that follows from the events so far and from the time."""
        if not self.failed:
            try:
                self._advance(now)
            except StokerError as error:
                self._fail(error)
        out, self._out[:] = list(self._out), []
        return out

    def next_time(self, now: float) -> float:
        """When `advance` must be called again, if nothing happens before."""
        if self.failed:  # the deadlines that led there have passed, and nothing follows from them any more
            return float("inf")
        times = [self.fleet.next_time(now), self.desk.next_time(now, self._num_near()), self.balance.load.next_time()]
        if not self._covered:
            times.append(self._began + self.options.connect_deadline_s)
            if not self._warned:
                times.append(self._began + _STILL_WAITING_S)
        if self._waiting_since is not None:
            times.append(self._waiting_since + self.options.data_deadline_s)
        return min(times)

    def _advance(self, now: float) -> None:
        self.fleet.tick(now)
        self.judge(self.fleet, self.desk, self.balance, now)
        delivered = True
        while delivered and not self.failed:  # a micro-batch of padding rows alone is complete at once
            self._issue(now)
            for loader, ticket in self.desk.assign(lambda lane, epoch: self.fleet.choices(lane, epoch, now), now):
                self._out.append(Send(loader, ticket))
            delivered = self._deliver(now)
        hedges = self.desk.hedge(self._num_near(), lambda lane, epoch: self.fleet.spares(lane, epoch, now), now)
        self._out.extend(Send(loader, ticket, is_hedge=True) for loader, ticket in hedges)
        self.balance.load.starving(bool(self.desk.jobs) and self._num_ready() == 0, now)
        self._check_deadlines(now)

    def _num_ready(self) -> int:
        """Micro-batches delivered and not taken."""
        return self._untaken - len(self.desk.jobs)

    def _num_near(self) -> int:
        """Micro-batches on their way that the consumer will want soon."""
        return max(2, self.options.window // 2) - self._num_ready()

    def _issue(self, now: float) -> None:
        """Put tickets down as far as the credits reach."""
        cursor = self._cursor
        while cursor is not None and cursor.epoch < cursor.num_epochs and self._untaken < self.options.window:
            order = self.fleet.orders.get(cursor.epoch)
            if order is None:
                self.fleet.open(cursor.epoch, now)
                return
            options = self.options
            schedule = Schedule(
                order,
                epoch=cursor.epoch,
                global_batch_size=options.global_batch_size,
                micro_batch_size=options.micro_batch_size,
                world_size=options.world_size,
                rank=options.rank,
            )
            steps = schedule.num_steps(cursor.first)
            if 2 * cursor.step >= steps and cursor.epoch + 1 < cursor.num_epochs:
                self.fleet.open(cursor.epoch + 1, now)  # ahead of need: a loader prepares an epoch once
            if cursor.step >= steps:
                cursor.epoch, cursor.first, cursor.step, cursor.index = cursor.epoch + 1, 0, 0, 0
                still_open = {job.slice.epoch for job in self.desk.jobs}  # a loader that returns is asked for these
                self.fleet.close_except({cursor.epoch, cursor.epoch + 1} | still_open)
                continue
            slice_ = schedule.slice(cursor.first, cursor.step, cursor.index)
            if not self.desk.room_for(len(slice_.runs)):
                return
            self.desk.add(slice_)
            self._untaken += 1
            cursor.index = (cursor.index + 1) % schedule.passes
            cursor.step += cursor.index == 0

    def _deliver(self, now: float) -> bool:
        done, error = self.desk.deliver()
        cursor = self._cursor
        if cursor is not None:
            self._out.extend(Deliver(cursor.session, slice_, pieces) for slice_, pieces in done)
        if done or not self._is_waiting():
            self._waiting_since = now if self._is_waiting() else None
        elif self._waiting_since is None:
            self._waiting_since = now
        if error is not None:
            self._fail(error)
        return bool(done)

    def _is_waiting(self) -> bool:
        """Something is wanted that is not there: tickets, or the lanes of the epoch to come."""
        if not self._covered:
            return False  # that has its own deadline
        opening, cursor = self._opening, self._cursor
        if cursor is not None and cursor.epoch < cursor.num_epochs and self._untaken == 0:
            opening = cursor.epoch
        return bool(self.desk.jobs) or (opening is not None and opening not in self.fleet.orders)

    def _check_deadlines(self, now: float) -> None:
        if not self._covered and not self._warned and now >= self._began + _STILL_WAITING_S:
            self._warned = True
            self._out.append(Warn(explain.still_waiting(self.fleet, now)))
        if not self._covered and now >= self._began + self.options.connect_deadline_s:
            self._fail(DeadlineError(explain.not_connected(self.fleet, now)))
        elif self._waiting_since is not None and now >= self._waiting_since + self.options.data_deadline_s:
            self._fail(DeadlineError(explain.no_data(self.fleet, self.desk.num_tickets, self.desk.oldest, now)))

    def _fail(self, error: StokerError) -> None:
        if not self.failed:
            self._out.append(Fail(error))
        self.failed = True
