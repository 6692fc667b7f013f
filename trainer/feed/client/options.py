"""What the pure core is told once (`CoreOptions`) and what it answers to every event: a list of commands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stoker_proto.errors import StokerError
from stoker_proto.wire.messages import Message, Piece
from trainer.feed.client.schedule import Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreOptions:
    """The run as one rank sees it. Times are seconds."""

    split: str
    """`train` or `val`."""
    entries: tuple[str, ...]
    """entry number -> its key in the config and its path, for messages."""
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
    max_deaths: int = 10
    """Incarnations of loaders, and workers, that may end with one ticket in work before it counts as poison."""
    ticket_deadline_s: float = 10.0
    """The longest; the loaders' measured latency makes it shorter."""
    data_deadline_s: float = 120.0
    connect_deadline_s: float = 60.0
    hello_retry_s: float = 2.0
    """A HELLO or EPOCH without an answer is sent again after this time."""
    ping_interval_s: float = 2.0
    silence_s: float = 7.0
    """A loader not heard of for this long gets tickets only where no other can answer them."""
    probe_s: float = 0.75
    """The same for a loader that owes an answer for unusually long."""
    shortest_deadline_s: float = 1.0
    """No deadline is shorter, however quick the loaders are."""
    shortest_hedge_s: float = 0.2
    """Nor is another loader asked as well before."""
    hedge_multiple: float = 3.0
    """Another loader is asked as well after so many times the latency to be expected."""
    hedge_share: float = 0.05
    """Hedges per ticket, at most; 0: none."""
    takeover_ratio: float = 3.0
    """A loader gives lanes away when an idle one is so many times faster; 0: never."""
    look_s: float = 0.5
    """Time between two looks at who is overloaded."""
    hold_s: float = 10.0
    """For which lanes stay away at first."""
    first_backoff_s: float = 1.0
    backoff_s: float = 60.0
    """A loader that fails again and again is not home to lanes for so long after it has come back, at most."""
    steady_s: float = 60.0
    """A loader that stood for so long does not flap."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send the message to the loader of this number."""

    loader: int
    message: Message
    is_hedge: bool = False
    """A ticket that another loader has in work and may well still answer."""


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
