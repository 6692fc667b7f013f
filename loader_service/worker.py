"""One worker process of a loader: receives tickets from the front over a private Unix socket, answers with frames.

    front -> worker: [client address, ticket frame]        worker -> front: [client address, frame, counters]

It is started as `python -m loader_service.worker RUN_DIR INDEX`; all it needs to know lies in the run directory.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import threading
from collections import OrderedDict, deque
from dataclasses import astuple
from pathlib import Path

import msgpack
import zmq

from loader_service.build import RecordEncoder
from loader_service.builder import PieceBuilder
from loader_service.plan import EpochPlan
from loader_service.prepare.manifest import EntryManifest, load_manifest
from loader_service.sources.base import make_dataset
from stoker_proto import codec
from stoker_proto.config import Config
from stoker_proto.config_reader import config_from_tree
from stoker_proto.errors import StokerError
from stoker_proto.messages import Failure, Ticket
from stoker_proto.processor import Processor

logger = logging.getLogger(__name__)

_KEEP_PLANS = 8  # over splits, epochs and entries; one is a pair of mapped files


class Worker:
    """The process's main thread: socket in, builder, socket out."""

    def __init__(self, run_dir: Path, index: int) -> None:
        self._run_dir = run_dir
        job = json.loads((run_dir / "job.json").read_text())
        self.config: Config = config_from_tree(job["config"])
        self._manifests: dict[tuple[str, int], EntryManifest] = {}
        for item in job["manifests"]:
            manifest = load_manifest(**{**item, "folder": Path(item["folder"]), "shards": tuple(item["shards"])})
            self._manifests[manifest.split, manifest.entry] = manifest
        self._plans: OrderedDict[tuple[str, int, int], EpochPlan] = OrderedDict()
        encoder = RecordEncoder(self.config.data, make_dataset(self.config.data), Processor.load(run_dir))
        self._out: deque[tuple[bytes, bytes]] = deque()
        self._wakeup_read, self._wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._builder = PieceBuilder(
            encoder,
            job["loader"],
            self._deliver,
            threads=self.config.loader.threads,
            cache_bytes=(self.config.loader.cache_mb << 20) // job["workers"],
            read_ahead=self.config.loader.read_ahead,
        )
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"%d" % index)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the front's limit of tickets in work
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(job["endpoint"])

    def run(self) -> None:
        """Serve until the front says so (an empty message) or is gone."""
        self._send(b"", b"ready")
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wakeup_read, zmq.POLLIN)
        while True:
            events = dict(poller.poll())
            if self._wakeup_read in events:
                os.read(self._wakeup_read, 65536)
                while self._out:
                    self._send(*self._out.popleft())
            if self._socket in events:
                address, frame = self._socket.recv_multipart()
                if not frame:
                    return
                self._submit(address, frame)

    def close(self) -> None:
        """Stop threads and close the socket."""
        self._builder.close()
        self._context.destroy(linger=0)

    def _submit(self, address: bytes, frame: bytes) -> None:
        ticket = codec.decode(frame)
        if not isinstance(ticket, Ticket):
            raise StokerError(f"the front forwarded a {type(ticket).__name__}")
        entry, lane = divmod(ticket.lane, self.config.data.order.lanes)
        try:
            plan = self._plan(ticket.split, ticket.epoch, entry)
            self._builder.submit(address, ticket, self._manifests[ticket.split, entry], plan, lane)
        except StokerError as error:
            failure = Failure(ticket=ticket.ticket, reason="rejected", message=str(error))
            self._send(address, codec.encode(failure))

    def _plan(self, split: str, epoch: int, entry: int) -> EpochPlan:
        key = (split, epoch, entry)
        if key not in self._plans:
            self._plans[key] = EpochPlan.load(
                self._run_dir, self.config.data.order, split=split, epoch=epoch, entry=entry
            )
            if len(self._plans) > max(_KEEP_PLANS, 2 * len(self._manifests)):
                self._plans.popitem(last=False)
        return self._plans[key]

    def _deliver(self, address: bytes, frame: bytes) -> None:
        self._out.append((address, frame))
        try:
            os.write(self._wakeup_write, b"1")
        except BlockingIOError:
            return  # the pipe is full, so the main thread is going to wake up anyway

    def _send(self, address: bytes, frame: bytes) -> None:
        counters = msgpack.packb(astuple(self._builder.counters))
        # copy=False pays from about 64 KB on; below, a plain copy is cheaper than the bookkeeping
        self._socket.send(address, zmq.SNDMORE)
        self._socket.send(frame, zmq.SNDMORE, copy=len(frame) < 65536)
        self._socket.send(counters)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies, however that dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _end_process(failure: threading.ExceptHookArgs) -> None:
    logger.critical("a builder thread failed", exc_info=failure.exc_value)
    os._exit(70)


def main() -> None:
    """Entry of the worker process."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the front decides when workers end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(processName)s %(levelname)s %(message)s")
    # A thread that fails for another reason than bad data must not leave tickets waiting: end, and be restarted.
    threading.excepthook = _end_process
    worker = Worker(Path(sys.argv[1]), int(sys.argv[2]))
    try:
        worker.run()
    finally:
        worker.close()


if __name__ == "__main__":
    main()
