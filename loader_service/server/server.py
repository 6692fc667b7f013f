"""The front of a loader: one ROUTER socket that speaks `proto/PROTOCOL.md`, forwards tickets to workers, answers ranks.

It never touches a sample: frames built by the workers pass through without being copied or decoded.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import zmq

from loader_service.plan.lane_plan import PlanKey
from loader_service.server.clients import Client, Clients
from loader_service.server.connections import Connections, descriptor_of
from loader_service.server.counters import Tally, metrics, progress
from loader_service.server.gate import HANDSHAKE_EVENTS, Gate
from loader_service.server.handshake import Handshake
from loader_service.server.listening import bound_address, can_drop_resets, let_in, listen
from loader_service.server.loop_calls import LoopCalls
from loader_service.server.outbox import Outbox
from loader_service.server.planner import Planner
from loader_service.server.pool import Pool, has_message
from loader_service.server.relay import RelayProcess
from loader_service.server.served import Served
from loader_service.server.waiting import WaitingRequests
from stoker_proto.errors import LocalProtocolError, RemoteProtocolError
from stoker_proto.fleet.metrics import Samples
from stoker_proto.host.descriptors import raise_descriptor_limit
from stoker_proto.wire import encoding
from stoker_proto.wire.keys import Key
from stoker_proto.wire.messages import Drain, Epoch, Failure, Hello, Message, Ping, Pong, Ticket, Welcome
from stoker_proto.wire.peer_text import shown
from stoker_proto.wire.row_bits import unpack_rows

logger = logging.getLogger(__name__)

MAX_UNHEARD = 16
"""Messages of one connection that wait in the loader; later ones wait at the rank. Connections take turns, one message each."""
MAX_UNREAD_FRAMES = 256
"""Frames that wait for one rank that does not read. Later ones are dropped and counted; the rank asks again at its deadline.
`loader.unread_mb` limits the same in bytes."""
_AT_ONCE = 256
RANKS = "ranks"
"""Name of the socket in the run directory to which `relay` passes ranks on."""
_LOOK_INTERVAL_MS = 200  # between two looks whether a worker died


class LoaderServer:
    """Serves until `stop` is called or a drain is complete."""

    def __init__(
        self,
        served: Served,
        run_dir: Path,
        pool: Pool,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: tuple[Key, Mapping[bytes, str]] | None = None,
    ) -> None:
        """keys: this loader's secret and the admitted ranks (`stoker_proto.wire.keys.loader_keys`); None: any rank that
        reaches the socket."""
        self._served, self._pool = served, pool
        self._handshake = Handshake(served)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._clients = Clients()
        self._planner = Planner(run_dir, served.entries, served.config.data, self._wake, self._plans_in_work)
        self._waiting = WaitingRequests()
        self._tally = Tally()
        self._address = ""
        self.calls = LoopCalls(self._wake)
        """For other threads that want to know something."""
        self.on_look: Callable[[], None] = lambda: None
        """The loop calls it in each turn, five times a second."""
        self._drain_deadline: float | None = None
        self._stopped = False
        self._socket = context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 1000),
            (zmq.SNDHWM, MAX_UNREAD_FRAMES),
            (zmq.RCVHWM, MAX_UNHEARD),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.MAXMSGSIZE, encoding.MAX_QUESTION_BYTES),  # of each frame
            (zmq.HANDSHAKE_IVL, 10_000),
            # Safe only as no connection can be reset (`listening.py`). The time-out bounds how long reading may pause.
            (zmq.HEARTBEAT_IVL, 1000),
            (zmq.HEARTBEAT_TIMEOUT, 5000),
            # For peers of ZMTP 1 and 2, which know no heartbeats. It must come later than these: where it ends a connection,
            # libzmq does not bear that reading has paused.
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.TCP_KEEPALIVE_IDLE, 10),
            (zmq.TCP_KEEPALIVE_INTVL, 3),
            (zmq.TCP_KEEPALIVE_CNT, 3),
        ):
            self._socket.setsockopt(option, value)
        self._outbox = Outbox(self._socket, served.config.loader.unread_mb << 20)
        self._gate = Gate(context, self._socket, *keys) if keys else None
        self._run_dir, self._hears_resets = run_dir, not can_drop_resets()
        self._relay: RelayProcess | None = None
        self._listener: socket.socket | None = None
        """The descriptor that ZeroMQ has, once more."""
        # Half of the descriptors. The relay has the same limit, and two for each connection.
        most = raise_descriptor_limit() // (4 if self._hears_resets else 2)
        self._connections = Connections(self._socket, most, more_events=HANDSHAKE_EVENTS if keys else 0)

    def plan_ahead(self) -> None:
        """Start planning the first epoch of every entry."""
        for split, manifests in self._served.entries.items():
            for entry in manifests:
                self._planner.lanes(PlanKey(split, 0, entry))

    def bind(self, address: str) -> str:
        """Bind, and return the address with the port that `*` stands for."""
        listener = listen(address)
        self._address = bound_address(listener)
        if self._hears_resets:
            path = self._run_dir / RANKS
            self._socket.bind(f"ipc://{path}")
            self._relay = RelayProcess(listener, path)
            return self._address
        self._socket.setsockopt(zmq.USE_FD, listener.fileno())
        self._socket.bind(address)
        own = self._listener = listener.dup()
        self._connections.let_in_by(lambda share: let_in(own, share))
        listener.detach()  # ZeroMQ closes it
        return self._address

    def stop(self) -> None:
        """End at once. May be called from a signal handler."""
        self._stopped = True
        self._wake()

    def drain(self, deadline_s: float) -> None:
        """Answer the tickets in work, reject new ones, then end. May be called from a signal handler."""
        if self._drain_deadline is None:
            self._drain_deadline = time.monotonic() + deadline_s
        self._wake()

    @property
    def is_draining(self) -> bool:
        """Whether new tickets are rejected."""
        return self._drain_deadline is not None

    def run(self) -> None:
        """Serve until `stop`, or until a drain is complete."""
        poller = zmq.Poller()
        gate = self._gate
        watched = [self._socket, self._pool.readable, self._wake_read, self._connections.monitor]
        for readable in [*watched, gate.zap] if gate else watched:
            poller.register(readable, zmq.POLLIN)
        draining = False
        next_look = 0.0
        while not self._stopped:
            events = dict(poller.poll(_LOOK_INTERVAL_MS))
            if self._wake_read in events:
                os.read(self._wake_read, 65536)
                self._answer_planned()
                self.calls.answer()
            if gate and gate.zap in events:
                gate.look()
            if self._connections.monitor in events:
                self._look_at_connections()
            if self._pool.readable in events:
                self._pool.acknowledge()
            self._from_workers()
            if self._socket in events:
                self._from_clients()
            if time.monotonic() > next_look:
                next_look = time.monotonic() + _LOOK_INTERVAL_MS / 1e3
                self.on_look()
                self._connections.let_in()
                if self._relay is not None:
                    self._relay.check()
                for worker in self._pool.replace_dead():
                    self._fail_tickets_of(worker)
            if self._drain_deadline is not None:
                if not draining:
                    draining = True
                    self._announce_drain()
                in_work = self._clients.num_in_work
                if not in_work or time.monotonic() > self._drain_deadline:
                    logger.log(logging.WARNING if in_work else logging.INFO, "drained: %d tickets unanswered", in_work)
                    return

    def close(self) -> None:
        """Close sockets and the planning thread."""
        self._planner.close()
        if self._gate:
            self._gate.close()
        self._connections.close()
        self._socket.close()
        if self._listener is not None:
            self._listener.close()
        if self._relay is not None:
            self._relay.stop()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def progress(self) -> dict[str, float]:
        """The counters of a PONG."""
        refused = self._gate.refused if self._gate else 0
        return progress(self._pool, self._clients, self._outbox, self._tally, refused=refused)

    def metrics(self) -> Samples:
        """All metrics of this loader. Only the loop may call it: see `calls`."""
        limit = self._served.config.loader.cache_mb << 20
        refused: dict[tuple[str, ...], float] = {
            ("key",): float(self._gate.refused if self._gate else 0),
            ("fingerprint",): float(self._handshake.refused),
            ("message",): float(self._tally.rejected),
        }
        parts = (self._pool, self._clients, self._waiting, self._outbox, self._tally)
        return {
            "stoker_loader_info": {(self._served.name, self._address): 1.0},
            "stoker_loader_ready": {(): float(not self.is_draining)},
            **metrics(*parts, cache_limit_bytes=limit),
            "stoker_loader_refused_peers_total": refused,
        }

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"1")
        except BlockingIOError:
            return  # full: the loop is going to wake up anyway

    def _from_workers(self) -> None:
        """Pass on finished frames, but at most some hundred, so that messages of ranks are read in between."""
        for _ in range(_AT_ONCE):
            answer = self._pool.receive()
            if answer is None:
                return
            address, frame = answer
            client = self._clients.get(address)
            if client is not None:
                content = frame if isinstance(frame, bytes) else frame.buffer
                self._tally.answered(content)
                client.end(encoding.peek_ticket(content))
                self._send_frame(address, frame)

    def _from_clients(self) -> None:
        for _ in range(_AT_ONCE):
            self._from_client()
            self._from_workers()  # cached pieces are ready at once: they must not wait for all messages to be read
            if not has_message(self._socket):
                return

    def _look_at_connections(self) -> None:
        for event, value in self._connections.look():
            if self._gate:
                self._gate.failed(event, value)

    def _from_client(self) -> None:
        try:
            address = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:  # the connection has ended since the poller looked, and what it sent is gone with it
            return
        received = self._socket.recv(copy=False)
        num_frames = 1
        while received.more:
            received = self._socket.recv(copy=False)
            num_frames += 1
        if self._connections.is_silenced(address):
            return
        try:
            if num_frames > 1:
                raise RemoteProtocolError(f"a message of {num_frames} frames: one is expected")
            frame = received.bytes
            message = encoding.decode_question(frame)
            self._handle(address, message, frame)
            self._connections.accepted(address)
            if isinstance(message, Hello) and self._clients.get(address):
                self._connections.admit(address, descriptor_of(received))
        except RemoteProtocolError as error:
            self._connections.rejected(address, descriptor_of(received))
            self._tally.rejected += 1
            if self._tally.rejected < 20 or self._tally.rejected % 1000 == 0:  # a hostile peer must not fill the log
                logger.warning("rejected message %d: %s", self._tally.rejected, error)

    def _handle(self, address: bytes, message: Message, frame: bytes) -> None:
        if isinstance(message, Hello):
            self._answer_hello(address, message)
            return
        client = self._clients.heard(address)
        if client is None:
            if self._clients.is_gone(address):
                return  # asked before it went
            raise RemoteProtocolError(f"{type(message).__name__} before HELLO")
        if isinstance(message, Ticket):
            self._forward(address, client, message, frame)
        elif isinstance(message, Ping):
            self._send(address, Pong(nonce=message.nonce, progress=self.progress()))
        elif isinstance(message, Epoch):
            self._answer_epoch(address, message)

    def _answer_hello(self, address: bytes, hello: Hello) -> None:
        answer = self._handshake.answer(hello)
        if isinstance(answer, Welcome):
            forgotten = self._clients.admit(address)
        else:
            self._clients.forget(address)  # also one that agreed before: nothing more may be mixed into its run
            forgotten = [address]
        self._send(address, answer)  # its unread bytes stay counted, whatever it says, until its connection ends
        for other in forgotten:
            self._connections.forget(other)

    def _answer_epoch(self, address: bytes, message: Epoch) -> None:
        if message.split not in ("train", "val") or message.epoch < 0:
            raise RemoteProtocolError(f"EPOCH of split {shown(message.split)}, epoch {message.epoch}")
        manifests = self._served.entries.get(message.split, {})
        held = [entry for entry in dict.fromkeys(message.entries) if entry in manifests]
        asked = Epoch(split=message.split, epoch=message.epoch, entries=held)
        answer = self._planner.answer(asked, self._served.tokens.get(message.split, {}))
        if answer is not None:
            self._send(address, answer)
        elif not self._waiting.add_lanes(address, asked):
            raise RemoteProtocolError("too many EPOCHs wait for plans already")  # dropped; ranks ask again

    def _forward(self, address: bytes, client: Client, ticket: Ticket, frame: bytes) -> None:
        if ticket.ticket in client.in_work:
            return None  # asked again while it is being built: the answer is on its way
        if ticket.split not in ("train", "val") or ticket.epoch < 0:
            raise RemoteProtocolError(f"TICKET of split {shown(ticket.split)}, epoch {ticket.epoch}")
        if self._drain_deadline is not None:
            return self._fail(address, ticket, "unavailable", "the loader is draining")
        if refusal := client.refusal(ticket):
            return self._fail(address, ticket, *refusal)
        entry, lane = divmod(ticket.lane, self._served.config.data.order.lanes)
        if entry not in self._served.entries.get(ticket.split, {}):
            return self._fail(address, ticket, "unavailable", f"entry {entry} of {ticket.split} is not held here")
        lanes = self._planner.plan(PlanKey(ticket.split, ticket.epoch, entry))
        if lanes is None:
            if not self._waiting.add_ticket(address, ticket, frame):
                return self._fail(address, ticket, "unavailable", "too many tickets wait for plans already")
            return None
        length = lanes.lengths[lane]
        if not (0 <= ticket.start < length and 0 < ticket.count <= min(length - ticket.start, encoding.MAX_ROWS)):
            rule = f"lane {ticket.lane} has {length} rows, asked: {ticket.count} from {ticket.start}"
            return self._fail(address, ticket, "rejected", rule)
        if ticket.rows:
            try:
                unpack_rows(ticket.rows, ticket.count)
            except LocalProtocolError as error:
                return self._fail(address, ticket, "rejected", str(error))
        worker = ticket.lane % self._pool.num_workers
        client.begin(ticket, worker)
        if not self._pool.send(worker, address, ticket, frame):
            client.end(ticket.ticket)
            return self._fail(address, ticket, "unavailable", f"worker {worker} is being restarted")
        return None

    def _plans_in_work(self) -> set[PlanKey]:
        lanes = self._served.config.data.order.lanes
        return {PlanKey(ticket.split, ticket.epoch, ticket.lane // lanes) for ticket in self._clients.tickets()}

    def _answer_planned(self) -> None:
        lanes, tickets = self._waiting.take()
        for address, asked in lanes:
            if self._clients.get(address):  # it may have gone meanwhile
                self._answer_epoch(address, asked)
        for address, ticket, frame in tickets:
            client = self._clients.get(address)
            if client is not None:
                self._forward(address, client, ticket, frame)

    def _announce_drain(self) -> None:
        self.on_look()  # an idle loader ends before it looks again
        for address, _ in self._clients:
            self._send(address, Drain(loader=self._served.name))

    def _fail_tickets_of(self, worker: int) -> None:
        for address, client in self._clients:
            for ticket in [number for number, (index, _) in client.in_work.items() if index == worker]:
                client.end(ticket)
                message = f"worker {worker} died and is being restarted"
                self._tally.answers["died"] += 1
                self._send(address, Failure(ticket=ticket, reason="died", message=message))

    def _fail(self, address: bytes, ticket: Ticket, reason: str, message: str) -> None:
        self._tally.answers[reason] += 1
        self._send(address, Failure(ticket=ticket.ticket, reason=reason, message=message))

    def _send(self, address: bytes, message: Message) -> None:
        self._send_frame(address, encoding.encode(message))

    def _send_frame(self, address: bytes, frame: zmq.Frame | bytes) -> None:
        began = time.perf_counter()
        if not self._outbox.send(address, frame):
            self._clients.forget(address)  # the rank is gone
        self._tally.send_s += time.perf_counter() - began
