"""A peer that speaks ZMTP 3.0 by hand over a plain socket, so that it can do what no ZeroMQ library does: never read, lie, stop.

greeting (64 bytes) both ways, READY both ways, then frames: flags, size, body
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from types import TracebackType
from typing import Self

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
_COMMAND, _LONG = 4, 2


def frame(body: bytes, flags: int = 0) -> bytes:
    """One ZMTP frame."""
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | _LONG]) + struct.pack(">Q", len(body)) + body


def command(name: bytes, body: bytes) -> bytes:
    """One ZMTP command."""
    return frame(bytes([len(name)]) + name + body, _COMMAND)


READY = command(b"READY", b"\x0bSocket-Type" + struct.pack(">L", 6) + b"DEALER")
PING = command(b"PING", struct.pack(">H", 0))
"""Keeps a connection alive from our side, whether or not we read."""
PING_TO_LIVE = command(b"PING", struct.pack(">H", 30))
"""The same with a time to live of 3 s, as ranks send it (10 s): silence of that length ends the connection."""


class RawPeer:
    """A DEALER as far as the other side can tell. After the handshake it reads nothing unless told.

    Loaders do not see resets. So a connection from a port whose last connection was reset is not made while the loader keeps
    that one; ranks try again from another port after 3 s (`ZMQ_CONNECT_TIMEOUT`), and so does this.
    """

    def __init__(self, address: str, *, receive_buffer: int = 4096) -> None:
        host, port = address.removeprefix("tcp://").split(":")
        deadline = time.monotonic() + 20
        while True:
            self.socket = socket.socket()
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.settimeout(3)
            try:
                self.socket.connect((host, int(port)))
                self.socket.settimeout(10)
                return
            except TimeoutError:  # as a rank does: another try, from another port
                self.socket.close()
                if time.monotonic() > deadline:
                    raise
            except OSError:
                self.socket.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """As a rank: with its last heartbeat's time to live, as a loader does not see a reset."""
        with contextlib.suppress(OSError):  # what it sent before may stand still
            self.socket.settimeout(0.2)
            self.socket.sendall(PING_TO_LIVE)
        self.socket.close()

    def shake_hands(self) -> None:
        """Greeting and READY, both ways."""
        self.socket.sendall(GREETING + READY)
        self._read(64)
        flags, size = self._read(2)
        assert flags == _COMMAND
        assert self._read(size).startswith(b"\x05READY")

    def send(self, *messages: bytes) -> None:
        """Messages of one frame each."""
        self.socket.sendall(b"".join(map(frame, messages)))

    def vanish(self) -> None:
        """End without a word: a reset, not an orderly close."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            more = self.socket.recv(size - len(found))
            assert more, "the loader hung up in the handshake"
            found += more
        return found


def garbage(chance: random.Random) -> bytes:
    """What a port may be sent that is no honest handshake, and sometimes an honest one with nonsense after it."""
    noise = chance.randbytes(chance.randrange(2000))
    claims = struct.pack(">Q", chance.choice([0, 1, 2**31, 2**62, 2**64 - 1]))
    return chance.choice(
        [
            noise,
            GREETING[: chance.randrange(65)] + noise,
            GREETING + noise,
            GREETING + READY[: chance.randrange(len(READY))] + noise,
            GREETING + READY + noise,
            GREETING + READY + b"\x02" + claims + noise,
            GREETING + READY + b"\x03" + claims + noise,
            GREETING + READY + b"\x06" + claims + noise,
            GREETING + READY + frame(noise, 1) * 5,
            GREETING.replace(b"NULL", b"PLAI") + noise,
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise,
        ]
    )
