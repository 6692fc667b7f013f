"""`loader`: how a loader uses its host."""

from __future__ import annotations

from dataclasses import dataclass, field

from stoker_proto.config.rules import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """How a loader uses its host. Nothing here changes what is in a batch."""

    cores: int = field(default=0, metadata=at_least(0))
    """Cores to use; 0: all that the process may use, which `deploy/launch.py` shares among a node's loaders."""
    workers: int = field(default=0, metadata=at_least(0))
    """Processes that build pieces; 0: one per four cores. With one, its threads live in the loader's own process."""
    threads: int = field(default=0, metadata=at_least(0))
    """Threads in each of them; decoding releases the interpreter lock. 0: the cores, shared among the workers."""
    cache_mb: int = field(default=1024, metadata=at_least(1))
    """Encoded frames kept in memory over all workers, in MiB."""
    unread_mb: int = field(default=1024, metadata=at_least(1))
    """Answers that ranks asked for and do not read, over all ranks, in MiB; one rank may leave a quarter of it."""
    read_ahead: bool = True
    """Decode a lane's next records before they are asked for."""
