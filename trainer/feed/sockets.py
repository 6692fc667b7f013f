"""Drives the core with ZeroMQ: one thread, one DEALER per loader, frames in and out; no logic of its own.
Loaders that `discovery` finds join during the run.

The thread owns every socket. Other threads reach it through `post`, which wakes it; it sleeps in one poll until a socket is
readable, something was posted, or the core's next deadline.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import zmq
from zmq.utils.monitor import recv_monitor_message

from stoker_proto.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from stoker_proto.wire.encoding import MAX_FRAME_BYTES, decode, encode
from stoker_proto.wire.keys import Key
from trainer.feed.client.commands import Command, Deliver, Fail, Opened, Send, Warn
from trainer.feed.client.core import Core
from trainer.feed.client.options import CoreOptions
from trainer.feed.discovery import Discovery, Found
from trainer.feed.handshake import EVENTS, GIVEN_UP, Connected, Denied, Handshake

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FRAMES_PER_TURN = 32  # of one loader before the others have their turn
_LONGEST_SLEEP_S = 1.0
_STALL_S = 0.25
"""A turn that takes this much longer than its sleep was stopped or starved. The extra time does not count against the loaders,
whose answers may lie unread."""
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS, _TIME_TO_LIVE_MS = 500, 1500, 10_000
"""The last one: a loader ends the connection after this much silence of the rank; while answers are stuck it has no other sign.
"""
_REDIAL_S = 5.0
"""Where ZeroMQ gives an address up (keys that do not fit), it is dialled again: the loader there may be replaced."""


class Sink(Protocol):
    """Who is told what the core says. Called on the driver's thread: must not block."""

    def opened(self, command: Opened) -> None:
        """Lane lengths of an epoch."""

    def deliver(self, command: Deliver) -> None:
        """The next micro-batch's pieces."""

    def fail(self, error: BaseException) -> None:
        """The feed is over."""


@dataclass(slots=True)
class Connection:
    """To one loader."""

    address: str
    dealer: zmq.Socket[bytes]
    monitor: Any
    handshake: Handshake
    outbox: deque[bytes] = field(default_factory=deque)
    """Frames that could not be sent yet."""
    redial_at: float | None = None
    """When to connect anew, by ourselves."""

    def close(self) -> None:
        """Close the sockets."""
        self.dealer.disable_monitor()
        self.dealer.close(0)
        self.monitor.close(0)


