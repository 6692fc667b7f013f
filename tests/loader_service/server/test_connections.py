"""Connections below their limit: the oldest strangers go, admitted ranks stay."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest
import zmq

from loader_service.server.connections import Connections, descriptor_of
from tests.end_to_end.fleet import wait_until

MOST = 6


class Front:
    """A ROUTER whose connections are watched."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.context = context
        self.router = context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.connections = Connections(self.router, MOST)
        self.port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.plain: list[socket.socket] = []
        self.ranks: list[zmq.Socket[bytes]] = []

    def see(self, count: int) -> None:
        def seen() -> bool:
            self.connections.look()
            return len(self.connections) == count

        wait_until(seen, 20, f"{count} connections")

    def stranger(self) -> socket.socket:
        self.plain.append(socket.create_connection(("127.0.0.1", self.port), timeout=20))
        return self.plain[-1]

    def rank(self) -> tuple[zmq.Socket[bytes], bytes]:
        """Admitted; its socket and its address."""
        rank = self.context.socket(zmq.DEALER)
        rank.linger = 0
        rank.connect(f"tcp://127.0.0.1:{self.port}")
        self.ranks.append(rank)
        rank.send(b"hello")
        assert self.router.poll(20_000)
        address, message = self.router.recv_multipart(copy=False)
        self.connections.admit(address.bytes, descriptor_of(message))
        return rank, address.bytes

    def answers(self, rank: zmq.Socket[bytes], address: bytes) -> bool:
        self.router.send_multipart([address, b"well"])
        return bool(rank.poll(20_000)) and rank.recv() == b"well"


@pytest.fixture
def front() -> Iterator[Front]:
    with zmq.Context() as context:
        it = Front(context)
        yield it
        for one in (*it.plain, *it.ranks):
            one.close()
        it.connections.close()
        it.router.close(0)


def is_closed(one: socket.socket) -> bool:
    """It gets a greeting, and then the end."""
    while select.select([one], [], [], 20)[0]:
        try:
            if not one.recv(4096):
                return True
        except OSError:
            return True
    return False


def is_open(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        while one.recv(4096):
            pass
    except BlockingIOError:
        return True
    return False


def test_the_oldest_strangers_give_way_and_ranks_stay(front: Front) -> None:
    first = front.stranger()
    front.see(1)
    ranks = [front.rank() for _ in range(3)]
    strangers = [front.stranger() for _ in range(2)]
    front.see(MOST)
    assert front.connections.num_closed == 0
    front.stranger()
    wait_until(lambda: front.connections.look() == [] and front.connections.num_closed == 1, 20, "one that gives way")
    assert is_closed(first)
    assert all(is_open(one) for one in strangers)
    for _ in range(2 * MOST):
        front.stranger()
    wait_until(lambda: front.connections.look() == [] and front.connections.num_closed == 13, 20, "all the others")
    assert all(is_closed(one) for one in strangers)
    assert all(front.answers(*rank) for rank in ranks)
    assert is_open(front.plain[-1])


def test_where_all_are_ranks_who_comes_next_is_closed(front: Front) -> None:
    ranks = [front.rank() for _ in range(MOST)]
    assert front.connections.num_strangers == 0
    last = front.stranger()
    wait_until(lambda: front.connections.look() == [] and front.connections.num_closed == 1, 20, "the last one's end")
    assert is_closed(last)
    assert all(front.answers(*rank) for rank in ranks)


def test_who_hangs_up_or_is_forgotten_counts_no_more_as_a_rank(front: Front) -> None:
    (rank, address), (_, other) = front.rank(), front.rank()
    assert (len(front.connections), front.connections.num_strangers) == (2, 0)
    front.connections.forget(other)
    front.connections.forget(b"nobody")
    assert (len(front.connections), front.connections.num_strangers) == (2, 1)
    rank.close()
    front.see(1)
    front.connections.forget(address)
    assert (len(front.connections), front.connections.num_strangers) == (1, 1)


def test_events_of_others_are_given_back(caplog: pytest.LogCaptureFixture) -> None:
    with zmq.Context() as context:
        router = context.socket(zmq.ROUTER)
        connections = Connections(router, MOST, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        socket.create_connection(("127.0.0.1", port), timeout=20).close()
        found: list[int] = []
        wait_until(lambda: found.extend(event for event, _ in connections.look()) or found, 20, "the failed handshake")
        assert found == [zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL]
        connections.close()
        router.close(0)
