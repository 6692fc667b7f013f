"""Between ranks and ZeroMQ where the kernel does not let this process drop resets: ZeroMQ sees an orderly end instead.

    rank <--TCP--> relay <--Unix socket in the run directory--> ROUTER

A connection that is reset ends here. Its Unix socket gets an orderly end, which libzmq bears in every state; what ZeroMQ still
writes there is dropped. Bytes pass unread, so keys and authentication work as without it. It holds one buffer per direction and
reads no more until that is written: TCP's back pressure reaches the other side.

It is a process of its own (`RelayProcess`), so that it never waits for the interpreter lock of a busy loader.
Command line: `python -m loader_service.server.relay LISTENER PATH PARENT`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from stoker_proto.errors import StokerError
from stoker_proto.host.descriptors import raise_descriptor_limit
from stoker_proto.host.process import end_with_parent

logger = logging.getLogger(__name__)

_TO_RANK_BYTES = 256 << 10
"""Read at once from ZeroMQ: answers are large."""
_TO_LOADER_BYTES = 4 << 10
"""Read at once from a rank, and the buffer of the Unix socket: ranks' messages are small. Bytes in the socket of a rank that has
gone are still delivered, so a peer that floods and resets its connection again and again must find little room."""
_MOST_LEAVING = 16
"""Connections whose rank is gone and whose last bytes ZeroMQ still reads. Beyond this number no new connection is accepted: peers
that flood, reset and reconnect would fill the loader with messages of dead connections."""
_LOOK_S = 1.0
_WARN_EVERY_S = 30.0
_LINGER_S = 10.0
"""How long a rank may take for the last bytes of a connection that ZeroMQ has ended."""
_STOP_DEADLINE_S = 5.0
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


@dataclass(eq=False)
class _Side:
    """One end of a connection: read from here, written to the other end."""

    socket: socket.socket
    most: int
    """Bytes to read at once."""
    is_open: bool = True
    """Whether more can be read."""
    pending: memoryview = field(default_factory=lambda: memoryview(b""))
    """Read here, not yet written to the other end."""
    mask: int | None = None
    """What epoll watches, besides errors. None: nothing, not even these."""


@dataclass(eq=False)
class _Link:
    """One rank's connection."""

    outer: _Side
    inner: _Side
    close_at: float | None = None
    """ZeroMQ has ended it: the latest moment for the rank to take the last bytes."""


