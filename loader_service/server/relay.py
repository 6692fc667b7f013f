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
import selectors
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

_CHUNK_BYTES = 256 << 10
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
    is_open: bool = True
    """Whether more can be read."""
    pending: memoryview = field(default_factory=lambda: memoryview(b""))
    """Read here, not yet written to the other end."""
    mask: int = 0
    """What the selector watches."""


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
        self._selector = selectors.DefaultSelector()
        self._links: set[_Link] = set()
        self._closed = False
        self._close_at = float("inf")
        self._listen_at: float | None = None
        """When to accept again after descriptors were short."""
        self._next_warning = 0.0
        self._wake_read, self._wake_write = socket.socketpair()
        for one in (listener, self._wake_read):
            one.setblocking(False)
            self._selector.register(one, selectors.EVENT_READ)

    def close(self, linger_s: float = 2.0) -> None:
        """Have `run` accept no more, and return once all has passed, at the latest after `linger_s`. For signal handlers too."""
        self._close_at = time.monotonic() + linger_s
        self._closed = True
        with contextlib.suppress(OSError):  # it has ended in this moment
            self._wake_write.send(b"1")

    def run(self) -> None:
        """Pass bytes on until `close` is called."""
        while self._listener.fileno() >= 0 or (self._links and time.monotonic() < self._close_at):
            for key, events in self._selector.select(_LOOK_S):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._wake_read:
                    self._wake_read.recv(16)
                else:
                    link, side = key.data
                    if link in self._links:
                        self._pass(link, side, events)
            now = time.monotonic()
            self._listen_again(now)
            for link in [link for link in self._links if link.close_at is not None and now > link.close_at]:
                self._end(link)
        for link in list(self._links):
            self._end(link)
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def _accept(self) -> None:
        try:
            outer, _ = self._listener.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError | ConnectionError):
                self._warn("a connection could not be accepted", error)
                self._selector.unregister(self._listener)  # it stays in the queue
                self._listen_at = time.monotonic() + _LOOK_S
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
        link = _Link(_Side(outer), _Side(inner))
        self._links.add(link)
        self._watch(link)

    def _connect(self) -> socket.socket:
        """A connection to ZeroMQ. Raises OSError."""
        inner = socket.socket(socket.AF_UNIX)
        try:
            inner.setblocking(False)
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

    def _listen_again(self, now: float) -> None:
        """Accept after a pause; no more once it is closed."""
        if self._closed:
            if self._listener.fileno() >= 0:
                if self._listen_at is None:
                    self._selector.unregister(self._listener)
                self._listener.close()
        elif self._listen_at is not None and now >= self._listen_at:
            self._listen_at = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _pass(self, link: _Link, side: _Side, events: int) -> None:
        """Something can be read from this side, or written to it."""
        other = link.inner if side is link.outer else link.outer
        if events & selectors.EVENT_WRITE:
            self._write(link, other)
        if events & selectors.EVENT_READ and side.is_open and not side.pending:
            try:
                data = side.socket.recv(_CHUNK_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # a reset, or a time-out of TCP
                data = b""
            if data:
                side.pending = memoryview(data)
                self._write(link, side)
            else:
                side.is_open = False
        if link in self._links:
            self._watch(link)

    def _write(self, link: _Link, side: _Side) -> None:
        """Write what was read from this side to the other one, as much as it takes."""
        other = link.inner if side is link.outer else link.outer
        try:
            while side.pending:
                side.pending = side.pending[other.socket.send(side.pending) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the other side is gone: what is for it is dropped
            side.pending = memoryview(b"")
            other.is_open = False

    def _watch(self, link: _Link) -> None:
        """Ends that were read to their end are passed on; then the selector watches what can go on."""
        outer, inner = link.outer, link.inner
        if not outer.is_open and not outer.pending:
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
            mask = selectors.EVENT_READ if side.is_open and not side.pending else 0
            if other.pending and side.is_open:
                mask |= selectors.EVENT_WRITE
            if mask != side.mask:
                self._set_mask(link, side, mask)

    def _set_mask(self, link: _Link, side: _Side, mask: int) -> None:
        if not side.mask:
            self._selector.register(side.socket, mask, (link, side))
        elif not mask:
            self._selector.unregister(side.socket)
        else:
            self._selector.modify(side.socket, mask, (link, side))
        side.mask = mask

    def _end(self, link: _Link) -> None:
        self._links.discard(link)
        for side in (link.outer, link.inner):
            if side.mask:
                self._selector.unregister(side.socket)
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
