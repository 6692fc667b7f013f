"""The client's logic as a pure state machine: events change its state, `advance` returns commands.

    events     join  leave  not_found                       from the list of loaders
               connected  lost  denied  received  broken    from the sockets
               open  begin  start  taken  ping              from the consumer
    commands   Send  Opened  Deliver  Warn  Fail               see `commands.py`

Neither this file nor what it imports uses a socket, a clock, a thread or a random source, so any schedule of events can be
replayed from a list. Time is an argument: seconds of a monotonic clock.
"""

from __future__ import annotations

from stoker_proto.errors import DeadlineError, RefusedError, StokerError
from stoker_proto.order.lanes import Order
from stoker_proto.order.mixture import MixedOrder
from stoker_proto.wire.messages import Drain, Failure, Lanes, Message, Piece, Pong, Refuse, Shards, Welcome
from trainer.feed.client import explain
from trainer.feed.client.commands import Command, Deliver, Fail, Send, Warn
from trainer.feed.client.fleet import Fleet, State
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.pace import Pace
from trainer.feed.client.schedule import Schedule, SlicePosition
from trainer.feed.client.tickets import Tickets

_STILL_WAITING_S = 5.0
"""After this time without loaders that together hold all the data, a warning names what is missing."""


class Core:
    """One rank's client. Each event changes state only; call `advance` after it (or after several)."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        self.options = options
        self._out: list[Command] = []
        self.pace = Pace(options, now)
        self.fleet = Fleet(options, self._out, self.pace.shares)
        self.tickets = Tickets(options, self.pace, self.fleet.addresses)
        self._silent: set[int] = set()  # loaders that were silent at the last look
        self._began = now
        self._covered = False  # ready loaders have held all entries at least once
        self._warned = False
        self._begun = False  # a loader that differs ends the run before this, and is left out after it
        self._position: SlicePosition | None = None
        self._schedule: Schedule | None = None  # of the position's epoch
        self._opening: int | None = None  # the epoch that the consumer waits for
        self._untaken = 0  # micro-batches asked for and not taken by the consumer
        self._waiting_since: float | None = None
        self.failed = False

    # -- events from the list of loaders

    def join(self, address: str) -> int:
        """There is one more address to connect to. Returns the loader's number, perhaps one that has been used before."""
        number = self.fleet.join(address)
        self.pace.join(number)
        self.tickets.join(number)
        return number

    def leave(self, loader: int, now: float) -> bool:
        """The address is listed no more. A loader that is connected stays: it may be answering its last tickets.

        Returns whether the loader is forgotten. If not, say it again later."""
        if self.fleet.loaders[loader].state is State.REFUSED:  # used for nothing, whatever the connection
            self.lost(loader, "no longer listed", now)
        return self.fleet.leave(loader)

    def not_found(self, entries: dict[str, str]) -> None:
        """Entries of cluster.loader_addresses that name no address now -> why."""
        self.fleet.not_found = entries

    # -- events from the sockets

    def connected(self, loader: int, now: float) -> None:
        """There is a connection to the loader."""
        self._leave(loader, "reconnected", now)
        self.fleet.connected(loader, now)

    def lost(self, loader: int, reason: str, now: float) -> None:
        """The connection broke, or could not be made."""
        self._leave(loader, reason, now)
        self.fleet.lost(loader, reason)

    def denied(self, loader: int, text: str, now: float) -> None:
        """There is no connection, because the keys of the two sides do not match."""
        self._differs(loader, text, now)

    def broken(self, loader: int, reason: str, now: float) -> None:
        """The loader sent something that is not a message of the protocol."""
        self._exclude(loader, f"the loader at {self._address(loader)} broke the protocol: {reason}", now)

    def received(self, loader: int, message: Message, now: float) -> None:
        """A message came."""
        fleet = self.fleet
        fleet.heard(loader, now)
        state = fleet.loaders[loader].state
        if isinstance(message, Welcome) and state in (State.CONNECTED, State.READY):
            self._welcome(loader, message, now)
        elif isinstance(message, Refuse) and state in (State.CONNECTED, State.READY):
            self._differs(loader, fleet.refused_by_loader(loader, message), now)
        elif state is not State.READY:
            self.tickets.counters.duplicates += isinstance(message, Piece | Shards | Failure)
        elif isinstance(message, Piece | Shards):
            self._answer(loader, message, now)
        elif isinstance(message, Failure):
            self.tickets.failure(loader, message, now)
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
        self.tickets.loader_back(loader, now, died=died)
        if not self._covered and self.fleet.is_covered():
            opening = self._opening
            if opening in self.fleet.orders:  # of all entries are the lanes known, and now there is the last shard
                self._covered = True
                self._out.append(self.fleet.epochs.opened(opening))
            self._covered = self._covered or not self.fleet.uncovered()

    def _answer(self, loader: int, answer: Piece | Shards, now: float) -> None:
        if answer.loader != self.fleet.loaders[loader].name:  # from an incarnation that is gone
            self.tickets.counters.duplicates += 1
            return
        take = self.tickets.piece if isinstance(answer, Piece) else self.tickets.shards
        wrong = take(loader, answer, now)  # type: ignore[arg-type]
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
            self._covered = self._covered or self.fleet.is_covered()  # perhaps never all at the same time
            if self._covered:
                self._out.append(self.fleet.epochs.opened(epoch))

    def _differs(self, loader: int, text: str, now: float) -> None:
        if self._begun and self._covered:  # before that, the loaders may be right and this rank wrong
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
            self.pace.shares.failed(loader, now)
        self.tickets.loader_gone(loader, f"{self._address(loader)}: {why}", now)

    def _address(self, loader: int) -> str:
        return self.fleet.addresses[loader]

    # -- events from the consumer

    def open(self, epoch: int, now: float) -> None:
        """The consumer wants the lane lengths of an epoch: `Opened` follows, at once if they are known."""
        self._opening = epoch
        self.fleet.open(epoch, now)
        if self._covered and epoch in self.fleet.orders:
            self._out.append(self.fleet.epochs.opened(epoch))

    def begin(self) -> None:
        """Training has begun, perhaps with the other split: from now on no loader that joins can end the run."""
        self._begun = True

    def start(self, session: int, epoch: int, first: int, num_epochs: int, now: float) -> None:
        """The consumer wants micro-batches from sample `first` of the epoch to the end of epoch num_epochs - 1."""
        self.begin()
        self.tickets.clear(now)
        self._untaken, self._opening = 0, None
        self._position = SlicePosition(session, epoch, first, 0, 0, max(num_epochs, epoch + 1))
        self.fleet.close_except({epoch, epoch + 1})
        self.fleet.open(epoch, now)

    def taken(self, session: int) -> None:
        """The consumer took a micro-batch: one credit is free again."""
        if self._position is not None and session == self._position.session:
            self._untaken -= 1

    def ping(self, now: float) -> dict[int, int]:
        """Ask every ready loader for its counters; loader -> nonce of the PONG to wait for."""
        ready = [number for number, loader in enumerate(self.fleet.loaders) if loader.state is State.READY]
        return {number: self.fleet.ping(number, now) for number in ready}

    # -- commands

    def advance(self, now: float) -> list[Command]:
        """The commands that follow from the events so far and from the time."""
        if not self.failed:
            try:
                self._advance(now)
            except StokerError as error:
                self._fail(error)
        out, self._out[:] = list(self._out), []
        return out

    def next_time(self, now: float) -> float:
        """When to call `advance` again, if no event comes before."""
        if self.failed:  # the deadlines that led here have passed, and no command follows from them
            return float("inf")
        times = [self.fleet.next_time(now), self.tickets.next_time(now, self._num_near()), self.pace.load.next_time()]
        if not self._covered:
            times.append(self._began + self.options.feed.connect_deadline_s)
            if not self._warned:
                times.append(self._began + _STILL_WAITING_S)
        if self._waiting_since is not None:
            times.append(self._waiting_since + self.options.feed.data_deadline_s)
        return min(times)

    def _advance(self, now: float) -> None:
        self.fleet.tick(now)
        self._move_from_slow_loaders(now)

        def choices(lane: int, epoch: int, shards: frozenset[int]) -> list[int]:
            return self.fleet.choices(lane, epoch, now, shards)

        def spares(lane: int, epoch: int, shards: frozenset[int]) -> list[int]:
            return self.fleet.spares(lane, epoch, now, shards)

        delivered = True
        while delivered and not self.failed:  # a micro-batch of padding rows only is complete at once
            self._issue(now)
            for loader, ticket in self.tickets.assign(choices, now):
                self._out.append(Send(loader, ticket))
            delivered = self._deliver(now)
        hedges = self.tickets.hedge(self._num_near(), spares, now)
        self._out.extend(Send(loader, ticket, is_hedge=True) for loader, ticket in hedges)
        self.pace.load.starving(bool(self.tickets.batches) and self._num_ready() == 0, now)
        self._check_deadlines(now)

    def _move_from_slow_loaders(self, now: float) -> None:
        """Give other loaders the tickets and lanes of those that hang, are late, or are overloaded."""

        def choices(lane: int, epoch: int, shards: frozenset[int]) -> list[int]:
            return self.fleet.choices(lane, epoch, now, shards)

        def helps(loader: int, other: int) -> bool:
            return self.fleet.helps(loader, other, now)

        fleet, loaders = self.fleet, range(len(self.fleet.loaders))
        overdue, expired = self.tickets.overdue(now)
        for loader in overdue:
            fleet.overdue(loader, now)
        silent = {n for n in loaders if fleet.loaders[n].waiting_since is not None and fleet.silent(n, now)}
        hangs, self._silent = silent - self._silent, silent
        if silent:
            self.tickets.give_up_on(silent, choices)
        lowered = self.pace.look(now, helps)
        for loader in sorted(hangs | expired):
            if any(helps(loader, other) for other in loaders) and self.pace.lower(loader, 0, now):
                lowered.append(loader)
        for loader in lowered:
            self.tickets.counters.takeovers += 1
            self.tickets.move(loader, choices)

    def _num_ready(self) -> int:
        """Micro-batches delivered and not yet taken."""
        return self._untaken - len(self.tickets.batches)

    def _num_near(self) -> int:
        """Pending micro-batches that the consumer will want soon."""
        return max(2, self.options.window // 2) - self._num_ready()

    def _issue(self, now: float) -> None:
        """Create the tickets of further micro-batches, as far as the credits go."""
        position = self._position
        while position is not None and position.epoch < position.num_epochs and self._untaken < self.options.window:
            order = self.fleet.orders.get(position.epoch)
            if order is None:
                self.fleet.open(position.epoch, now)
                return
            schedule = self._schedule_of(order, position.epoch)
            steps = schedule.num_steps(position.first)
            if 2 * position.step >= steps and position.epoch + 1 < position.num_epochs:
                self.fleet.open(position.epoch + 1, now)  # early, as a loader needs time to prepare an epoch
            if position.step >= steps:
                position.epoch, position.first, position.step, position.index = position.epoch + 1, 0, 0, 0
                still_open = {
                    batch.slice.epoch for batch in self.tickets.batches
                }  # a loader that comes back is asked for these
                self.fleet.close_except({position.epoch, position.epoch + 1} | still_open)
                continue
            slice_ = schedule.slice(position.first, position.step, position.index)
            if not self.tickets.room_for(len(slice_.runs)):
                return
            self.tickets.add(slice_)
            self._untaken += 1
            position.index = (position.index + 1) % schedule.passes
            position.step += position.index == 0

    def _schedule_of(self, order: Order | MixedOrder, epoch: int) -> Schedule:
        """The schedule of the epoch: one object as long as the epoch's order stays the same."""
        known, options = self._schedule, self.options
        if known is None or known.order is not order or known.epoch != epoch:
            known = self._schedule = Schedule(
                order,
                epoch=epoch,
                global_batch_size=options.global_batch_size,
                micro_batch_size=options.micro_batch_size,
                world_size=options.world_size,
                rank=options.rank,
            )
        return known

    def _deliver(self, now: float) -> bool:
        done, error = self.tickets.deliver()
        position = self._position
        if position is not None:
            self._out.extend(Deliver(position.session, slice_, pieces) for slice_, pieces in done)
        if done or not self._is_waiting():
            self._waiting_since = now if self._is_waiting() else None
        elif self._waiting_since is None:
            self._waiting_since = now
        if error is not None:
            self._fail(error)
        return bool(done)

    def _is_waiting(self) -> bool:
        """Whether the consumer wants something that is not there: tickets, or the lanes of the next epoch."""
        if not self._covered:
            return False  # this has its own deadline
        opening, position = self._opening, self._position
        if position is not None and position.epoch < position.num_epochs and self._untaken == 0:
            opening = position.epoch
        return bool(self.tickets.batches) or (opening is not None and opening not in self.fleet.orders)

    def _check_deadlines(self, now: float) -> None:
        if not self._covered and not self._warned and now >= self._began + _STILL_WAITING_S:
            self._warned = True
            self._out.append(Warn(explain.still_waiting(self.fleet, now)))
        if not self._covered and now >= self._began + self.options.feed.connect_deadline_s:
            self._fail(DeadlineError(explain.not_connected(self.fleet, now)))
        elif self._waiting_since is not None and now >= self._waiting_since + self.options.feed.data_deadline_s:
            self._fail(DeadlineError(explain.no_data(self.fleet, self.tickets.num_tickets, self.tickets.oldest, now)))

    def _fail(self, error: StokerError) -> None:
        if not self.failed:
            self._out.append(Fail(error))
        self.failed = True
