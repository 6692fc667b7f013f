"""A simulated loader: the protocol's answers after some time, and all the ways in which one can go wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.wire.messages import (
    Drain,
    Epoch,
    Failure,
    Hello,
    Lanes,
    Message,
    Piece,
    Ping,
    Pong,
    Shards,
    Ticket,
    Welcome,
)
from stoker_proto.wire.row_bits import unpack_rows
from tests.faults.parts import missing_of, shards_of
from tests.faults.reference import LANES, lanes_of, make_piece
from tests.faults.scenario import TICK
from tests.faults.world import World

if TYPE_CHECKING:
    from tests.faults.ranks import Link


class SimulatedLoader:
    """One address; an incarnation lives there or none does."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.held = sorted(world.scenario.held[number])
        self.lacks = world.scenario.lacks[number] if world.scenario.lacks else frozenset()
        self.incarnation = 0
        self.alive = self.hung = self.draining = self.full = False
        self.gone = False
        """Left for good."""
        self.barred = False
        """Cannot come back as long as the blackout lasts."""
        self.links: list[Link] = []
        """Connections to it, of all ranks that live."""
        self._in_work: set[tuple[int, int]] = set()  # (link's id, ticket)
        self.stuck = False
        self.slow = 1
        """Times that a piece takes longer than it should."""
        self._free_at = 0.0  # when the tickets that came are done, where one is worked on at a time
        self._stuck: list[tuple[Link, Ticket]] = []  # what came while it stuck
        self._waiting: list[tuple[Link, int, Message]] = []  # what came while it hung
        self._finished: list[tuple[Link, Message]] = []  # answers that were due while it hung

    @property
    def name(self) -> str:
        """Of the incarnation."""
        return f"loader{self.number}.{self.incarnation}"

    # -- life

    def start(self) -> None:
        """A new incarnation, to which the ranks connect."""
        if self.alive or self.gone or self.barred:
            return
        self.incarnation += 1
        self.alive, self.hung, self.draining, self.full = True, False, False, False
        self.stuck, self._free_at = False, 0.0
        self.world.say("%s starts, holds %s", self.name, self.held)
        for link in self.links:
            link.connect_soon()

    def kill(self, why: str) -> None:
        """Gone, with all it had in work. Ranks hear of it soon, late, or not before it is back."""
        if not self.alive:
            return
        self.world.say("%s %s", self.name, why)
        self.alive = False
        self._in_work.clear()
        self._stuck.clear()
        self._waiting.clear()
        self._finished.clear()
        for link in self.links:
            link.break_(self.world.rng.choice((TICK, 0.5, 1.5, None)))

    def hang(self) -> None:
        """Stopped: connections stand, nothing is answered."""
        if self.alive:
            self.world.say("%s hangs", self.name)
            self.hung = True

    def wake(self, incarnation: int) -> None:
        """Goes on after a hang."""
        if not self.hung or incarnation != self.incarnation:
            return
        self.world.say("%s goes on", self.name)
        self.hung = False
        finished, self._finished = self._finished, []
        waiting, self._waiting = self._waiting, []
        for link, answer in finished:
            link.answer(answer)
        for link, generation, message in waiting:
            self.receive(link, generation, message)

    def stick(self) -> None:
        """The workers stop: PINGs are answered, tickets are not."""
        if self.alive:
            self.world.say("%s sticks", self.name)
            self.stuck = True

    def loosen(self, incarnation: int) -> None:
        """Works again after it stuck."""
        if not self.stuck or incarnation != self.incarnation:
            return
        self.world.say("%s works again", self.name)
        self.stuck = False
        stuck, self._stuck = self._stuck, []
        for link, ticket in stuck:
            self._ticket(link, ticket)

    def serve_others(self, seconds: float) -> None:
        """So long it works on what somebody else asked for."""
        self._free_at = max(self._free_at, self.world.now) + seconds

    def drain(self) -> None:
        """Says that it leaves: what was asked for still comes."""
        if self.alive and not self.hung:
            self.world.say("%s drains", self.name)
            self.draining = True
            for link in self.links:
                link.answer(Drain(loader=self.name))

    # -- the protocol

    def receive(self, link: Link, generation: int, message: Message) -> None:
        """A rank's message comes."""
        if not self.alive or generation != link.generation or not link.up:
            return
        if self.hung:
            self._waiting.append((link, generation, message))
        elif isinstance(message, Ticket):
            self._ticket(link, message)
        else:
            link.answer(self._answer(message))

    def _answer(self, message: Message) -> Message:
        scenario = self.world.scenario
        if isinstance(message, Ping):
            return Pong(nonce=message.nonce, progress={"cpu_s": self.world.now})
        if isinstance(message, Epoch):
            lanes = lanes_of(scenario.shape, message.epoch)
            return Lanes(
                split=message.split,
                epoch=message.epoch,
                lengths={entry: list(lanes[entry]) for entry in self.held if entry in message.entries},
                starts={entry: [0] * LANES for entry in self.held if entry in message.entries},
                tokens={},
            )
        assert isinstance(message, Hello), message
        return Welcome(
            protocol=PROTOCOL_VERSION,
            loader=self.name,
            fingerprints={"plan": "p"},
            held={"train": self.held},
            missing={"train": missing_of(self.held, self.lacks)},
            num_entries={"train": scenario.entries},
            num_samples={"train": 1},
            processor="{}",
        )

    def _ticket(self, link: Link, ticket: Ticket) -> None:
        if self.full or self.draining:
            link.answer(Failure(ticket=ticket.ticket, reason="unavailable", message="full or draining"))
            return
        if self.stuck:
            self._stuck.append((link, ticket))
            return
        key = (id(link), ticket.ticket)
        if key not in self._in_work:
            self._in_work.add(key)
            takes_s = self.slow * self.world.scenario.build_s[self.number]
            if self.world.scenario.straggler:
                self.serve_others(takes_s)
                takes_s = self._free_at - self.world.now
            self.world.after(takes_s, self._built, self.incarnation, link, key, ticket)

    def _piece(self, ticket: Ticket) -> Piece | Shards | Failure:
        """What it answers, once it is made."""
        shards = shards_of(ticket.epoch, ticket.lane, ticket.start, ticket.count)
        wanted = shards
        if ticket.rows:
            wanted = [shards[row] for row in unpack_rows(ticket.rows, ticket.count).tolist()]
        if not self.lacks.intersection(wanted):
            return make_piece(ticket, self.name)
        if ticket.rows:
            return Failure(ticket=ticket.ticket, reason="unavailable", message="not held here")
        return Shards(ticket=ticket.ticket, loader=self.name, shards=shards)

    def _built(self, incarnation: int, link: Link, key: tuple[int, int], ticket: Ticket) -> None:
        if not self.alive or incarnation != self.incarnation:
            return
        self._in_work.discard(key)
        piece = self._piece(ticket)
        if self.hung:
            self._finished.append((link, piece))
        else:
            link.answer(piece, ticket)
