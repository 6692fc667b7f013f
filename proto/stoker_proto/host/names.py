"""Looks up the addresses of a host's name."""

from __future__ import annotations

import socket
from typing import Any


def look_up_host(name: str, port: int | None, **hints: Any) -> list[tuple[Any, ...]]:
    """As `socket.getaddrinfo`, which raises UnicodeError for a name that cannot be one (`a..b`, a label of 64 letters).

    Here that is an OSError too, as for a name that nobody knows."""
    try:
        return list(socket.getaddrinfo(name, port, **hints))
    except UnicodeError as error:
        reason = error.__cause__ or error  # without the name of the codec
        raise socket.gaierror(socket.EAI_NONAME, f"{name!r} is no name of a host: {reason}") from error
