"""The loaders as the core sees them: handshake, held entries, lane lengths, the home of each lane, silent loaders.

    ABSENT --connected--> CONNECTED --WELCOME--> READY     any state --lost--> ABSENT
                              `------REFUSE, or a WELCOME that differs, or a bad frame--> REFUSED
    ABSENT --no longer listed--> LEFT, until another address takes the number

A lane's home is the loader that is asked for it first. Pure: time is an argument, messages go out as commands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.order.mixture import MixedOrder
from stoker_proto.order.stream import Pass
from stoker_proto.wire.messages import Epoch, Hello, Lanes, Message, Ping, Pong, Refuse, Welcome
from stoker_proto.wire.peer_text import plain
from trainer.feed.client.commands import Command, Send
from trainer.feed.client.epochs import Epochs
from trainer.feed.client.holdings import Missing, holdings_of, holds, lacked_by_both, share_a_shard
from trainer.feed.client.homes import Homes
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.pace import NO_LANES, LaneShares


class State(Enum):
    """Where a loader is in the handshake."""

    ABSENT = "not connected"
    CONNECTED = "connected, no WELCOME yet"
    READY = "ready"
    REFUSED = "refused"
    LEFT = "no longer listed"


@dataclass(slots=True)
class Loader:
    """One address, and the incarnation that answers there now."""

    address: str
    state: State = State.ABSENT
    note: str = "never reached"
    """Why it is not ready."""
    name: str = ""
    """Name of the incarnation that said WELCOME."""
    last_name: str = ""
    """The name before the connection was lost."""
    held: frozenset[int] = frozenset()
    """Entries that it holds, whole or in part."""
    missing: Mapping[int, Sequence[Missing]] = field(default_factory=dict)
    """Entry held -> its shards that are not there, in order."""
    draining: bool = False
    answered: set[Pass] = field(default_factory=set)
    """Passes of which it has sent the lanes."""
    complete_for: frozenset[Pass] | None = None
    """The wanted passes at the time when it had sent the lanes of all those that it holds."""
    heard_at: float | None = None
    waiting_since: float | None = None
    """When the first PING was sent after which nothing has come."""
    is_overdue: bool = False
    """An answer took unusually long, and nothing has come since."""
    pong_s: float = 0.0
    """The longest recent time from PING to PONG."""
    hello_at: float = 0.0
    ping_at: float = 0.0
    epoch_at: float = 0.0
    pong_nonce: int = -1
    progress: dict[str, float] = field(default_factory=dict)
    first_progress: dict[str, float] = field(default_factory=dict)
    """Counters of this incarnation's first PONG, from before its first ticket of this rank."""

    def anew(self, state: State, note: str) -> Loader:
        """The same address with a new connection, or none: nothing known of the last connection still holds."""
        last_name = self.name or self.last_name
        return Loader(self.address, state, note, last_name=last_name, heard_at=self.heard_at)

    def silence_s(self, options: CoreOptions) -> float:
        """How long a PING may go unanswered before the loader counts as silent."""
        if not self.is_overdue:
            return options.silence_s
        return min(max(options.probe_s, min(4 * self.pong_s, 2 * options.probe_s)), options.silence_s)


_MAX_DIFFERENCES = 20  # of a loader's REFUSE that are shown


