"""What a rank keeps of a ticket on its way: whom it was asked of, how the attempts ended, and what came."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from stoker_proto.errors import StokerError
from stoker_proto.wire.messages import Piece, Ticket
from trainer.feed.client.schedule import Slice


@dataclass(slots=True)
class Ask:
    """One attempt that may still be answered."""

    loader: int
    asked_at: float
    hedge_at: float
    """From then on another loader may be asked as well."""
    deadline: float
    look_at: float
    """When the loader's owing this is next worth a thought: first to see whether it lives, then the deadline."""
    is_hedge: bool = False
    late: bool = False
    """Past its deadline: another may be asked, but this answer is still welcome."""


@dataclass(slots=True)
class Work:
    """One ticket on its way."""

    ticket: Ticket
    asks: list[Ask] = field(default_factory=list)
    attempts: int = 0
    tried: set[int] = field(default_factory=set)
    """Loaders that failed this ticket since all able ones had been tried."""
    rounds: int = 0
    """How often all able loaders had been tried."""
    denied: bool = False
    """One of those tried said that it cannot, and did not only let its deadline pass."""
    suspects: set[int] = field(default_factory=set)
    """Loaders that went away with this in work: they have died, if it is another incarnation that comes back."""
    deaths: int = 0
    """Incarnations of loaders, and workers of theirs, that ended with this in work."""
    retry_at: float = 0.0
    """Not asked again before."""
    history: deque[str] = field(default_factory=lambda: deque(maxlen=3))
    """How the last attempts ended."""
    outcome: Piece | StokerError | None = None

    def __str__(self) -> str:
        """Its place in the stream, and how the last attempts ended."""
        asked, tried = self.ticket, "; ".join(self.history)
        samples = f"samples {asked.start} to {asked.start + asked.count - 1}"
        place = f"lane {asked.lane}, {samples} of {asked.split} epoch {asked.epoch}"
        return f"{place} ({tried})" if tried else place


@dataclass(slots=True)
class Job:
    """One micro-batch on its way."""

    slice: Slice
    works: list[Work]


@dataclass(slots=True)
class Counters:
    """Of one rank since its start."""

    tickets: int = 0
    """Asked for, each once."""
    reissued: int = 0
    """Asked for again: the loader went away, failed, or did not answer in time."""
    hedges: int = 0
    """Asked of a second loader while the first was still waited for."""
    hedges_won: int = 0
    """Of these, answered first by the second."""
    takeovers: int = 0
    """Times that a loader was relieved of lanes."""
    duplicates: int = 0
    """Answers dropped, because the ticket had one, or is wanted no more."""
