"""Connections that the front's socket has accepted, held below the limit of descriptors.

    accepted -> a stranger -> HELLO agrees -> admitted -> disconnected

Each connection uses a descriptor, and ZeroMQ accepts connections until none is left; then no file can be opened. So connections
may use half of the descriptors (a quarter where `relay` passes them on: it needs two for each). Beyond that the oldest stranger
is closed, never an admitted rank. (ZMQ_MAX_SOCKETS counts sockets, of which a ROUTER is one, however many peers it has.)

ZeroMQ gives all connections equal turns, those of peers that are gone included, as long as something of them is unread. So peers
that flood, reset and come again would leave an honest rank one turn in thousands. A connection with many rejected messages is
silenced: nothing more of it arrives, and heartbeats end it. While many of these are still read, a share of new ones is let in.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import zmq

from loader_service.server.listening import silence

logger = logging.getLogger(__name__)

EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_ACCEPT_FAILED
_EVENT = struct.Struct("=Hi")  # number, value: of these events a descriptor, or an errno
_AT_ONCE = 1024
_WARN_EVERY_S = 30.0
_MOST_REJECTED = 256
"""Messages of one connection, one after the other; an honest rank of another version sends one or two."""
_MOST_COUNTED = 10_000
_MOST_FLOODING = 16
"""Silenced connections of which something is still read."""
_STILL_READ_S = 0.5
_SHARE_OF_A_LEVEL, _MOST_LEVEL = 0.5, 2
"""At least a quarter of new connections is let in: so an honest one gets in within seconds, too."""
_MOST_REJECTED_AT_ONCE = 1000
"""Messages of all connections between two calls of `let_in`."""
_FORGET_S = 60.0
"""After the last message: heartbeats have ended the connection long before."""


class Connections:
    """The connections of one ROUTER on TCP. Create it before the socket is bound; close it before the socket."""

    def __init__(self, router: zmq.Socket[bytes], most: int, more_events: int = 0) -> None:
        """most: connections at the same time; more_events: of the monitor, which `look` returns."""
        self.most = most
        self.num_closed = 0
        """Strangers that were closed to make room."""
        self._router = router
        self._strangers: OrderedDict[int, None] = OrderedDict()  # descriptors, the oldest first
        self._admitted: dict[int, bytes] = {}  # descriptor -> address
        self._descriptor_of: dict[bytes, int] = {}  # the same, the other way round
        self._others: list[tuple[int, int]] = []  # that `admit` came across
        self._rejected: dict[bytes, int] = {}  # address -> messages since the last good one
        self._silenced: dict[bytes, float] = {}  # address -> when a message of it was last read
        self._let_in: Callable[[float], None] | None = None
        self._level = self._rejected_since_look = 0
        self._next_warning = {"full": 0.0, "failed": 0.0, "flood": 0.0}
        self.monitor = router.get_monitor_socket(EVENTS | more_events)

    def __len__(self) -> int:
        return len(self._strangers) + len(self._admitted)

    @property
    def num_strangers(self) -> int:
        """Connections that have not said HELLO, or were refused."""
        return len(self._strangers)

    def look(self) -> list[tuple[int, int]]:
        """Process the events since the last call, and close strangers if there are too many connections.

        Returns (event, value) of `more_events`. Never blocks."""
        others, self._others = self._others, []
        for event, value in self._events():
            if event == zmq.EVENT_ACCEPTED:
                self._gone(value)
                self._strangers[value] = None
            elif event == zmq.EVENT_DISCONNECTED:
                self._gone(value)
            elif event == zmq.EVENT_ACCEPT_FAILED:
                name = errno.errorcode.get(value, value)
                self._warn("failed", f"a connection could not be accepted ({name}): {len(self)} are open")
            else:
                others.append((event, value))
        while len(self) > self.most and self._strangers:
            self._close(self._strangers.popitem(last=False)[0])
        return others

    def admit(self, address: bytes, descriptor: int) -> None:
        """Note that the rank at this address was welcomed. descriptor: of its connection (`descriptor_of`)."""
        self._others += self.look()  # the connection's own ACCEPTED comes before its first message
        if descriptor in self._strangers:
            del self._strangers[descriptor]
            self._admitted[descriptor] = address
            self._descriptor_of[address] = descriptor

    def forget(self, address: bytes) -> None:
        """Note that the address is no rank any more. Its connection, if it is open, counts as a stranger."""
        descriptor = self._descriptor_of.pop(address, None)
        if descriptor is not None:
            self._admitted.pop(descriptor, None)
            self._strangers[descriptor] = None

    def let_in_by(self, let_in: Callable[[float], None]) -> None:
        """Silence connections that flood: only where the kernel lets this process filter packets. let_in(share): of new ones."""
        self._let_in = let_in

    def is_silenced(self, address: bytes) -> bool:
        """Whether what this peer still had under way is not to be looked at."""
        if address not in self._silenced:
            return False
        self._rejected_since_look += 1
        self._silenced[address] = time.monotonic()
        return True

    def accepted(self, address: bytes) -> None:
        """Note that a message of this peer was a good one."""
        if self._rejected:
            self._rejected.pop(address, None)

    def rejected(self, address: bytes, descriptor: int) -> None:
        """Note that a message of this connection was rejected."""
        self._rejected_since_look += 1
        if self._rejected_since_look == _MOST_REJECTED_AT_ONCE:
            self._set_level(_MOST_LEVEL)
        if len(self._rejected) > _MOST_COUNTED:
            self._rejected.clear()
        count = self._rejected[address] = self._rejected.get(address, 0) + 1
        if self._let_in is None or count < _MOST_REJECTED:
            return
        self._others += self.look()
        if descriptor not in self._strangers and descriptor not in self._admitted:  # it is gone
            return
        self._warn(
            "flood",
            f"a peer sent {count} messages that were rejected: nothing more is taken from it; let only ranks reach this port, or "
            "use keys (cluster.security)",
        )
        self._at(descriptor, silence)
        self._silenced[address] = time.monotonic()

    def let_in(self) -> None:
        """Let more or fewer new connections in, by how many silenced ones are still read. Called a few times a second."""
        before = time.monotonic() - _STILL_READ_S
        for address in [address for address, last in self._silenced.items() if last < before - _FORGET_S]:
            del self._silenced[address]
        num_read = sum(last > before for last in self._silenced.values())
        is_flood = num_read >= _MOST_FLOODING or self._rejected_since_look > _MOST_REJECTED_AT_ONCE
        self._rejected_since_look = 0
        self._set_level(min(self._level + 1, _MOST_LEVEL) if is_flood else max(self._level - 1, 0))

    def _set_level(self, level: int) -> None:
        if level != self._level and self._let_in is not None:
            self._level = level
            self._let_in(_SHARE_OF_A_LEVEL**level)

    def close(self) -> None:
        """Stop watching."""
        self._router.disable_monitor()
        self.monitor.close(0)

    def _events(self) -> Iterator[tuple[int, int]]:
        for _ in range(_AT_ONCE):
            try:
                frames = self.monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            number, value = _EVENT.unpack_from(frames[0])
            yield number, value

    def _gone(self, descriptor: int) -> None:
        self._strangers.pop(descriptor, None)
        address = self._admitted.pop(descriptor, None)
        if address is not None:
            self._descriptor_of.pop(address, None)

    def _close(self, descriptor: int) -> None:
        """Shut the connection down, so that ZeroMQ closes it. Another file that has the descriptor by now is not touched."""
        self.num_closed += 1
        self._warn(
            "full",
            f"{self.most} connections are open, which is the share of the descriptors that ranks may have: the oldest that said "
            f"no HELLO is closed ({self.num_closed} so far); for more ranks raise the hard limit of descriptors (ulimit -Hn)",
        )
        self._at(descriptor, lambda connection: connection.shutdown(socket.SHUT_RDWR))

    def _at(self, descriptor: int, act: Callable[[socket.socket], object]) -> None:
        try:
            connection = socket.socket(fileno=descriptor)
        except OSError:  # closed, or no socket
            return
        try:
            if self._is_ours(connection):
                act(connection)
        except OSError:  # it hung up this moment
            logger.debug("connection %d ended by itself", descriptor)
        finally:
            connection.detach()

    def _is_ours(self, connection: socket.socket) -> bool:
        """Whether it was accepted at the router's endpoint."""
        found = self._router.getsockopt(zmq.LAST_ENDPOINT)
        kind, _, place = (found.decode() if isinstance(found, bytes) else str(found)).rstrip("\0").partition("://")
        if connection.family == socket.AF_UNIX:
            return kind == "ipc" and connection.getsockname() == place
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        return kind == "tcp" and connection.getsockname()[1] == int(place.rpartition(":")[2])

    def _warn(self, kind: str, message: str) -> None:
        if time.monotonic() > self._next_warning[kind]:
            self._next_warning[kind] = time.monotonic() + _WARN_EVERY_S
            logger.warning("%s", message)


def descriptor_of(frame: zmq.Frame) -> int:
    """Descriptor of the connection that a received frame came from; -1 if ZeroMQ does not know it."""
    try:
        return int(frame.get(zmq.SRCFD))
    except (zmq.ZMQError, ValueError):
        return -1