class Relay:
    """Accepts on `listener` and connects each connection to the Unix socket `path`. Owns the listener."""

    def __init__(self, listener: socket.socket, path: Path) -> None:
        self._listener, self._path = listener, str(path)
        self._epoll = select.epoll()
        self._ends: dict[int, tuple[_Link, _Side]] = {}  # descriptor -> what it is
        self._links: set[_Link] = set()
        self._leaving: set[_Link] = set()
        """Links of ranks that have gone, whose last bytes ZeroMQ has not read yet."""
        self._closed = False
        self._close_at = float("inf")
        self._accepts = False
        self._accept_at = 0.0
        """When to accept again after descriptors were short."""
        self._next_warning = 0.0
        self._wake_read, self._wake_write = socket.socketpair()
        for one in (listener, self._wake_read):
            one.setblocking(False)
        self._epoll.register(self._wake_read, select.EPOLLIN)

    def close(self, linger_s: float = 2.0) -> None:
        """Have `run` accept no more, and return once all has passed, at the latest after `linger_s`. For signal handlers too."""
        self._close_at = time.monotonic() + linger_s
        self._closed = True
        with contextlib.suppress(OSError):  # it has ended in this moment
            self._wake_write.send(b"1")

    def run(self) -> None:
        """Pass bytes on until `close` is called."""
        self._watch_listener()
        while self._listener.fileno() >= 0 or (self._links and time.monotonic() < self._close_at):
            calls = False
            for number, events in self._epoll.poll(_LOOK_S):
                if number == self._wake_read.fileno():
                    self._wake_read.recv(16)
                elif number in self._ends:
                    self._pass(*self._ends[number], events)
                else:
                    calls = calls or number == self._listener.fileno()
            self._watch_listener()
            # Last: a new connection must not get events of an ended one that had its descriptor.
            if calls and self._accepts:
                self._accept()
            now = time.monotonic()
            for link in [link for link in self._links if link.close_at is not None and now > link.close_at]:
                self._end(link)
        for link in list(self._links):
            self._end(link)
        self._epoll.close()
        self._wake_read.close()
        self._wake_write.close()

    def _watch_listener(self) -> None:
        """Accept where there is room for one more; no more once it is closed."""
        if self._listener.fileno() < 0:
            return
        wanted = not self._closed and time.monotonic() >= self._accept_at and len(self._leaving) < _MOST_LEAVING
        if wanted != self._accepts:
            self._accepts = wanted
            if wanted:
                self._epoll.register(self._listener, select.EPOLLIN)
            else:
                self._epoll.unregister(self._listener)
        if self._closed:
            self._listener.close()

    def _accept(self) -> None:
        try:
            outer, _ = self._listener.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError | ConnectionError):
                self._warn("a connection could not be accepted", error)
                self._accept_at = time.monotonic() + _LOOK_S  # it stays in the queue
            return
        try:
            inner = self._connect()
        except OSError as error:  # no descriptor is left, or ZeroMQ's queue is full: the rank comes again
            self._warn("a connection could not be passed on", error)
            outer.close()
            return
        for option in _KEEPALIVE:
            with contextlib.suppress(OSError):  # the rank hung up in this moment: reading tells
                outer.setsockopt(*option)
        outer.setblocking(False)
        link = _Link(_Side(outer, _TO_LOADER_BYTES), _Side(inner, _TO_RANK_BYTES))
        self._links.add(link)
        for side in (link.outer, link.inner):
            self._ends[side.socket.fileno()] = link, side
        self._watch(link)

    def _connect(self) -> socket.socket:
        """A connection to ZeroMQ. Raises OSError."""
        inner = socket.socket(socket.AF_UNIX)
        try:
            inner.setblocking(False)
            inner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _TO_LOADER_BYTES)
            inner.connect(self._path)
        except OSError:
            inner.close()
            raise
        return inner

    def _warn(self, what: str, error: OSError) -> None:
        """Log it, but at most every 30 s: peers can bring it about as often as they like."""
        if time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + _WARN_EVERY_S
            logger.warning("%s: %s; %d are open", what, error, len(self._links))

    def _pass(self, link: _Link, side: _Side, events: int) -> None:
        """Something can be read from this side, or written to it, or the rank is gone."""
        other = link.inner if side is link.outer else link.outer
        if side is link.outer and events & (select.EPOLLERR | select.EPOLLHUP):  # a reset, or a time-out of TCP
            side.is_open, side.pending = False, memoryview(b"")
        if events & select.EPOLLOUT:
            self._write(other, side)
        if side.is_open and not side.pending and events & ~select.EPOLLOUT:
            self._read(side, other)
        self._watch(link)

    def _read(self, side: _Side, other: _Side) -> None:
        try:
            data = side.socket.recv(side.most)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # reset in this moment
            data = b""
        if data:
            side.pending = memoryview(data)
            self._write(side, other)
        else:
            side.is_open = False

    def _write(self, side: _Side, other: _Side) -> None:
        """Write what was read from `side` to the other one, as much as it takes."""
        try:
            while side.pending:
                side.pending = side.pending[other.socket.send(side.pending) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the other side is gone: what is for it is dropped
            side.pending = memoryview(b"")
            other.is_open = False

    def _watch(self, link: _Link) -> None:
        """Ends that were read to their end are passed on; then epoll watches what can go on."""
        outer, inner = link.outer, link.inner
        if not outer.is_open and not outer.pending and link not in self._leaving:
            self._leaving.add(link)
            with contextlib.suppress(OSError):  # it has ended too
                inner.socket.shutdown(socket.SHUT_WR)
        if not inner.is_open:
            if not inner.pending:
                self._end(link)
                return
            link.close_at = link.close_at or time.monotonic() + _LINGER_S
        if not outer.is_open:
            inner.pending = memoryview(b"")  # nobody reads it
        for side, other in ((outer, inner), (inner, outer)):
            mask = select.EPOLLIN if side.is_open and not side.pending else 0
            if other.pending and side.is_open:
                mask |= select.EPOLLOUT
            # Of the rank's end errors are watched even where nothing can be read. ZeroMQ's end must be read first.
            self._set_mask(side, mask if mask or (side is outer and side.is_open) else None)

    def _set_mask(self, side: _Side, mask: int | None) -> None:
        if mask == side.mask:
            return
        if mask is None:
            self._epoll.unregister(side.socket)
        elif side.mask is None:
            self._epoll.register(side.socket, mask)
        else:
            self._epoll.modify(side.socket, mask)
        side.mask = mask

    def _end(self, link: _Link) -> None:
        self._links.discard(link)
        self._leaving.discard(link)
        for side in (link.outer, link.inner):
            self._set_mask(side, None)
            del self._ends[side.socket.fileno()]
            side.socket.close()


class RelayProcess:
    """A relay that runs until `stop`, or until this process ends. Start it from the main thread."""

    def __init__(self, listener: socket.socket, path: Path) -> None:
        """listener: is closed here and lives on there."""
        number = listener.fileno()
        command = [sys.executable, "-m", "loader_service.server.relay", str(number), str(path), str(os.getpid())]
        with listener:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[number])

    def check(self) -> None:
        """Raises StokerError if it has ended."""
        if (code := self._process.poll()) is not None:
            raise StokerError(
                f"the relay between ranks and this loader ended with exit code {code}; see above, and start the loader again"
            )

    def stop(self) -> None:
        """Accept no more; what is on its way passes. Returns when the process has ended."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Entry of the relay's process."""
    number, path, parent = sys.argv[1:]
    if not end_with_parent(int(parent)):
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the loader decides when this ends
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s relay %(levelname)s %(message)s")
    raise_descriptor_limit()
    relay = Relay(socket.socket(fileno=int(number)), Path(path))
    signal.signal(signal.SIGTERM, lambda *_: relay.close())
    relay.run()


if __name__ == "__main__":
    main()