class Fleet:
    """All loaders, as one rank knows them."""

    def __init__(self, options: CoreOptions, out: list[Command], shares: LaneShares) -> None:
        """out: commands are appended here; shares: each loader's share of the lanes; hears of loaders that join."""
        self.options, self._out, self.shares = options, out, shares
        self.addresses = list(options.addresses)
        """By loader number."""
        self.loaders = [Loader(address) for address in self.addresses]
        self.not_found: dict[str, str] = {}
        """An entry of cluster.loader_addresses that names no address now -> why."""
        self.pins = dict(options.fingerprints)
        self._named = {"order"}  # names of fingerprints that a loader sent; both sides know the order
        self.processor = ""
        self.unseen: dict[int, Sequence[Missing]] = {}
        """Entry -> shards that no loader has held so far; of entries that a loader has held."""
        self.epochs = Epochs(options)
        self._homes = Homes(self.addresses, options.order.lanes)
        self._nonce = 0

    # -- who there is

    def join(self, address: str) -> int:
        """The number of one more address: the first that no loader has."""
        for number, loader in enumerate(self.loaders):
            if loader.state is State.LEFT:
                self.addresses[number], self.loaders[number] = address, Loader(address)
                self._homes.forget()
                return number
        self.addresses.append(address)
        self.loaders.append(Loader(address))
        return len(self.loaders) - 1

    def leave(self, number: int) -> bool:
        """The address is listed no more. Returns whether the loader is forgotten: not while there is a connection."""
        loader = self.loaders[number]
        if loader.state is State.ABSENT:
            loader.state = State.LEFT
        return loader.state is State.LEFT

    # -- connection and handshake

    def connected(self, number: int, now: float) -> None:
        """There is a new connection: send HELLO."""
        loader = self.loaders[number]
        self.loaders[number] = loader.anew(State.CONNECTED, "no WELCOME yet")
        self._send_hello(number, now)

    def lost(self, number: int, reason: str) -> None:
        """The connection is gone, and with it what the loader held."""
        loader = self.loaders[number]
        note = f"{loader.note}; {reason}" if loader.state is State.REFUSED else reason
        self.loaders[number] = loader.anew(State.ABSENT, note)

    def refuse(self, number: int, reason: str) -> None:
        """Use nothing of this loader until it connects again."""
        loader = self.loaders[number]
        loader.state, loader.note, loader.held, loader.missing = State.REFUSED, reason, frozenset(), {}

    def refused_by_loader(self, number: int, message: Refuse) -> str:
        """The text of its REFUSE."""
        rows = [[*map(plain, row[:3]), "?", "?", "?"][:3] for row in message.differences[:_MAX_DIFFERENCES]]
        if message.protocol != PROTOCOL_VERSION:
            rows.insert(0, ["protocol", str(message.protocol), str(PROTOCOL_VERSION)])
        return self._differ(number, rows, "refused us")

    def welcome(self, number: int, message: Welcome, now: float) -> str | None:
        """Accept a WELCOME. Returns the differences as text where the loader must not be used in this run."""
        loader, split = self.loaders[number], self.options.split
        rows: list[list[str]] = []
        if message.protocol != PROTOCOL_VERSION:
            rows.append(["protocol", str(message.protocol), str(PROTOCOL_VERSION)])
        entries, ours = message.num_entries.get(split, 0), len(self.options.entries)
        if entries != ours:
            rows.append([f"entries of the {split} data", str(entries), str(ours)])
        for name, value in sorted(message.fingerprints.items()):
            if self.pins.get(name, value) != value:
                rows.append([name, value, self.pins[name]])
        held = frozenset(message.held.get(split, []))
        if not all(0 <= entry < ours for entry in held):
            rows.append([f"entries held of {split}", str(sorted(held)), f"0 to {ours - 1}"])
        missing = holdings_of(message, split)
        if missing is None:
            rows.append([f"shards missing of {split}", plain(str(message.missing.get(split)), 200), "ranges in order"])
        if rows:
            return self._differ(number, rows, "is refused")
        if loader.name != message.loader:
            loader.answered.clear()
            self.shares.joined(number, now)
        loader.complete_for = None
        loader.missing = missing or {}
        for entry in held:
            self.unseen[entry] = lacked_by_both(self.unseen.get(entry, loader.missing[entry]), loader.missing[entry])
        self.pins.update(message.fingerprints)
        self._named |= message.fingerprints.keys()
        self.processor = self.processor or message.processor
        loader.state, loader.note, loader.name, loader.held, loader.draining = (
            State.READY,
            "",
            message.loader,
            held,
            False,
        )
        self.ping(number, now)  # before EPOCH, so that the first PONG's counters hold none of our work
        self._ask_lanes(number, now)
        return None

    def fingerprints(self) -> dict[str, str]:
        """What a batch of this run means: fingerprints that loaders sent, the order and the mixture. Known once an epoch is.

        Without names that only a checkpoint has: the comparison with that checkpoint must show that they are gone.
        """
        found = {name: value for name, value in self.pins.items() if name in self._named}
        return {**found, **self.epochs.fingerprints()}

    def _differ(self, number: int, rows: Sequence[Sequence[str]], what: str) -> str:
        shown = "; ".join(f"{name}: the loader has {theirs}, this rank {ours}" for name, theirs, ours in rows)
        return (
            f"the loader at {self.loaders[number].address} {what}: {shown or 'no reason given'}; start it with this run's "
            "config, data and version, or leave it out"
        )

    # -- epochs

    @property
    def orders(self) -> dict[int, MixedOrder]:
        """Epoch -> its stream, for open epochs whose lanes are known."""
        return self.epochs.orders

    def open(self, epoch: int, now: float) -> None:
        """Ask the loaders for the lanes of the epoch, unless that is done already."""
        before = self.epochs.wanted
        self.epochs.open(epoch)
        self._ask_all(before, now)

    def close_except(self, epochs: set[int]) -> None:
        """Forget all other epochs."""
        self.epochs.close_except(epochs)
        for loader in self.loaders:  # an epoch that is opened again must be answered again
            loader.answered &= self.epochs.wanted
            loader.complete_for = None

    def lanes(self, number: int, message: Lanes, now: float) -> tuple[list[int], str | None]:
        """Accept LANES. Returns (epochs that became complete now, differences as text). Raises ConfigError."""
        if message.split != self.options.split or self.loaders[number].state is not State.READY:
            return [], None
        rows = self.epochs.take(message)
        if rows:
            return [], self._differ(number, rows, "is refused")
        self.loaders[number].answered |= {Pass(message.epoch, entry) for entry in message.lengths} & self.epochs.wanted
        before = self.epochs.wanted
        complete = self.epochs.complete()
        self._ask_all(before, now)
        return complete, None

    def _ask_all(self, before: frozenset[Pass], now: float) -> None:
        """Ask every ready loader for the lanes of passes that are wanted now and were not before."""
        if self.epochs.wanted is not before and self.epochs.wanted - before:
            for number, loader in enumerate(self.loaders):
                if loader.state is State.READY:
                    self._ask_lanes(number, now)

    # -- whom to ask

    def entry_of(self, lane: int) -> int:
        """The entry that a lane of the stream belongs to."""
        return lane // self.options.order.lanes

    def choices(self, lane: int, epoch: int, now: float, shards: frozenset[int] = frozenset()) -> list[int]:
        """Loaders that can answer for the lane: its home first, then the others by preference, silent ones last.

        shards: those that the loader must hold, of the lane's entry."""
        entry = self.entry_of(lane)
        awake: dict[int, int] = {}  # loader -> level
        silent = []
        for number, loader in enumerate(self.loaders):
            if (
                loader.state is State.READY
                and not loader.draining
                and entry in loader.held
                and Pass(epoch, entry) in loader.answered
            ):
                if self.silent(number, now):
                    silent.append(number)
                else:
                    awake[number] = self.shares.level(number, now)
        found = self._homes(entry, awake)[lane % self.options.order.lanes] + silent
        if not shards:
            return found
        return [number for number in found if holds(self.loaders[number].missing[entry], shards)]

    def spares(self, lane: int, epoch: int, now: float, shards: frozenset[int] = frozenset()) -> list[int]:
        """The loaders of `choices` that will probably answer quickly."""
        return [
            number
            for number in self.choices(lane, epoch, now, shards)
            if self.shares.level(number, now) < NO_LANES and not self.silent(number, now)
        ]

    def helps(self, number: int, other: int, now: float) -> bool:
        """Whether the other loader holds some of this one's shards, is ready, and is not the slower one."""
        loader, helper = self.loaders[number], self.loaders[other]
        able = helper.state is State.READY and not helper.draining and not self.silent(other, now)
        quicker = self.shares.level(other, now) <= self.shares.level(number, now)
        return number != other and able and quicker and share_a_shard(loader.missing, helper.missing)

    def heard(self, number: int, now: float) -> None:
        """Any message shows that a loader is alive."""
        loader = self.loaders[number]
        loader.heard_at, loader.waiting_since, loader.is_overdue = now, None, False

    def overdue(self, number: int, now: float) -> None:
        """An answer of the loader takes unusually long: a PING shows whether it is alive."""
        loader = self.loaders[number]
        if loader.state is State.READY:
            loader.is_overdue = True
            if loader.waiting_since is None:
                self.ping(number, now)

    def silent(self, number: int, now: float) -> bool:
        """Whether a PING has been unanswered for too long."""
        loader = self.loaders[number]
        return loader.waiting_since is not None and now >= loader.waiting_since + loader.silence_s(self.options)

    def uncovered(self) -> list[int]:
        """Entries that no ready loader holds."""
        held: set[int] = set()
        for loader in self.loaders:
            if loader.state is State.READY:
                held |= loader.held
        return [entry for entry in range(len(self.options.entries)) if entry not in held]

    def gaps(self, numbers: Iterable[int]) -> dict[int, Sequence[Missing]]:
        """Entry -> its shards that none of these loaders holds, where one of them holds another part of the entry."""
        found: dict[int, Sequence[Missing]] = {}
        for number in numbers:
            for entry, missing in self.loaders[number].missing.items():
                found[entry] = lacked_by_both(found.get(entry, missing), missing)
        return {entry: missing for entry, missing in found.items() if missing}

    def ready(self) -> list[int]:
        """Loaders that have said WELCOME."""
        return [number for number, loader in enumerate(self.loaders) if loader.state is State.READY]

    def is_covered(self) -> bool:
        """Whether loaders have held all shards of these entries, at the same time or one after the other."""
        return not any(self.unseen.values())

    # -- liveness

    def ping(self, number: int, now: float) -> int:
        """Send a PING; returns its nonce."""
        self._nonce += 1
        loader = self.loaders[number]
        loader.ping_at = now
        loader.waiting_since = now if loader.waiting_since is None else loader.waiting_since
        self._send(number, Ping(nonce=self._nonce))
        return self._nonce

    def pong(self, number: int, message: Pong, now: float) -> None:
        """Keep the counters of the newest PONG."""
        loader = self.loaders[number]
        if message.nonce > loader.pong_nonce:
            took_s = now - loader.ping_at
            if took_s < self.options.probe_s:  # longer ones show a hang, not the loader's speed
                loader.pong_s = max(took_s, 0.9 * loader.pong_s)
            loader.pong_nonce, loader.progress = message.nonce, message.progress
            loader.first_progress = loader.first_progress or message.progress

    def tick(self, now: float) -> None:
        """Send again what has no answer, and the PINGs that are due."""
        for number, loader in enumerate(self.loaders):
            if loader.state is State.CONNECTED and now >= loader.hello_at + self.options.hello_retry_s:
                self._send_hello(number, now)
            if loader.state is not State.READY:
                continue
            if now >= loader.ping_at + self.options.ping_interval_s:
                self.ping(number, now)
            if now >= loader.epoch_at + self.options.hello_retry_s:
                self._ask_lanes(number, now)

    def next_time(self, now: float) -> float:
        """The next time after `now` at which `tick` has something to do or a loader starts to count as silent."""
        times = [float("inf")]
        for loader in self.loaders:
            if loader.state is State.CONNECTED:
                times.append(loader.hello_at + self.options.hello_retry_s)
            if loader.state is State.READY:
                times.append(loader.ping_at + self.options.ping_interval_s)
                if loader.waiting_since is not None:
                    times.append(loader.waiting_since + loader.silence_s(self.options))
                if self._unanswered(loader):
                    times.append(loader.epoch_at + self.options.hello_retry_s)
        return min((time for time in times if time > now), default=float("inf"))

    def _send_hello(self, number: int, now: float) -> None:
        self.loaders[number].hello_at = now
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            client=self.options.client,
            rank=self.options.rank,
            world_size=self.options.world_size,
            fingerprints=dict(self.pins),
        )
        self._send(number, hello)

    def _unanswered(self, loader: Loader) -> list[Pass]:
        """Passes whose lanes the loader has not sent yet. Called at every event, so the common case, none, is fast."""
        wanted = self.epochs.wanted
        if loader.complete_for is wanted:
            return []
        missing = sorted(one for one in wanted - loader.answered if one.entry in loader.held)
        if not missing:
            loader.complete_for = wanted
        return missing

    def _ask_lanes(self, number: int, now: float) -> None:
        missing = self._unanswered(self.loaders[number])
        for epoch in sorted({one.number for one in missing}):
            self.loaders[number].epoch_at = now
            entries = [one.entry for one in missing if one.number == epoch]
            self._send(number, Epoch(split=self.options.split, epoch=epoch, entries=entries))

    def _send(self, number: int, message: Message) -> None:
        self._out.append(Send(number, message))
