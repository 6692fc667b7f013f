"""Sends answers and counts their unread bytes, so that ranks that do not read cannot fill the loader's memory.

ZeroMQ's high-water mark counts messages, whatever their size, and it does not say what a connection has taken. But libzmq reports
when it no longer needs a message that it did not copy, and a connection sends in order. So one such message in every MiB (a
*mark*) shows that all earlier ones were taken too. Bytes up to the newest mark that are not known to be taken count as unread.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import zmq

_MORE, _AT_ONCE = int(zmq.SNDMORE | zmq.NOBLOCK), int(zmq.NOBLOCK)  # zmq makes an object of each `|`
_MARK_EVERY = 1 << 20
"""Bytes between two marks. A mark costs a turn of pyzmq's own thread, which would be felt on every frame."""

_SMALL = 4096
"""Bytes of a frame that is no piece, or nearly none: the high-water mark is enough for these, and a FAILURE should arrive."""


_MAX_ACCOUNTS = 32_768
"""Connections end without notice. Beyond this number, accounts are kept only of connections with unread bytes."""


@dataclass(slots=True)
class _Account:
    """One connection, in bytes."""

    unread: int = 0
    unmarked: int = 0
    """Sent after the newest mark: less than _MARK_EVERY."""
    marks: deque[tuple[int, zmq.MessageTracker]] = field(
        default_factory=deque
    )  # (bytes since the mark before it, mark)

    def settle(self) -> int:
        """Bytes that were taken since the last call."""
        before = self.unread
        while self.marks and self.marks[0][1].done:
            self.unread -= self.marks.popleft()[0]
        return before - self.unread


class Outbox:
    """The sending side of a ROUTER with ROUTER_MANDATORY."""

    def __init__(self, socket: zmq.Socket[bytes], limit_bytes: int) -> None:
        """limit_bytes: unread over all connections; one of them may have a quarter of it, or a single frame."""
        self._socket, self._limit = socket, limit_bytes
        self._accounts: OrderedDict[bytes, _Account] = OrderedDict()  # the one sent to last is the last
        self._unread = 0
        self.bytes_sent = 0
        self.dropped = 0
        """Frames that were not sent because one rank, or all together, had too many unread bytes."""

    def unread_bytes(self) -> int:
        """Of all connections, up to the newest mark of each."""
        self._unread -= sum(account.settle() for account in self._accounts.values())
        return self._unread

    def send(self, address: bytes, frame: zmq.Frame | bytes) -> bool:
        """Send the frame, or drop and count it. Returns False if the connection is gone."""
        account = self._account(address)
        size = len(frame)
        if size > _SMALL and not self._has_room(account, size):
            self.dropped += 1
            return True
        mark = None
        try:
            self._socket.send(address, _MORE)
            if account.unmarked + size >= _MARK_EVERY:
                mark = self._send_marked(frame)
            else:  # a received frame is passed on as it is; bytes are copied, see `worker.py`
                self._socket.send(frame, _AT_ONCE, copy=isinstance(frame, bytes))
        except zmq.Again:  # the high-water mark
            self.dropped += 1
            return True
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._forget(address)
            return False
        self.bytes_sent += size
        account.unmarked += size
        if mark is not None:
            account.marks.append((account.unmarked, mark))
            account.unread += account.unmarked
            self._unread += account.unmarked
            account.unmarked = 0
        return True

    def _account(self, address: bytes) -> _Account:
        account = self._accounts.get(address)
        if account is None:
            if len(self._accounts) >= _MAX_ACCOUNTS:
                self._close_one()
            account = self._accounts[address] = _Account()
        self._accounts.move_to_end(address)
        return account

    def _close_one(self) -> None:
        """Remove the account that was sent to longest ago among those that have read all; most of these connections are gone."""
        for address, account in self._accounts.items():
            self._unread -= account.settle()
            if not account.unread:
                del self._accounts[address]
                return

    def _forget(self, address: bytes) -> None:
        """Remove a connection that is gone, with its unread bytes."""
        self._unread -= self._accounts.pop(address).unread

    def _has_room(self, account: _Account, size: int) -> bool:
        self._unread -= account.settle()
        if self._unread + size > self._limit:
            self._unread -= sum(each.settle() for each in self._accounts.values())
        if self._unread and self._unread + size > self._limit:
            return False
        return not account.unread or account.unread + size <= self._limit // 4

    def _send_marked(self, frame: zmq.Frame | bytes) -> zmq.MessageTracker:
        content = frame if isinstance(frame, bytes) else frame.buffer
        message = zmq.Frame(content, track=True, copy=False, copy_threshold=0)
        self._socket.send(message, _AT_ONCE, copy=False)
        tracker: zmq.MessageTracker = message.tracker
        return tracker
