"""One worker process of a loader: receives tickets from the front over a private Unix socket, answers with frames.

    front -> worker: [client address, ticket frame]        worker -> front: [client address, frame, counters]

Command line: `python -m loader_service.pieces.worker RUN_DIR INDEX PARENT`. Its job is described in the run directory.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import msgpack
import zmq

from loader_service.pieces.service import PieceService, settle_process
from stoker_proto.errors import StokerError
from stoker_proto.host.descriptors import raise_descriptor_limit
from stoker_proto.host.process import end_with_parent
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Ticket

ENDPOINT = "workers"
"""Name of the front's socket in the run directory."""
_MAX_WAITING = 64  # answers that the front has not taken


class Worker:
    """The main thread: tickets from the socket to the service, answers back."""

    def __init__(self, run_dir: Path, index: int) -> None:
        self._service = PieceService(run_dir)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"%d" % index)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(
            zmq.SNDHWM, _MAX_WAITING
        )  # beyond it this process waits for the front, which never waits
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(f"ipc://{run_dir}/{ENDPOINT}")

    def run(self) -> None:
        """Serve until the server sends an empty message."""
        self._send(b"", b"ready")
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._service.readable, zmq.POLLIN)
        while True:
            while (answer := self._service.take()) is not None:
                self._send(*answer)
            events = dict(poller.poll())
            if self._service.readable in events:
                self._service.acknowledge()
            if self._socket in events:
                address, frame = self._socket.recv_multipart()
                if not frame:
                    return
                ticket = encoding.decode(frame)
                if not isinstance(ticket, Ticket):
                    raise StokerError(f"the front forwarded a {type(ticket).__name__}")
                self._service.submit(address, ticket)

    def close(self) -> None:
        """Stop threads and close the socket."""
        self._service.close()
        self._context.destroy(linger=0)

    def _send(self, address: bytes, frame: bytes) -> None:
        # Copied on purpose: pyzmq's zero-copy send hands each frame to a thread of its own to be freed, and that thread and
        # the builders then wait for each other's interpreter lock. A copy of 170 KB takes 20 us.
        self._socket.send(address, zmq.SNDMORE)
        self._socket.send(frame, zmq.SNDMORE)
        self._socket.send(msgpack.packb(self._service.counters.as_list()))


def main() -> None:
    """Entry of the worker process."""
    if not end_with_parent(int(sys.argv[3])):
        sys.exit(1)
    raise_descriptor_limit()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the front decides when workers end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(processName)s %(levelname)s %(message)s")
    worker = Worker(Path(sys.argv[1]), int(sys.argv[2]))
    settle_process()
    try:
        worker.run()
    finally:
        worker.close()


if __name__ == "__main__":
    main()
