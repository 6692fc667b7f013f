"""What the pure core is told once (`CoreOptions`) and what it answers to every event: a list of commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stoker_proto.errors import StokerError
from stoker_proto.messages import Message, Piece
from trainer.feed.schedule import Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreOptions:
    """The run as one rank sees it. Times are seconds."""

    split: str
    """`train` or `val`."""
    entries: tuple[str, ...]
    """The split's data paths as the config names them: entry number -> path."""
    sources: tuple[int, ...]
    """Number of the source that each entry belongs to."""
    source_names: tuple[str, ...] = ("data",)
    weights: tuple[float, ...] = ()
    """Of the sources; empty: an epoch is one pass over each."""
    weigh_by: str = "samples"
    """What weights are shares of: `samples` or `tokens`."""
    addresses: tuple[str, ...]
    """Where the loaders are; a loader's number is its place here."""
    rank: int
    world_size: int
    client: str
    """Random name of this incarnation, made outside."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """What is known already (from a checkpoint, from the config): a loader that differs is refused."""
    lanes: int
    """Lanes per entry: `data.order.lanes`."""
    cell: int
    """`data.order.cell`."""
    global_batch_size: int
    micro_batch_size: int
    window: int
    """Micro-batches asked for and not yet taken by the consumer, at most."""
    max_tickets: int = 512
    """Tickets asked for and not yet delivered, at most; one micro-batch may always be asked for."""
    max_attempts: int = 10
    """Times that one ticket is asked for before it counts as poison."""
    ticket_deadline_s: float = 10.0
    data_deadline_s: float = 120.0
    connect_deadline_s: float = 60.0
    hello_retry_s: float = 2.0
    """A HELLO or EPOCH without an answer is sent again after this time."""
    ping_interval_s: float = 2.0
    silence_s: float = 7.0
    """A loader not heard of for this long gets tickets only where no other can answer them."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send the message to the loader of this number."""

    loader: int
    message: Message


@dataclass(frozen=True, slots=True)
class Opened:
    """The stream of the epoch is known."""

    epoch: int
    num_samples: int
    source_samples: tuple[int, ...]
    """Of each source in this epoch."""
    pass_samples: tuple[int, ...]
    """Of each source in one pass over it."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """The next micro-batch, in order: the pieces of its runs, in the order of the runs."""

    session: int
    """Which `start` it belongs to."""
    slice: Slice
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Warn:
    """Say this to the user; the run goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class Fail:
    """The run cannot go on. Always the last command."""

    error: StokerError


Command = Send | Opened | Deliver | Warn | Fail
