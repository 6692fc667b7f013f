"""What the pure core answers to its events: a list of commands for `trainer.feed.sockets`."""

from __future__ import annotations

from dataclasses import dataclass

from stoker_proto.errors import StokerError
from stoker_proto.wire.messages import Message, Piece
from trainer.feed.client.schedule import Slice


@dataclass(frozen=True, slots=True)
class Send:
    """Send the message to the loader of this number."""

    loader: int
    message: Message
    is_hedge: bool = False
    """A ticket that another loader still works on."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The stream of the epoch is known."""

    epoch: int
    num_samples: int
    source_samples: tuple[int, ...]
    """Samples of each source in this epoch."""
    pass_samples: tuple[int, ...]
    """Samples of each source in one pass over it."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """The next micro-batch, in order: the pieces of its runs, in the order of the runs."""

    session: int
    """The number of the `start` that it belongs to."""
    slice: Slice
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Warn:
    """Show this to the user; the run continues."""

    text: str


@dataclass(frozen=True, slots=True)
class Fail:
    """The run cannot continue. Always the last command."""

    error: StokerError


Command = Send | Opened | Deliver | Warn | Fail