class SocketDriver:
    """One rank's connections to all loaders. `start` once, `post` from anywhere, `close` at the end."""

    def __init__(
        self, options: CoreOptions, sink: Sink, keys: tuple[Key, Key] | None = None, listed: Sequence[str] = ()
    ) -> None:
        """Makes the core and its sockets, which begin to connect. Raises ConfigError for an address ZeroMQ cannot read.

        keys: our secret and the loaders' public key (`stoker_proto.wire.keys.rank_keys`); None: in the clear.
        listed: entries of cluster.loader_addresses that name loaders which may change (`discovery`).
        """
        if keys and not zmq.has("curve"):
            raise ConfigError(
                "cluster.security is set, but this pyzmq was built without CURVE: install its wheel from PyPI"
            )
        self._sink, self._keys = sink, keys
        self._posted: deque[Callable[[Core, float], None]] = deque()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._connections: dict[int, Connection] = {}  # by loader number
        self._fixed = frozenset(options.addresses)
        self._discovery = Discovery(listed, options.feed.discovery_s, self._found) if listed else None
        self._wake_here, self._wake_there = socket.socketpair()
        self._wake_here.setblocking(False)
        self._wake_there.setblocking(False)
        self._leaving: Found | None = None  # the newest list, while loaders that it lacks are still connected
        self._look_again_at = 0.0
        self._closing = False
        self.bytes_received = 0
        self._now = self._real = time.monotonic()
        self._core = Core(options, self._now)
        self._thread = threading.Thread(target=self._run, name="stoker-feed", daemon=True)
        try:
            for number, address in enumerate(options.addresses):
                self._connections[number] = self._connect(address)
        except zmq.ZMQError as error:
            self._close_sockets()
            raise ConfigError(
                f"cluster.loader_addresses holds {address!r}: {error}; write tcp://HOST:PORT, the --bind of a loader-serve"
            ) from error

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()
        if self._discovery:
            self._discovery.start()

    def post(self, call: Callable[[Core, float], None]) -> None:
        """Have the driver's thread call this with the core and the time."""
        self._posted.append(call)
        self._wake()

    def call(self, look: Callable[[Core, float], T]) -> T:
        """What the call gives when the driver's thread has made it. Raises LocalProtocolError once the driver is closed."""
        answer: Future[T] = Future()

        def answered(core: Core, now: float) -> None:
            answer.set_result(look(core, now))

        self.post(answered)
        while True:
            try:
                return answer.result(timeout=1.0)
            except TimeoutError:
                if not self._thread.is_alive():
                    raise LocalProtocolError("the feed is closed") from None

    def close(self) -> None:
        """Stop the thread and close everything; safe to call twice."""
        if self._discovery:
            self._discovery.close()
        self._closing = True
        self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        elif not self._thread.ident:  # never started
            self._close_sockets()

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except BaseException as error:  # noqa: BLE001  (the thread's edge: the consumer must hear of it)
            self._sink.fail(error)
        finally:
            self._close_sockets()

    def _turn(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_here, zmq.POLLIN)
        for connection in self._connections.values():
            poller.register(connection.dealer, zmq.POLLIN | (zmq.POLLOUT if connection.outbox else 0))
            poller.register(connection.monitor, zmq.POLLIN)
        self._redial(self._now)
        sleep_s = min(self._core.next_time(self._now) - self._now, _LONGEST_SLEEP_S)
        ready = dict(poller.poll(max(0, round(sleep_s * 1000 + 0.5))))
        now = self._clock(sleep_s)
        if self._wake_here.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_here.recv(4096)
        for number, connection in self._connections.items():
            if connection.monitor in ready:
                self._connection_events(number, now)
            if ready.get(connection.dealer, 0) & zmq.POLLIN:
                self._receive(number, now)
            if ready.get(connection.dealer, 0) & zmq.POLLOUT:
                self._flush(number)
        if self._leaving is not None and now >= self._look_again_at:
            self._look_again_at = now + _LONGEST_SLEEP_S
            self._list(self._leaving, self._core, now)
        while self._posted:
            self._posted.popleft()(self._core, now)
        for command in self._core.advance(now):
            self._execute(command)

    def _clock(self, sleep_s: float) -> float:
        """Monotonic seconds, without the time in which this process did not get to run. sleep_s: what the turn meant to sleep."""
        real = time.monotonic()
        self._now += min(real - self._real, max(sleep_s, 0.0) + _STALL_S)
        self._real = real
        return self._now

    def _connection_events(self, number: int, now: float) -> None:
        connection = self._connections[number]
        while connection.monitor.poll(0):
            event = recv_monitor_message(connection.monitor)
            change = connection.handshake.event(event["event"], event["value"])
            if change is None:
                continue
            if isinstance(change, Connected):
                connection.outbox.clear()
                self._core.connected(number, now)
                continue
            self._receive(number, now)  # what came before the connection broke
            connection.outbox.clear()
            if event["event"] in GIVEN_UP:
                connection.redial_at = now + _REDIAL_S
            if not isinstance(change, Denied):
                self._core.lost(number, change.reason, now)
                continue
            if change.news:
                self._core.denied(number, change.text, now)

    def _redial(self, now: float) -> None:
        for connection in self._connections.values():
            if connection.redial_at is not None and now >= connection.redial_at:
                connection.redial_at = None
                connection.dealer.disconnect(connection.address)
                connection.dealer.connect(connection.address)

    def _receive(self, number: int, now: float) -> None:
        dealer = self._connections[number].dealer
        for _ in range(_FRAMES_PER_TURN):
            try:
                frame = dealer.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self.bytes_received += len(frame)
            try:
                if frame.more:
                    self._drop_rest(dealer)
                    raise RemoteProtocolError("a message of several frames: one is expected")
                message = decode(frame.buffer)
            except RemoteProtocolError as error:
                self._core.broken(number, str(error), now)
            else:
                self._core.received(number, message, now)

    @staticmethod
    def _drop_rest(dealer: zmq.Socket[bytes]) -> None:
        while dealer.getsockopt(zmq.RCVMORE):
            dealer.recv(zmq.NOBLOCK, copy=False)

    def _execute(self, command: Command) -> None:
        if isinstance(command, Send):
            self._connections[command.loader].outbox.append(encode(command.message))
            self._flush(command.loader)
        elif isinstance(command, Deliver):
            self._sink.deliver(command)
        elif isinstance(command, Opened):
            self._sink.opened(command)
        elif isinstance(command, Warn):
            logger.warning("%s", command.text)
        elif isinstance(command, Fail):
            self._sink.fail(command.error)

    def _flush(self, number: int) -> None:
        connection = self._connections[number]
        outbox = connection.outbox
        while outbox:
            try:
                connection.dealer.send(outbox[0], zmq.NOBLOCK)
            except zmq.Again:  # the connection is just coming or going: the poll says when it can be written
                return
            outbox.popleft()

    # -- sockets

    def _found(self, found: Found) -> None:
        """On the discovery's thread."""
        self.post(lambda core, now: self._list(found, core, now))

    def _list(self, found: Found, core: Core, now: float) -> None:
        """Connect to what joined the list; forget what left it, once it is no longer connected."""
        not_found = dict(found.not_found)
        numbers = {connection.address: number for number, connection in self._connections.items()}
        for address in found.addresses:
            if address in numbers:
                continue
            try:
                connection = self._connect(address)
            except zmq.ZMQError as error:  # a list may change: the rest of it is used
                not_found[address] = str(error)
                continue
            self._connections[core.join(address)] = connection
            logger.info("a loader is listed at %s", address)
        core.not_found(not_found)
        gone = numbers.keys() - self._fixed - set(found.addresses)
        waiting = [address for address in gone if not core.leave(numbers[address], now)]
        for address in gone - set(waiting):
            self._connections.pop(numbers[address]).close()
            logger.info("no loader is listed at %s any more", address)
        self._leaving = found if waiting else None

    def _connect(self, address: str) -> Connection:
        dealer: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        # No routing id is set: the loader's ROUTER gives each connection a new random one, so that an answer to a
        # connection that is gone cannot come through the next one, nor a half-open one shut us out.
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),  # nothing queues up for a loader that is not there
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.HANDSHAKE_IVL, 10_000),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS),
            (zmq.HEARTBEAT_TTL, _TIME_TO_LIVE_MS),
            (
                zmq.RCVHWM,
                0,
            ),  # libzmq aborts where reading has paused and heartbeats are sent; tickets bound what comes
            (zmq.RECONNECT_IVL, 100),
            (zmq.RECONNECT_IVL_MAX, 1000),
            (zmq.CONNECT_TIMEOUT, 3000),
            (zmq.IPV6, 1),
        ):
            dealer.setsockopt(option, value)
        if self._keys:
            secret, loader = self._keys
            dealer.curve_secretkey, dealer.curve_publickey = secret.value, zmq.curve_public(secret.value)
            dealer.curve_serverkey = loader.value
        monitor = dealer.get_monitor_socket(EVENTS)
        connection = Connection(
            address, dealer, monitor, Handshake(address, self._keys[0].name if self._keys else None)
        )
        try:
            dealer.connect(address)
        except zmq.ZMQError:
            connection.close()
            raise
        return connection

    def _close_sockets(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections = {}
        self._context.term()
        self._wake_here.close()
        self._wake_there.close()

    def _wake(self) -> None:
        try:
            self._wake_there.send(b"1")
        except (BlockingIOError, OSError):  # full: it is going to wake up anyway; closed: it is over
            return
