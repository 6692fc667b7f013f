"""`loader`: how a loader uses its host."""

from __future__ import annotations

from dataclasses import dataclass, field

from stoker_proto.config.rules import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderConfig:
    """How a loader uses its host. Nothing here changes what is in a batch."""

    cores: int = field(default=0, metadata=at_least(0))
    """Cores to use; 0: all that the process may use. `deploy/launch.py` divides a node's cores among its loaders."""
    workers: int = field(default=0, metadata=at_least(0))
    """Processes that build pieces; 0: one per four cores. With 1, the pieces are built by threads of the loader's own process."""
    threads: int = field(default=0, metadata=at_least(0))
    """Threads per worker; decoding releases the interpreter lock. 0: the cores divided by the workers."""
    cache_mb: int = field(default=1024, metadata=at_least(1))
    """Memory for encoded frames over all workers, in MiB."""
    unread_mb: int = field(default=1024, metadata=at_least(1))
    """Memory for answers that ranks have not read yet, over all ranks, in MiB. One rank may use a quarter of it."""
    read_ahead: bool = True
    """Decode a lane's next records before a rank asks for them."""
