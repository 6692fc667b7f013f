"""The front of a loader: one ROUTER socket that speaks `proto/PROTOCOL.md`, forwards tickets to workers, answers ranks.

It never touches a sample: frames built by the workers pass through without being copied or decoded.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zmq

from loader_service.gate import Gate
from loader_service.planner import Planner
from loader_service.pool import Pool, has_message
from loader_service.prepare.manifest import EntryManifest
from stoker_proto import PROTOCOL_VERSION, codec
from stoker_proto.config import Config
from stoker_proto.errors import RemoteProtocolError, StokerError
from stoker_proto.keys import Key
from stoker_proto.messages import (
    Drain,
    Epoch,
    Failure,
    Hello,
    Lanes,
    Message,
    Ping,
    Pong,
    Refuse,
    Ticket,
    Welcome,
)

logger = logging.getLogger(__name__)

MAX_TICKETS_PER_CLIENT = 1024
"""In work at once; more are answered with FAILURE(unavailable)."""
MAX_UNREAD_FRAMES = 256
"""Waiting for one rank that does not read; what comes after is dropped, counted, and asked for again by its deadline."""
_MAX_CLIENTS = 65_536
_MAX_AWAITING = 65_536
_AT_ONCE = 256
_LOOK_INTERVAL_MS = 200  # between two looks whether a worker died


@dataclass(slots=True)
class _Client:
    in_work: dict[int, int] = field(default_factory=dict)  # ticket -> worker


class LoaderServer:
    """Serves until `stop` is called or a drain is complete."""

    def __init__(
        self,
        config: Config,
        entries: Mapping[str, Mapping[int, EntryManifest]],
        fingerprints: dict[str, str],
        processor_json: str,
        run_dir: Path,
        pool: Pool,
        context: zmq.Context[zmq.Socket[bytes]],
        *,
        name: str,
        keys: tuple[Key, Mapping[bytes, str]] | None = None,
    ) -> None:
        """keys: this loader's secret and the ranks admitted (`stoker_proto.keys.loader_keys`); None: whoever reaches it."""
        self.name = name
        self._config, self._entries, self._pool = config, entries, pool
        self._fingerprints, self._processor_json = fingerprints, processor_json
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._planner = Planner(run_dir, entries, config.data, self._wake)
        self._clients: OrderedDict[bytes, _Client] = OrderedDict()
        self._awaiting_plan: list[tuple[bytes, Epoch | Ticket]] = []
        self._bytes_sent = self._dropped = self._rejected = 0
        self._started = time.monotonic()
        self._drain_deadline: float | None = None
        self._stopped = False
        self._socket = context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 1000),
            (zmq.SNDHWM, MAX_UNREAD_FRAMES),
            (zmq.RCVHWM, MAX_TICKETS_PER_CLIENT),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.MAXMSGSIZE, codec.MAX_CONTROL_BYTES),  # ranks send nothing large
            (zmq.HANDSHAKE_IVL, 10_000),
            (zmq.HEARTBEAT_IVL, 500),
            (zmq.HEARTBEAT_TIMEOUT, 1500),
            (zmq.HEARTBEAT_TTL, 3000),
        ):
            self._socket.setsockopt(option, value)
        self._gate = Gate(context, self._socket, *keys) if keys else None

    @staticmethod
    def new_name() -> str:
        """A random name for one incarnation of a loader."""
        return uuid.uuid4().hex[:12]

    def bind(self, address: str) -> str:
        """Bind and return the real address (a port of `*` is chosen). Plans the first epochs meanwhile."""
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise StokerError(f"--bind {address}: {error}; choose a free port, or tcp://127.0.0.1:* for any") from error
        for split, manifests in self._entries.items():
            for entry in manifests:
                self._planner.lanes(split, 0, entry)
        endpoint = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        return endpoint.decode() if isinstance(endpoint, bytes) else str(endpoint)

    def stop(self) -> None:
        """End at once. May be called from a signal handler."""
        self._stopped = True
        self._wake()

    def drain(self, deadline_s: float) -> None:
        """Finish what was asked for, take nothing new, then end. May be called from a signal handler."""
        if self._drain_deadline is None:
            self._drain_deadline = time.monotonic() + deadline_s
        self._wake()

    def run(self) -> None:
        """Serve."""
        poller = zmq.Poller()
        for readable in (self._socket, self._pool.readable, self._wake_read):
            poller.register(readable, zmq.POLLIN)
        gate = self._gate
        for asked in (gate.zap, gate.monitor) if gate else ():
            poller.register(asked, zmq.POLLIN)
        draining = False
        next_look = 0.0
        while not self._stopped:
            events = dict(poller.poll(_LOOK_INTERVAL_MS))
            if self._wake_read in events:
                os.read(self._wake_read, 65536)
                self._answer_planned()
            if gate and (gate.zap in events or gate.monitor in events):
                gate.look()
            if self._pool.readable in events:
                self._pool.acknowledge()
            self._from_workers()
            if self._socket in events:
                self._from_clients()
                self._from_workers()
            if time.monotonic() > next_look:
                next_look = time.monotonic() + _LOOK_INTERVAL_MS / 1e3
                for worker in self._pool.replace_dead():
                    self._fail_tickets_of(worker)
            if self._drain_deadline is not None:
                if not draining:
                    draining = True
                    self._announce_drain()
                in_work = sum(len(client.in_work) for client in self._clients.values())
                if not in_work or time.monotonic() > self._drain_deadline:
                    logger.log(logging.WARNING if in_work else logging.INFO, "drained: %d tickets unanswered", in_work)
                    return

    def close(self) -> None:
        """Close sockets and the planning thread."""
        self._planner.close()
        if self._gate:
            self._gate.close()
        self._socket.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def progress(self) -> dict[str, float]:
        """The counters of a PONG."""
        counters = self._pool.counters()
        return {
            "cpu_s": self._pool.cpu_s(),
            "samples": counters.samples,
            "records_decoded": counters.records_decoded,
            "records_distinct": counters.records_distinct,
            "records_ahead": counters.records_ahead,
            "skipped": counters.skipped,
            "bytes_sent": self._bytes_sent,
            "queued": sum(len(client.in_work) for client in self._clients.values()),
            "dropped": self._dropped,
            "rejected": self._rejected,
            "refused": self._gate.refused if self._gate else 0,
            "uptime_s": time.monotonic() - self._started,
        }

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"1")
        except BlockingIOError:
            return  # full: the loop is going to wake up anyway

    def _from_workers(self) -> None:
        """Pass on what is ready, but at most some hundred frames, so that neither side starves the other."""
        for _ in range(_AT_ONCE):
            answer = self._pool.receive()
            if answer is None:
                return
            address, frame = answer
            client = self._clients.get(address)
            if client is not None:
                client.in_work.pop(codec.peek_ticket(frame if isinstance(frame, bytes) else frame.buffer), None)
                self._send_frame(address, frame)

    def _from_clients(self) -> None:
        for _ in range(_AT_ONCE):
            if not has_message(self._socket):
                return
            self._from_client()

    def _from_client(self) -> None:
        parts = self._socket.recv_multipart()
        address, frame = parts[0], parts[-1]
        try:
            if len(parts) != 2:
                raise RemoteProtocolError(f"a message of {len(parts) - 1} frames: one is expected")
            self._handle(address, codec.decode(frame), frame)
        except RemoteProtocolError as error:
            self._rejected += 1
            if self._rejected < 20 or self._rejected % 1000 == 0:  # a hostile peer must not fill the log
                logger.warning("rejected message %d: %s", self._rejected, error)

    def _handle(self, address: bytes, message: Message, frame: bytes) -> None:
        if isinstance(message, Hello):
            self._greet(address, message)
        elif address not in self._clients:
            raise RemoteProtocolError(f"{type(message).__name__} before HELLO")
        elif isinstance(message, Ping):
            self._send(address, Pong(nonce=message.nonce, progress=self.progress()))
        elif isinstance(message, Epoch):
            self._answer_epoch(address, message)
        elif isinstance(message, Ticket):
            self._forward(address, message, frame)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} is for ranks, not for loaders")

    def _greet(self, address: bytes, hello: Hello) -> None:
        differences = [
            [name, self._fingerprints[name], theirs]
            for name, theirs in sorted(hello.fingerprints.items())
            if self._fingerprints.get(name, theirs) != theirs
        ]
        if hello.protocol != PROTOCOL_VERSION:
            differences.insert(0, ["protocol", str(PROTOCOL_VERSION), str(hello.protocol)])
        if differences:
            logger.warning("refused rank %d (%s): it differs in %s", hello.rank, hello.client, differences)
            self._send(address, Refuse(protocol=PROTOCOL_VERSION, differences=differences))
            return
        self._clients.setdefault(address, _Client())
        while len(self._clients) > _MAX_CLIENTS:
            self._clients.popitem(last=False)
        self._send(
            address,
            Welcome(
                protocol=PROTOCOL_VERSION,
                loader=self.name,
                fingerprints=self._fingerprints,
                held={split: sorted(entries) for split, entries in self._entries.items()},
                num_entries={
                    "train": len(self._config.data.paths("train")),
                    "val": len(self._config.data.paths("val")),
                },
                num_samples={
                    split: sum(manifest.total_samples for manifest in entries.values())
                    for split, entries in self._entries.items()
                },
                processor=self._processor_json,
            ),
        )

    def _answer_epoch(self, address: bytes, message: Epoch) -> None:
        if message.split not in ("train", "val") or message.epoch < 0:
            raise RemoteProtocolError(f"EPOCH of split {message.split!r}, epoch {message.epoch}")
        manifests = self._entries.get(message.split, {})
        held = [entry for entry in dict.fromkeys(message.entries) if entry in manifests]
        found = {entry: self._planner.lanes(message.split, message.epoch, entry) for entry in held}
        lanes = {entry: planned for entry, planned in found.items() if planned is not None}
        if len(lanes) < len(held):
            self._await_plan(address, message)
            return
        self._send(
            address,
            Lanes(
                split=message.split,
                epoch=message.epoch,
                lengths={entry: planned.lengths for entry, planned in lanes.items()},
                starts={entry: planned.starts for entry, planned in lanes.items()},
                tokens={entry: int(manifests[entry].num_tokens.sum(dtype=np.int64)) for entry in lanes},
            ),
        )

    def _forward(self, address: bytes, ticket: Ticket, frame: bytes) -> None:
        client = self._clients[address]
        if ticket.ticket in client.in_work:
            return None  # asked again while it is being built: the answer is on its way
        if ticket.split not in ("train", "val") or ticket.epoch < 0:
            raise RemoteProtocolError(f"TICKET of split {ticket.split!r}, epoch {ticket.epoch}")
        if self._drain_deadline is not None:
            return self._fail(address, ticket, "unavailable", "the loader is draining")
        if len(client.in_work) >= MAX_TICKETS_PER_CLIENT:
            return self._fail(
                address, ticket, "unavailable", f"{MAX_TICKETS_PER_CLIENT} tickets of this rank are in work"
            )
        entry, lane = divmod(ticket.lane, self._config.data.order.lanes)
        if entry not in self._entries.get(ticket.split, {}):
            return self._fail(address, ticket, "unavailable", f"entry {entry} of {ticket.split} is not held here")
        lanes = self._planner.lanes(ticket.split, ticket.epoch, entry)
        if lanes is None:
            self._await_plan(address, ticket)
            return None
        length = lanes.lengths[lane]
        if not (0 <= ticket.start < length and 0 < ticket.count <= min(length - ticket.start, codec.MAX_ROWS)):
            rule = f"lane {ticket.lane} has {length} rows, asked: {ticket.count} from {ticket.start}"
            return self._fail(address, ticket, "rejected", rule)
        worker = ticket.lane % self._pool.num_workers
        client.in_work[ticket.ticket] = worker
        if not self._pool.send(worker, address, ticket, frame):
            del client.in_work[ticket.ticket]
            return self._fail(address, ticket, "unavailable", f"worker {worker} is being restarted")
        return None

    def _await_plan(self, address: bytes, message: Epoch | Ticket) -> None:
        if len(self._awaiting_plan) >= _MAX_AWAITING:
            raise RemoteProtocolError(f"{_MAX_AWAITING} messages wait for plans already")  # dropped; ranks ask again
        self._awaiting_plan.append((address, message))

    def _answer_planned(self) -> None:
        waiting, self._awaiting_plan = self._awaiting_plan, []
        for address, message in waiting:
            if address in self._clients:  # it may have gone meanwhile
                self._handle(address, message, codec.encode(message))

    def _announce_drain(self) -> None:
        for address in list(self._clients):
            self._send(address, Drain(loader=self.name))

    def _fail_tickets_of(self, worker: int) -> None:
        for address, client in list(self._clients.items()):
            for ticket in [number for number, index in client.in_work.items() if index == worker]:
                del client.in_work[ticket]
                message = f"worker {worker} died and is being restarted"
                self._send(address, Failure(ticket=ticket, reason="unavailable", message=message))

    def _fail(self, address: bytes, ticket: Ticket, reason: str, message: str) -> None:
        self._send(address, Failure(ticket=ticket.ticket, reason=reason, message=message))

    def _send(self, address: bytes, message: Message) -> None:
        self._send_frame(address, codec.encode(message))

    def _send_frame(self, address: bytes, frame: zmq.Frame | bytes) -> None:
        try:
            self._socket.send(address, zmq.SNDMORE | zmq.NOBLOCK)
            # A received frame is passed on as it is; bytes are copied, see `worker.py`.
            self._socket.send(frame, zmq.NOBLOCK, copy=isinstance(frame, bytes))
        except zmq.Again:
            self._dropped += 1
            return
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._clients.pop(address, None)  # the rank is gone
            return
        self._bytes_sent += len(frame)
