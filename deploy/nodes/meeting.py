"""The sockets between the launchers of a run: a ROUTER on node 0, a DEALER on every other node. JSON, one frame per message.

With `cluster.security` they are encrypted and authenticated by the same keys as the data: node 0 has the loaders' secret, the
others have the ranks'. A thread keeps telling and asking, so that a node that loads data or models for minutes is not lost.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, TypeAlias

import zmq
from zmq.auth.thread import ThreadAuthenticator

from deploy.child import say
from deploy.nodes.coordinator import Abort, Coordinator
from stoker_proto.config.security import SecurityConfig
from stoker_proto.errors import ConfigError
from stoker_proto.wire.keys import Key, loader_keys, rank_keys

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
_INTERVAL_S = 0.5
"""Between two messages of a node."""
_POLL_MS = 100
_MAX_BYTES = 1 << 20
_LEAVE_S = 10.0
"""How long node 0 waits for the others to see how the run ended."""
_AT_ONCE = 1000
_MOST_REFUSALS_SHOWN = 20
_DOMAIN = "stoker-nodes"


class Meeting(ABC):
    """What the launchers of a run tell each other. Base of `Host` (node 0) and `Guest` (the others)."""

    def __init__(self, node: int) -> None:
        self._lock = threading.Lock()
        self._own: dict[str, Any] = {
            "node": node,
            "id": secrets.token_hex(8),
            "said": {},
            "abort": None,
            "stop": 0,
            "save": False,
            "left": False,
        }
        self._state: dict[str, Any] = {"agreed": {}, "abort": None, "stop": 0, "save": False, "failed": None}
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run_guarded, name="stoker-meeting", daemon=True)

    def give(self, name: str, value: Any) -> None:
        """Say this node's value of a round."""
        with self._lock:
            self._own["said"][name] = value

    def agreed(self, name: str) -> list[Any] | None:
        """The values of all nodes, by node; None while one is missing."""
        with self._lock:
            found: list[Any] | None = self._state["agreed"].get(name)
            return found

    def give_up(self, reason: str, code: int) -> None:
        """End the run on all nodes."""
        with self._lock:
            if self._own["abort"] is None:
                self._own["abort"] = {"reason": reason, "code": code}

    def pass_on(self, *, stop: int = 0, save: bool = False) -> None:
        """Ask all nodes to stop, as if they had got this signal, or to save and end."""
        with self._lock:
            self._own["stop"] = self._own["stop"] or int(stop)  # a number, as in JSON, and not a signal.Signals
            self._own["save"] = self._own["save"] or save

    @property
    def aborted(self) -> Abort | None:
        """Why the run ends early; None if it does not."""
        with self._lock:
            found: Abort | None = self._own["abort"] or self._state["abort"]
            return found

    @property
    def stop(self) -> int:
        """Number of the stop signal that a node got; 0 if none did."""
        with self._lock:
            return int(self._state["stop"])

    @property
    def save(self) -> bool:
        """Whether a node was asked to save and end."""
        with self._lock:
            return bool(self._state["save"])

    @property
    def failed(self) -> tuple[int, int] | None:
        """(node, exit code) of a node whose ranks have failed."""
        with self._lock:
            found = self._state["failed"]
            return (found[0], found[1]) if found else None

    @abstractmethod
    def missing(self) -> str:
        """What is missing while nodes come together, for a message."""

    @abstractmethod
    def continue_without(self, nodes: frozenset[int]) -> None:
        """Losing one of these nodes does not end the run."""

    def close(self) -> None:
        """Tell the others that this node leaves; wait a little until they have heard."""
        with self._lock:
            self._own["left"] = True
        self._is_closing.set()
        self._thread.join(_LEAVE_S + 5.0)

    def __enter__(self) -> Meeting:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.give_up(f"node {self._own['node']}: {type(error).__name__}: {error}", 1)
        self.close()

    def _run_guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:  # without this thread the run would wait for nobody
            self.give_up(f"the launchers' meeting failed: {type(error).__name__}: {error}", 1)
            raise

    @abstractmethod
    def _run(self) -> None:
        """The thread's work: to hear the others, and to tell them, until it closes."""

    def _own_message(self) -> dict[str, Any]:
        with self._lock:
            return {**self._own, "said": dict(self._own["said"])}

    def _take(self, state: dict[str, Any]) -> None:
        with self._lock:
            state["agreed"] = {**self._state["agreed"], **state["agreed"]}
            self._state = state


