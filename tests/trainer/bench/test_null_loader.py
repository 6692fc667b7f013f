"""The null loader between a rank's socket and a fake loader: stored pieces, under the numbers of new tickets."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import zmq

from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Message, Piece, Ping, Pong, Ticket
from tests.trainer.feed.fake_loader import FakeLoader
from trainer.bench.null_loader import NullLoader

DEADLINE_MS = 60_000


class Rank:
    """Asks one thing after the other."""

    def __init__(self, address: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def ask(self, message: Message) -> Message:
        self.socket.send(encoding.encode(message))
        assert self.socket.poll(DEADLINE_MS)
        return encoding.decode(self.socket.recv())

    def piece(self, number: int, count: int) -> Piece:
        ticket = Ticket(ticket=number, split="train", epoch=0, lane=0, start=0, count=count)
        answer = self.ask(ticket)
        assert isinstance(answer, Piece)
        return answer


@pytest.fixture
def real() -> Iterator[FakeLoader]:
    with FakeLoader() as loader:
        yield loader


@pytest.fixture(params=[0.0, 200.0])
def rank(real: FakeLoader, request: pytest.FixtureRequest) -> Iterator[Rank]:
    with NullLoader(real.address, rows_per_s=request.param) as null:
        rank = Rank(null.address)
        yield rank
        rank.socket.close()
        rank.context.term()


@pytest.mark.long
def test_after_eight_pieces_the_real_loader_is_left_alone(real: FakeLoader, rank: Rank) -> None:
    numbers = [*range(20), 300, 70_000]  # in one, three and five bytes
    pieces = [rank.piece(number, count=3) for number in numbers]
    assert [piece.ticket for piece in pieces] == numbers
    assert [ticket.ticket for ticket in real.tickets] == list(range(8))
    assert [piece.input_ids.tolist() for piece in pieces[8:16]] == [p.input_ids.tolist() for p in pieces[:8]]
    assert rank.piece(5, count=2).num_rows == 2
    assert real.tickets[-1].count == 2
    assert isinstance(rank.ask(Ping(nonce=9)), Pong)


@pytest.mark.long
def test_a_speed_is_an_upper_bound(real: FakeLoader) -> None:
    with NullLoader(real.address, rows_per_s=20.0) as null:
        rank = Rank(null.address)
        began = time.monotonic()
        for number in range(10):
            rank.piece(number, count=2)
        assert time.monotonic() - began >= 0.99
        rank.socket.close()
        rank.context.term()
