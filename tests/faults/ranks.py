"""One simulated rank: the real core, its connections, and the oracles that look at what it asks for and delivers."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from stoker_proto.wire.messages import Message, Piece, Refuse, Ticket, Welcome
from tests.faults.loaders import SimulatedLoader
from tests.faults.oracles import AskOracle
from tests.faults.reference import LANES, Row, Violation, make_piece, picture
from tests.faults.scenario import GLOBAL_BATCH, TICK
from trainer.feed.client.commands import Deliver, Fail, Opened, Send
from trainer.feed.client.fleet import State

if TYPE_CHECKING:
    from tests.faults.trainer import SimulatedTrainer


class Link:
    """One rank's connection to one loader.

    As ZeroMQ has it: what was sent on a connection that is gone may still come, but no WELCOME does, since a new HELLO is sent
    on the new one. A connection may break without the rank hearing of it before the next one stands.
    """

    def __init__(self, rank: SimulatedRank, loader: SimulatedLoader) -> None:
        self.rank, self.loader, self.world = rank, loader, rank.world
        self.generation = 0
        self.up = False
        self.excluded = False
        """The rank was sent rubbish on it, and may use it no more."""
        loader.links.append(self)

    def __str__(self) -> str:
        return f"{self.rank.name} <- {self.loader.name}"

    def connect_soon(self) -> None:
        """Connect, as ZeroMQ does by itself."""
        self.world.after(self.world.rng.choice((1, 4, 16)) * TICK, self._connect, self.generation)

    def _connect(self, generation: int) -> None:
        if generation != self.generation or self.up or self.rank.dead or not self.loader.alive:
            return
        if self.loader.hung:
            self.world.after(0.25, self._connect, generation)
            return
        self.generation += 1
        self.up, self.excluded = True, False
        self.world.say("%s connected", self)
        self._ends()
        self.rank.core.connected(self.loader.number, self.world.now)
        self.rank.touch()

    def break_(self, told_after: float | None) -> None:
        """The connection is gone; told_after: until the rank hears of it."""
        if self.up:
            self.up = False
            self.generation += 1
            if told_after is not None:
                self.world.after(told_after, self._tell_lost, self.generation)

    def _tell_lost(self, generation: int) -> None:
        if generation == self.generation and not self.rank.dead:
            self.world.say("%s lost", self)
            self._ends()
            self.rank.core.lost(self.loader.number, "the connection broke", self.world.now)
            self.rank.touch()

    def send(self, message: Message) -> None:
        """From the rank to the loader."""
        if self.up:
            self.world.carry(self.loader.receive, self, self.generation, message)

    def answer(self, message: Message, ticket: Ticket | None = None) -> None:
        """From the loader to the rank; ticket: whose piece it is."""
        world = self.world
        if not self.up or self.rank.dead:
            return
        if world.scenario.garble and world.noisy and world.rng.random() < world.scenario.garble:
            self.excluded = True
            if ticket is None or world.rng.random() < 0.5:
                world.carry(self._garbled, self.generation)
                return
            message = make_piece(ticket, self.loader.name, extra=1)
        world.carry(self._arrive, self.generation, message)

    def _garbled(self, generation: int) -> None:
        if generation == self.generation and not self.rank.dead:
            self.world.say("%s sent rubbish", self)
            self._ends()
            self.rank.core.broken(self.loader.number, "unknown kind", self.world.now)
            self.rank.touch()

    def _arrive(self, generation: int, message: Message) -> None:
        if self.rank.dead or (generation != self.generation and isinstance(message, Welcome | Refuse)):
            return
        if self.world.log is not None:
            text = f"PIECE {message.ticket} of {message.loader}" if isinstance(message, Piece) else str(message)
            self.world.say("%s: %s%s", self, text, "" if generation == self.generation else " (stale)")
        number = self.loader.number
        known = self.rank.core.fleet.loaders[number]
        before = (known.name, known.state)
        self.rank.asks.arrived(number, message)
        self.rank.core.received(number, message, self.world.now)
        if isinstance(message, Welcome) and before != (known.name, State.READY):
            self.rank.asks.joined(number)
        self.rank.touch()

    def _ends(self) -> None:
        """Told before the rank hears that the connection is no more, or is a new one."""
        known = self.rank.core.fleet.loaders[self.loader.number]
        self.rank.asks.lost(self.loader.number)
        if known.state is State.READY and not known.draining:
            self.rank.asks.failed(self.loader.number)


class SimulatedRank:
    """One rank of one life of the trainer."""

    def __init__(self, trainer: SimulatedTrainer, number: int) -> None:
        self.trainer, self.world, self.number = trainer, trainer.world, number
        self.options = trainer.world.scenario.options(trainer.life, number)
        self.name = f"rank {number}.{trainer.life}"
        self.core = trainer.make_core(self.options, self.world.now)
        self.dead = False
        self.ready: deque[Deliver] = deque()
        """Delivered, and not taken by the training loop."""
        self.rows: list[list[Row]] = []
        """Of the micro-batches taken for the step that is being gathered."""
        self.last_delivery = self.world.now
        self.links = [Link(self, loader) for loader in trainer.loaders]
        self._session, self._started = 0, False
        self._cursor = (0, 0)
        self._due = (0, 0, 0, 0)  # epoch, sample at which it was entered, step, index: of the next delivery
        self.asks = AskOracle(self)
        self._asked: dict[int, Ticket] = {}  # asked for and not delivered
        self._parts: dict[int, Ticket] = {}  # of divided tickets
        self._used: set[int] = set()  # ticket numbers, also of earlier sessions
        self._num_rows = 0  # asked for and not taken
        self._wake_at = float("inf")
        self._touched = False

    def begin(self, epoch: int, first: int) -> None:
        """Iterate from this sample on: at the start, and again after a soft crash."""
        self._session += 1
        self._cursor = (epoch, first)
        self.ready.clear()
        self.rows.clear()
        self._asked.clear()
        self._parts.clear()
        self.asks.began_anew()
        self._num_rows = 0
        self._due = (epoch, first, 0, 0)
        if self._started:
            self._start()
        else:
            self.core.open(epoch, self.world.now)
        self.touch()

    def _start(self) -> None:
        self._started = True
        self.core.start(self._session, *self._cursor, self.world.scenario.num_epochs, self.world.now)
        self.touch()

    def take(self) -> None:
        """The training loop takes a micro-batch."""
        delivery = self.ready.popleft()
        asked = zip(delivery.slice.runs, delivery.pieces, strict=True)
        self.rows.append([(run.epoch, *key[1:]) for run, piece in asked for key in piece.keys.tolist()])
        self._num_rows -= delivery.slice.num_rows
        self.core.taken(delivery.session)
        self.touch()

    # -- turns

    def touch(self) -> None:
        """Something was told to the core."""
        if not self._touched:
            self._touched = True
            self.trainer.touched.append(self)

    def wake(self) -> None:
        """The time has come that the core asked for."""
        if not self.dead and self._wake_at <= self.world.now:
            self._wake_at = float("inf")
            self.touch()

    def turn(self) -> None:
        """Carry out what the core says."""
        self._touched = False
        if self.dead:
            return
        now = self.world.now
        for command in self.core.advance(now):
            if isinstance(command, Send):
                self._sent(command)
            elif isinstance(command, Deliver):
                self._delivered(command)
            elif isinstance(command, Opened):
                if not self._started:
                    self.trainer.last_progress = now  # before, the connect deadline counts; from here on that of data
                    self._start()
            elif isinstance(command, Fail):
                self.trainer.failed(self, command.error)
                return
            else:
                self.world.say("%s warns: %s", self.name, command.text)
        self._check_buffer()
        next_time = self.core.next_time(now)
        if next_time <= now and not self._touched:
            raise Violation("spin", f"{self.name} asks to be called again at {next_time}, which is not after now")
        if next_time < self._wake_at:
            self._wake_at = next_time
            if next_time < float("inf"):
                self.world.after(next_time - now, self.wake)

    # -- oracles

    def _sent(self, command: Send) -> None:
        loader, message = command.loader, command.message
        if self.world.log is not None:
            self.world.say("%s -> %s: %s", self.name, self.trainer.loaders[loader].name, message)
        if isinstance(message, Ticket):
            self._check_ticket(message)
            self.asks.asked(loader, message, is_hedge=command.is_hedge)
        self.links[loader].send(message)

    def _check_ticket(self, ticket: Ticket) -> None:
        known = self._parts.get(ticket.ticket) or self._asked.get(ticket.ticket)
        if known is None:
            if ticket.ticket in self._used:
                raise Violation("tickets", f"{self.name} uses number {ticket.ticket} again, which is done")
            self._used.add(ticket.ticket)
            if ticket.rows:  # a part of one that counts already
                self._parts[ticket.ticket] = ticket
                return
            self._asked[ticket.ticket] = ticket
            self._num_rows += ticket.count
        elif known != ticket:
            raise Violation("tickets", f"{self.name} gives number {ticket.ticket} to {known} and to {ticket}")
        options = self.options
        if len(self._asked) > max(options.max_tickets, options.micro_batch_size):
            raise Violation("tickets", f"{self.name} holds {len(self._asked)} tickets, at most {options.max_tickets}")
        if self._num_rows > options.window * options.micro_batch_size:
            raise Violation(
                "window", f"{self.name} asked for {self._num_rows} samples not yet taken, window {options.window}"
            )

    def _check_buffer(self) -> None:
        tickets, options = self.core.tickets, self.options
        if tickets.num_tickets > max(options.max_tickets, options.micro_batch_size):
            raise Violation("buffer", f"{self.name} holds {tickets.num_tickets} tickets, at most {options.max_tickets}")
        if len(tickets.batches) + len(self.ready) > options.window:
            raise Violation(
                "buffer", f"{self.name} holds {len(tickets.batches)} + {len(self.ready)} of {options.window}"
            )

    def _delivered(self, delivery: Deliver) -> None:
        scenario, options = self.world.scenario, self.options
        epoch, entered, step, index = self._due
        rows = scenario.stream(epoch)
        start = entered + step * GLOBAL_BATCH + (index * options.world_size + self.number) * options.micro_batch_size
        due = rows[start : start + options.micro_batch_size]
        self.world.say("%s is given %s", self.name, delivery.slice)
        keys = [tuple(key) for piece in delivery.pieces for key in piece.keys.tolist()]
        if (delivery.session, delivery.slice.epoch, delivery.slice.num_rows) != (self._session, epoch, len(due)):
            raise Violation("order", f"{self.name} was given {delivery.slice}, due is epoch {epoch}, {due}")
        runs = [(run.epoch, run.lane, run.start + n) for run in delivery.slice.runs for n in range(run.count)]
        if runs != due:
            raise Violation("order", f"{self.name} was given {delivery.slice}, due is epoch {epoch}, {due}")
        wanted = [(lane // LANES, lane, position) for _, lane, position in due]
        if keys != wanted or [image for piece in delivery.pieces for image in piece.images] != [
            picture(r) for r in due
        ]:
            raise Violation("payload", f"{self.name} was given {keys} for {due}")
        for piece in delivery.pieces:
            self._asked.pop(piece.ticket, None)
            self.asks.delivered(piece.ticket)
        self.ready.append(delivery)
        self.last_delivery = self.world.now
        passes = GLOBAL_BATCH // (options.micro_batch_size * options.world_size)
        step, index = (step, index + 1) if index + 1 < passes else (step + 1, 0)
        if entered + step * GLOBAL_BATCH >= len(rows):
            epoch, entered, step = epoch + 1, 0, 0
        self._due = (epoch, entered, step, index)
        self.trainer.progress()
