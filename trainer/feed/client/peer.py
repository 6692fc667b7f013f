"""One loader as the core sees it: where it is in the handshake, what it holds, when it was last heard of."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from trainer.feed.client.epochs import Pass
from trainer.feed.client.options import CoreOptions


class State(Enum):
    """Where a loader is in the handshake."""

    ABSENT = "not connected"
    GREETING = "connected, no WELCOME yet"
    READY = "ready"
    REFUSED = "refused"


@dataclass(slots=True)
class Loader:
    """One address of the config, and who answers there now."""

    address: str
    state: State = State.ABSENT
    note: str = "never reached"
    """Why it is not ready."""
    name: str = ""
    """Of the incarnation that said WELCOME."""
    last_name: str = ""
    """The name before the connection was lost."""
    held: frozenset[int] = frozenset()
    draining: bool = False
    answered: set[Pass] = field(default_factory=set)
    """Passes whose lanes it told."""
    told_all: frozenset[Pass] | None = None
    """The passes wanted when it was last found to have told all of them that it holds."""
    heard_at: float | None = None
    waiting_since: float | None = None
    """When the first PING was sent that nothing was heard since."""
    owing: bool = False
    """It owed an answer for unusually long, and nothing was heard since."""
    pong_s: float = 0.0
    """The longest that a PONG lately took."""
    hello_at: float = 0.0
    ping_at: float = 0.0
    epoch_at: float = 0.0
    pong_nonce: int = -1
    progress: dict[str, float] = field(default_factory=dict)
    first_progress: dict[str, float] = field(default_factory=dict)
    """Counters of the first PONG of this incarnation, asked for before anything else."""

    def anew(self, state: State, note: str) -> Loader:
        """The same address with another connection, or none: what was known of the last one counts no longer."""
        last_name = self.name or self.last_name
        return Loader(self.address, state, note, last_name=last_name, heard_at=self.heard_at)

    def silence_s(self, options: CoreOptions) -> float:
        """How long a PING may go unanswered before the loader counts as silent."""
        if not self.owing:
            return options.silence_s
        return min(max(options.probe_s, min(4 * self.pong_s, 2 * options.probe_s)), options.silence_s)
