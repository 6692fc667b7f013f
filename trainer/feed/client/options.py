"""The core's fixed values: `CoreOptions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stoker_proto.config import FeedConfig, OrderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreOptions:
    """The run as one rank sees it. Times are seconds.

    What the user can set comes as objects of the config. The other times are the client's own; only tests change them.
    """

    split: str
    """`train` or `val`."""
    entries: tuple[str, ...]
    """entry number -> its key in the config and its path, for messages."""
    sources: tuple[int, ...]
    """Number of the source that each entry belongs to."""
    source_names: tuple[str, ...]
    weights: tuple[float, ...]
    """Weights of the sources; empty: an epoch is one pass over each."""
    weigh_by: str
    """What weights are shares of: `samples` or `tokens`."""
    addresses: tuple[str, ...]
    """Loaders' addresses that are known from the start; a loader's number is its index here. Others join later (`Core.join`)."""
    rank: int
    world_size: int
    client: str
    """Random name of this incarnation, made outside."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Known already, from a checkpoint or from the config: a loader that differs is refused."""
    feed: FeedConfig
    """`trainer.feed`."""
    order: OrderConfig
    """`data.order`."""
    global_batch_size: int
    micro_batch_size: int
    window: int
    """Largest number of micro-batches asked for and not yet taken by the consumer."""
    max_tickets: int = 512
    """Largest number of tickets asked for and not yet delivered; one micro-batch may always be asked for."""
    max_deaths: int = 10
    """So many loaders or workers may end while they work on one ticket; then the ticket is to blame, and the run ends."""
    hello_retry_s: float = 2.0
    """A HELLO or EPOCH without an answer is sent again after this time."""
    ping_interval_s: float = 2.0
    silence_s: float = 7.0
    """A loader that was silent for this long gets a ticket only if no other loader can answer it."""
    probe_s: float = 0.75
    """The same for a loader with an overdue answer."""
    shortest_deadline_s: float = 1.0
    """Lower bound of a ticket's deadline."""
    shortest_hedge_s: float = 0.2
    """Lower bound of the time until a second loader is asked as well."""
    look_s: float = 0.5
    """Time between two looks for overloaded loaders."""
    hold_s: float = 10.0
    """How long lanes stay with other loaders the first time."""
    first_backoff_s: float = 1.0
    """How long a loader has no lanes after its second failure in a row; doubles up to `feed.backoff_s`."""
    steady_s: float = 60.0
    """A failure after so long without one is the first in a row again."""
