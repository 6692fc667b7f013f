"""Bytes that peers leave unread: bounded, and given back when a peer is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from loader_service.server.outbox import Outbox
from tests.end_to_end.fleet import wait_until

MIB = 1 << 20
FRAME = bytes(MIB // 4)
SMALL_BUFFER = 1 << 16  # of the kernel's, so that little is on its way


class Peers:
    """A ROUTER, and DEALERs that never read."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._context = stack, stack.enter_context(zmq.Context())
        self.router = self._socket(zmq.ROUTER)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._port = self.router.bind_to_random_port("tcp://127.0.0.1")

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        for option, value in ((zmq.SNDBUF, SMALL_BUFFER), (zmq.RCVBUF, SMALL_BUFFER), (zmq.RCVHWM, 1)):
            socket.setsockopt(option, value)
        self._stack.callback(socket.close, 0)
        return socket

    def join(self) -> tuple[zmq.Socket[bytes], bytes]:
        """(its socket, its address)."""
        socket = self._socket(zmq.DEALER)
        socket.connect(f"tcp://127.0.0.1:{self._port}")
        socket.send(b"hello")
        assert self.router.poll(20_000)
        return socket, self.router.recv_multipart()[0]


@pytest.fixture
def peers() -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(stack)


def fill(outbox: Outbox, address: bytes) -> float:
    """Send until it is dropped; MiB that were sent."""
    before, dropped = outbox.bytes_sent, outbox.dropped
    while outbox.dropped == dropped:
        assert outbox.send(address, FRAME)
    return (outbox.bytes_sent - before) / MIB


def test_one_peer_has_a_quarter_and_all_have_the_limit(peers: Peers) -> None:
    outbox, joined = Outbox(peers.router, 16 * MIB), [peers.join() for _ in range(6)]
    sent = [fill(outbox, address) for _, address in joined]
    assert all(4.0 <= mib < 6.0 for mib in sent[:3]), sent
    assert 12.0 <= sum(sent) < 16.0 + 6 * 2.0, sent
    assert sent[5] < 2.0, sent


def test_what_a_peer_that_is_gone_had_not_read_is_given_back(peers: Peers) -> None:
    outbox, joined = Outbox(peers.router, 16 * MIB), [peers.join() for _ in range(6)]
    for _, address in joined:
        fill(outbox, address)
    for socket, _ in joined:
        socket.close(0)
    for _, address in joined:
        wait_until(lambda address=address: not outbox.send(address, b"small"), 60, "the connection's end")
    _, address = peers.join()
    assert fill(outbox, address) >= 4.0
