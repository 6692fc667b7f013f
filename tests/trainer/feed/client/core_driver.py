"""Drives the pure core from a test: no socket, no thread, time is a number that the test moves."""

from __future__ import annotations

from collections.abc import Callable

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.config import FeedConfig, OrderConfig
from stoker_proto.order.lanes import Order
from stoker_proto.wire.messages import Epoch, Failure, Hello, Lanes, Message, Piece, Ping, Pong, Ticket, Welcome
from tests.trainer.feed.fake_loader import CELL, FINGERPRINTS, LANES, LENGTHS, make_piece
from trainer.feed.client.commands import Deliver, Fail, Opened, Send, Warn
from trainer.feed.client.core import Core
from trainer.feed.client.options import CoreOptions

EXPECTED = [
    (run.lane // LANES, run.lane, run.start + i)
    for run in Order(LENGTHS[0] + LENGTHS[1], CELL).runs(0, 60)
    for i in range(run.count)
]
"""(entry, lane, position) of the fake loader's 60 samples, as an epoch must deliver them."""


def make_options(num_loaders: int = 2, **overrides: object) -> CoreOptions:
    """One rank of one, micro-batches of 4, global batches of 8, over the fake loader's 60 samples.

    overrides: fields of CoreOptions and of FeedConfig.
    """
    of_feed = FeedConfig.__dataclass_fields__.keys() & overrides.keys()
    feed = {name: overrides.pop(name) for name in of_feed}
    values: dict[str, object] = {
        "split": "train",
        "entries": ("data.train_data_paths[0] (first.jsonl)", "data.train_data_paths[1] (second.jsonl)"),
        "sources": (0, 0),
        "source_names": ("data",),
        "weights": (),
        "weigh_by": "samples",
        "addresses": tuple(f"tcp://loader{n}:5555" for n in range(num_loaders)),
        "rank": 0,
        "world_size": 1,
        "client": "test",
        "feed": FeedConfig(**feed),  # type: ignore[arg-type]
        "order": OrderConfig(lanes=LANES, cell=CELL),
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "window": 4,
        **overrides,
    }
    return CoreOptions(**values)  # type: ignore[arg-type]


class CoreDriver:
    """A core, what it sent that is not answered yet, and what it delivered."""

    def __init__(self, num_loaders: int = 2, **overrides: object) -> None:
        self.options = make_options(num_loaders, **overrides)
        self.now = 100.0
        self.core = Core(self.options, self.now)
        self.tickets: list[tuple[int, Ticket]] = []
        """(loader, ticket) not answered yet."""
        self.sent: list[tuple[int, Message]] = []
        self.delivered: list[Deliver] = []
        self.opened: list[Opened] = []
        self.warnings: list[str] = []
        self.error: Exception | None = None
        self.held = {n: [0, 1] for n in range(num_loaders)}
        self.missing: dict[int, list[list[int | str]]] = {}
        """Loader -> `Welcome.missing` of the split."""
        self.names = {n: f"name{n}" for n in range(num_loaders)}
        self.fingerprints = {n: dict(FINGERPRINTS) for n in range(num_loaders)}
        self.silent: set[int] = set()
        """Loaders that answer nothing."""

    def connect(self, *loaders: int, start: bool = True) -> CoreDriver:
        """Connections stand; handshakes and lane lengths are answered."""
        for loader in loaders or self.names:
            self.core.connected(loader, self.now)
        self.advance()
        if start:
            self.core.start(1, 0, 0, 1, self.now)
            self.advance()
        return self

    def advance(self, seconds: float = 0.0) -> None:
        """Move time, carry commands out; everything but tickets is answered at once."""
        self.now += seconds
        while commands := self.core.advance(self.now):
            for command in commands:
                if isinstance(command, Send):
                    self._sent(command.loader, command.message)
                elif isinstance(command, Deliver):
                    self.delivered.append(command)
                elif isinstance(command, Opened):
                    self.opened.append(command)
                elif isinstance(command, Warn):
                    self.warnings.append(command.text)
                elif isinstance(command, Fail):
                    assert self.error is None, "failed twice"
                    self.error = command.error

    def _sent(self, loader: int, message: Message) -> None:
        self.sent.append((loader, message))
        if isinstance(message, Ticket):
            self.tickets.append((loader, message))
        elif loader not in self.silent:
            self.receive(loader, self._answer(loader, message))

    def _answer(self, loader: int, message: Message) -> Message:
        if isinstance(message, Hello):
            return self.welcome(loader)
        if isinstance(message, Epoch):
            lengths = {entry: LENGTHS[entry] for entry in self.held[loader] if entry in message.entries}
            return Lanes(
                split=message.split,
                epoch=message.epoch,
                lengths=lengths,
                starts={entry: [0] * len(lanes) for entry, lanes in lengths.items()},
                tokens={},
            )
        assert isinstance(message, Ping)
        return Pong(nonce=message.nonce, progress={"cpu_s": 1.0})

    def welcome(self, loader: int) -> Welcome:
        return Welcome(
            protocol=PROTOCOL_VERSION,
            loader=self.names[loader],
            fingerprints=self.fingerprints[loader],
            held={"train": self.held[loader]},
            missing={"train": self.missing.get(loader, [])},
            num_entries={"train": 2},
            num_samples={"train": 60},
            processor="{}",
        )

    def receive(self, loader: int, message: Message) -> None:
        self.core.received(loader, message, self.now)

    def answer(self, position: int = 0, with_: Callable[[Ticket, str], Message] = make_piece) -> Ticket:
        """Answer one of the open tickets."""
        loader, ticket = self.tickets.pop(position)
        self.receive(loader, with_(ticket, self.names[loader]))
        self.advance()
        return ticket

    def fail(self, position: int, reason: str) -> Ticket:
        return self.answer(position, lambda ticket, _: Failure(ticket=ticket.ticket, reason=reason, message="because"))

    def take(self, count: int = 1) -> None:
        """The consumer takes micro-batches."""
        for _ in range(count):
            self.core.taken(self.delivered[-1].session)
        self.advance()

    def finish(self, pick: Callable[[int], int] = lambda count: 0) -> None:
        """Answer everything, taking what is delivered, until nothing is open. pick: number of tickets -> which is next."""
        taken = len(self.delivered)
        while self.tickets:
            self.answer(pick(len(self.tickets)))
            self.take(len(self.delivered) - taken) if len(self.delivered) > taken else None
            taken = len(self.delivered)

    def keys(self) -> list[tuple[int, ...]]:
        """Keys of all delivered samples, in order."""
        return [tuple(key) for delivery in self.delivered for piece in delivery.pieces for key in piece.keys.tolist()]

    def forget_tickets(self) -> list[tuple[int, Ticket]]:
        """The open tickets; none of them is open for the test any more."""
        tickets, self.tickets = self.tickets, []
        return tickets


def asked(tickets: list[tuple[int, Ticket]]) -> set[int]:
    """Loaders that were asked."""
    return {loader for loader, _ in tickets}


__all__ = ["EXPECTED", "CoreDriver", "Piece", "asked", "make_options"]
