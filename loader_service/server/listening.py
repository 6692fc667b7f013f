"""The loader's listening socket: bound to what was checked, and deaf to resets.

libzmq aborts its process if a connection is reset while libzmq has paused reading from it (at the ROUTER's high-water mark), and
libzmq then sends a heartbeat or answers a PING on it (zeromq/libzmq#4767). Any peer could bring that about. So the kernel drops
TCP segments that reset a loader's connections: a peer that resets looks like one that fell silent. Heartbeats end such
connections by a timer, which libzmq bears in every state.

Newer kernels let only a process with CAP_NET_ADMIN filter a TCP socket. Without it `relay` keeps resets away from ZeroMQ.
"""

from __future__ import annotations

import ctypes
import ipaddress
import re
import socket
import struct
from collections.abc import Sequence

from stoker_proto.errors import ConfigError, StokerError
from stoker_proto.host.names import look_up_host
from stoker_proto.wire.peer_text import plain

_ADDRESS = re.compile(r"tcp://(\*|[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):(\*|[0-9]{1,5})")
_BACKLOG = 100
_SO_ATTACH_FILTER = 26  # Linux; Python has no name for it
_DROP, _KEEP = (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)
_LOAD_FLAGS = (0x30, 0, 0, 13)  # the byte of the TCP header that holds the flags
_DROP_RESETS = (_LOAD_FLAGS, (0x45, 0, 1, 4), _DROP, _KEEP)  # is RST among them?
"""Classic BPF: code, jump if true, jump if false, operand. Connections inherit it from the listening socket."""
_DROP_ALL = (_DROP,)
_RECEIVE_BYTES = 8 << 10
"""Receive buffer of each connection: ranks' messages are small. Bytes that a peer sent before it vanished are still read, so
there must be little room."""


def parse_bind(address: str) -> tuple[str, int]:
    """Host ("" for any) and port (0 for any) of exactly one tcp://HOST:PORT. Raises ConfigError for anything else."""
    match = _ADDRESS.fullmatch(address)
    if match is None or (match[2] != "*" and int(match[2]) > 65_535):
        raise ConfigError(
            f"--bind {plain(address)}: write one tcp://HOST:PORT, e.g. tcp://127.0.0.1:5555; HOST is a name, an IPv4 address, an "
            "IPv6 address in brackets, or * for all interfaces; PORT is a number up to 65535, or * for a free one"
        )
    host = "" if match[1] == "*" else match[1].strip("[]")
    return host, 0 if match[2] == "*" else int(match[2])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. A name is not, but `localhost`: what it resolves to may change."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def can_drop_resets() -> bool:
    """Whether the kernel lets this process drop resets."""
    with socket.socket() as tried:
        try:
            _drop_resets(tried)
        except PermissionError:
            return False
    return True


def listen(address: str) -> socket.socket:
    """A listening socket at tcp://HOST:PORT. Raises ConfigError for another form, StokerError where it cannot be bound."""
    host, port = parse_bind(address)
    try:
        family, kind, _, _, place = look_up_host(
            "127.0.0.1" if host == "localhost" else host or "0.0.0.0",
            port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise StokerError(f"--bind {address}: {error}; name an interface of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        if can_drop_resets():
            _drop_resets(listener)
        listener.bind(place)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise StokerError(
            f"--bind {address}: {error.strerror}; choose a free port, or tcp://127.0.0.1:* for any"
        ) from error
    return listener


def bound_address(listener: socket.socket) -> str:
    """tcp://HOST:PORT of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def let_in(listener: socket.socket, share: float) -> None:
    """Let this share of the attempts to connect in, by chance. TCP tries again after 1, 3, 7 s, for honest peers and others: so
    all of them wait alike, and nobody comes again at once."""
    dropping = (
        _LOAD_FLAGS,
        (0x45, 4, 0, 4),  # RST: to the last line
        (0x45, 0, 2, 2),  # SYN, else keep it
        (0x20, 0, 0, 0xFFFFF038),  # a random number
        (0x25, 1, 0, int(share * 0xFFFFFFFF)),  # above it: to the last line
        _KEEP,
        _DROP,
    )
    _attach(listener, _DROP_RESETS if share >= 1 else dropping)


def silence(connection: socket.socket) -> None:
    """Drop all that the peer sends from now on. Heartbeats end the connection then, which libzmq bears in every state."""
    _attach(connection, _DROP_ALL)


def _drop_resets(listener: socket.socket) -> None:
    _attach(listener, _DROP_RESETS)


def _attach(to: socket.socket, instructions: Sequence[tuple[int, int, int, int]]) -> None:
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    content = ctypes.create_string_buffer(program, len(program))
    to.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(instructions), ctypes.addressof(content)))