class Host(Meeting):
    """Node 0."""

    def __init__(self, address: str, port: int, num_nodes: int, lost_s: float, security: SecurityConfig) -> None:
        """Raises ConfigError where the port cannot be had, or for a bad key."""
        super().__init__(0)
        self._coordinator = Coordinator(num_nodes, lost_s)
        self._context: Context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 1000)
        self._router.setsockopt(zmq.MAXMSGSIZE, _MAX_BYTES)
        self._router.setsockopt(zmq.IPV6, int(":" in address))
        self._authenticator: ThreadAuthenticator | None = None
        try:
            if keys := loader_keys(security):
                self._admit(*keys)
            try:
                self._router.bind(tcp(address, port))
            except zmq.ZMQError as error:
                raise ConfigError(
                    f"the launchers cannot meet at {tcp(address, port)} ({os.strerror(error.errno or 0)}): {_way_out(error)}"
                ) from error
        except ConfigError:
            self._close_sockets()
            raise

    def _admit(self, secret: Key, allowed: dict[bytes, str]) -> None:
        """Only launchers with one of these public keys get as far as a message."""
        authenticator = self._authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        authenticator.configure_curve_callback(_DOMAIN, _Admitted(frozenset(allowed)))
        self._router.curve_secretkey, self._router.curve_publickey = secret.value, zmq.curve_public(secret.value)
        self._router.curve_server = True
        self._router.zap_domain = _DOMAIN.encode()
        self._router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def missing(self) -> str:
        with self._lock:
            nodes = [node for node in self._coordinator.missing() if node != 0]
        return f"nodes {nodes} have not come: is the same command running there, with --node-rank, and do they reach this one?"

    def continue_without(self, nodes: frozenset[int]) -> None:
        with self._lock:
            self._coordinator.dispensable = nodes

    def _run(self) -> None:
        end: float | None = None
        try:
            while True:
                self._router.poll(_POLL_MS)
                self._hear_all()
                self._look()
                if self._is_closing.is_set():
                    end = end or time.monotonic() + _LEAVE_S
                    if self._coordinator.all_have_left() or time.monotonic() > end:
                        return
        finally:
            self._close_sockets()

    def _hear_all(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            with self._lock:
                answer = self._coordinator.hear(_decode(frames), time.monotonic())
            try:
                self._router.send_multipart([peer, json.dumps(answer).encode()], zmq.NOBLOCK)
            except zmq.ZMQError:  # it takes no answers: it asks again, or is lost
                continue

    def _look(self) -> None:
        own = self._own_message()
        with self._lock:
            now, num_lost = time.monotonic(), len(self._coordinator.lost)
            self._coordinator.hear(own, now)
            self._coordinator.look(now)
            state = self._coordinator.state({})
            lost = [self._coordinator.name(node) for node in self._coordinator.lost[num_lost:]]
        self._take(state)
        for name in lost:
            say("launch", f"{name} is gone; it has no ranks, so training continues with the loaders of the others")

    def _close_sockets(self) -> None:
        self._router.close()
        if self._authenticator:
            self._authenticator.stop()
        self._context.term()


class _Admitted:
    """What pyzmq asks for each handshake."""

    def __init__(self, keys: frozenset[bytes]) -> None:
        self._keys, self._num_refused = keys, 0

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether this public key is listed."""
        if key in self._keys:
            return True
        self._num_refused += 1
        if self._num_refused <= _MOST_REFUSALS_SHOWN:  # a hostile peer must not fill the log
            say("launch", f"refused a launcher: its public key {key.decode()} is not in cluster.security.allowed_ranks")
        return False


class Guest(Meeting):
    """Any node but node 0."""

    def __init__(self, node: int, master: str, port: int, lost_s: float, security: SecurityConfig) -> None:
        """master: address of node 0. Raises ConfigError for a bad key."""
        super().__init__(node)
        self._master, self._lost_s = tcp(master, port), lost_s
        self._context: Context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 1000)
        self._dealer.setsockopt(zmq.SNDHWM, 8)
        self._dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._dealer.setsockopt(zmq.IPV6, int(":" in master))
        self._has_keys = self._was_answered = False
        try:
            if keys := rank_keys(security):
                secret, server = keys
                self._has_keys = True
                self._dealer.curve_secretkey, self._dealer.curve_publickey = (
                    secret.value,
                    zmq.curve_public(secret.value),
                )
                self._dealer.curve_serverkey = server.value
        except ConfigError:
            self._close_sockets()
            raise
        self._dealer.connect(self._master)

    def missing(self) -> str:
        if self._was_answered:
            return "node 0 waits for further nodes: its own message names them"
        keys = ", and does its cluster.security.allowed_ranks list our rank_secret's key" if self._has_keys else ""
        return f"node 0 does not answer at {self._master}: is the same command running there with --node-rank 0{keys}?"

    def continue_without(self, nodes: frozenset[int]) -> None:
        """Nothing: node 0 alone decides whether the run goes on."""

    def _run(self) -> None:
        asked_at, heard_at, end = 0.0, time.monotonic(), None
        try:
            while True:
                now = time.monotonic()
                if now - asked_at >= _INTERVAL_S or (end is None and self._is_closing.is_set()):
                    self._tell()
                    asked_at = now
                if self._is_closing.is_set():
                    end = end or now + 2 * _INTERVAL_S
                if self._dealer.poll(_POLL_MS) and self._hear_all():
                    heard_at, self._was_answered = time.monotonic(), True
                    if end is not None:
                        return
                if end is not None and time.monotonic() > end:
                    return
                if self._was_answered and time.monotonic() - heard_at > self._lost_s:
                    self.give_up(
                        f"node 0 ({self._master}) has not answered for {self._lost_s:g} s (--node-lost-s): all ranks end; once "
                        "the nodes reach each other, the same command resumes from the newest checkpoint",
                        1,
                    )
        finally:
            self._close_sockets()

    def _tell(self) -> None:
        try:
            self._dealer.send(json.dumps(self._own_message()).encode(), zmq.NOBLOCK)
        except zmq.Again:  # eight wait already: node 0 is out of reach
            return

    def _hear_all(self) -> bool:
        has_heard = False
        for _ in range(_AT_ONCE):
            try:
                state = _decode(self._dealer.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                break
            if not isinstance(state, dict):
                continue
            has_heard = True
            if "refused" in state:
                self.give_up(f"node 0 refuses this node: {state['refused']}", 1)
            elif set(state) == set(self._state):
                self._take(state)
        return has_heard

    def _close_sockets(self) -> None:
        self._dealer.close()
        self._context.term()


def tcp(address: str, port: int) -> str:
    """ZeroMQ's form of an address."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _way_out(error: zmq.ZMQError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return "this host has no such address, and node 0 is where --master-addr or the hostfile's first line is"
    return "another run may meet there; choose another --port on all nodes"


def _decode(frames: list[bytes]) -> Any:
    try:
        return json.loads(frames[0]) if len(frames) == 1 else None
    except (ValueError, RecursionError):
        return None
