"""A loader that makes nothing: it answers tickets with pieces that a real loader made before.

    rank  --HELLO, EPOCH, PING-->  null loader  -->  real loader
    rank  --TICKET of n rows---->  null loader       its stored pieces of n rows, in turns; the first ones are the real loader's

What a rank can pull from it is the ceiling of client and wire. With `rows_per_s` it is a loader of known speed. Its rows are not
those of the tickets, so nothing may be trained with it.

    python -m trainer.bench.null_loader tcp://127.0.0.1:5555    # prints its address; ends with its standard input
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgpack
import zmq

from stoker_proto.errors import RemoteProtocolError
from stoker_proto.wire.encoding import MAX_FRAME_BYTES, decode_question
from stoker_proto.wire.messages import Ticket

_KEPT = 8
"""Stored pieces of each number of rows."""
_KEPT_BYTES = 256 << 20
"""Of all stored pieces; tickets that none of them fits go to the real loader."""
_POLL_MS = 100
Parts = tuple[bytes, bytes]
"""A PIECE frame before and behind the number of its ticket."""


def split_piece(frame: bytes) -> Parts:
    """A PIECE frame without the number of its ticket, which is its first field."""
    unpacker = msgpack.Unpacker(max_buffer_size=MAX_FRAME_BYTES)
    unpacker.feed(frame[1:])
    unpacker.read_map_header()
    if unpacker.unpack() != "ticket":
        raise RemoteProtocolError("the first field of a PIECE is not its ticket")
    before = 1 + unpacker.tell()
    unpacker.skip()
    return frame[:before], frame[1 + unpacker.tell() :]


@dataclass(slots=True)
class Pieces:
    """Stored pieces by their number of rows."""

    size_bytes: int = 0
    by_rows: dict[int, deque[Parts]] = field(default_factory=dict)

    def keep(self, num_rows: int, frame: bytes) -> None:
        """Store a PIECE frame, if there is room."""
        kept = self.by_rows.setdefault(num_rows, deque())
        if len(kept) < _KEPT and self.size_bytes + len(frame) <= _KEPT_BYTES:
            kept.append(split_piece(frame))
            self.size_bytes += len(frame)

    def answer(self, ticket: Ticket) -> bytes | None:
        """A frame with the ticket's number; None while too few of its number of rows are stored."""
        kept = self.by_rows.get(ticket.num_rows)
        if not kept or (len(kept) < _KEPT and self.size_bytes < _KEPT_BYTES // 2):
            return None
        before, behind = kept[0]
        kept.rotate(-1)
        return before + bytes(msgpack.packb(ticket.ticket)) + behind


class NullLoader:
    """Context manager; it works in a thread of its own. Read `address` inside the block."""

    def __init__(self, upstream: str, *, rows_per_s: float = 0.0) -> None:
        """upstream: address of a real loader without keys. rows_per_s: its speed; 0: as fast as it can."""
        self._upstream, self._rows_per_s = upstream, rows_per_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.setsockopt(zmq.SNDHWM, 0)  # a rank's open tickets bound what waits
        self._front.setsockopt(zmq.LINGER, 0)
        self._front.bind("tcp://127.0.0.1:*")
        self.address: str = self._front.getsockopt_string(zmq.LAST_ENDPOINT)
        self._poller = zmq.Poller()
        self._poller.register(self._front, zmq.POLLIN)
        self._behind: dict[bytes, zmq.Socket[bytes]] = {}  # rank -> its connection to the real loader
        self._asked: dict[tuple[bytes, int], int] = {}  # tickets that the real loader has -> their rows
        self._pieces = Pieces()
        self._free_at = 0.0
        self._due: deque[tuple[float, bytes, bytes]] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for socket in (self._front, *self._behind.values()):
            socket.close(0)
        self._context.term()

    def _run(self) -> None:
        while not self._stop.is_set():
            wait_s = self._due[0][0] - time.monotonic() if self._due else _POLL_MS / 1000
            ready = dict(self._poller.poll(max(0, min(_POLL_MS, round(1000 * wait_s)))))
            if self._front in ready:
                self._from_rank()
            for rank, socket in list(self._behind.items()):
                if socket in ready:
                    self._from_loader(rank, socket.recv())
            while self._due and self._due[0][0] <= time.monotonic():
                _, rank, frame = self._due.popleft()
                self._front.send_multipart([rank, frame])

    def _from_rank(self) -> None:
        rank, frame = self._front.recv_multipart()
        ticket = decode_question(frame) if frame[:1] == b"T" else None
        if isinstance(ticket, Ticket):
            answer = self._pieces.answer(ticket)
            if answer is not None:
                self._send_in_time(rank, answer, ticket.num_rows)
                return
            self._asked[rank, ticket.ticket] = ticket.num_rows
        if rank not in self._behind:
            self._behind[rank] = socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            socket.connect(self._upstream)
            self._poller.register(socket, zmq.POLLIN)
        self._behind[rank].send(frame)

    def _from_loader(self, rank: bytes, frame: bytes) -> None:
        if frame[:1] != b"P":
            self._front.send_multipart([rank, frame])
            return
        before, behind = split_piece(frame)
        number = msgpack.unpackb(frame[len(before) : len(frame) - len(behind)])
        num_rows = self._asked.pop((rank, number), 0)
        self._pieces.keep(num_rows, frame)
        self._send_in_time(rank, frame, num_rows)

    def _send_in_time(self, rank: bytes, frame: bytes, num_rows: int) -> None:
        now = time.monotonic()
        if self._rows_per_s:
            self._free_at = max(now, self._free_at) + num_rows / self._rows_per_s
        self._due.append((max(now, self._free_at), rank, frame))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="null_loader", description=__doc__.partition("\n")[0])
    parser.add_argument("upstream", metavar="ADDR", help="a real loader without keys, e.g. tcp://127.0.0.1:5555")
    parser.add_argument("--rows-per-s", type=float, default=0.0, help="its speed; default: as fast as it can")
    arguments = parser.parse_args()
    with NullLoader(arguments.upstream, rows_per_s=arguments.rows_per_s) as loader:
        print(loader.address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
