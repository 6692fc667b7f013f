"""A free TCP port for a program that binds it a moment later."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

_LOWEST, _END = 10_000, 65_536
"""Where a port is looked for: above those of the usual services."""
_TRIES = 100
_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL = (32_768, 60_999)
"""Linux takes the ports of outgoing connections from here, unless the file above says otherwise."""


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody uses at this address ("": at any address) now. Raises OSError.

    It lies outside the range from which the kernel takes the ports of outgoing connections: such a port may be taken before the
    program binds it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    ports = outside_connections()
    for port in [*random.SystemRandom().sample(ports, min(_TRIES, len(ports))), 0]:  # 0: any that the kernel finds
        with socket.socket(family) as probe:
            try:
                probe.bind((address, port))
            except OSError as error:
                if port and error.errno in (errno.EADDRINUSE, errno.EACCES):
                    continue
                raise
            return int(probe.getsockname()[1])
    raise AssertionError("the last one is bound, or raises")


def outside_connections() -> list[int]:
    """The ports that are never those of outgoing connections."""
    low, high = _USUAL
    if _CONNECTIONS.exists():
        low, high = map(int, _CONNECTIONS.read_text().split())
    return [port for port in range(_LOWEST, _END) if not low <= port <= high]
