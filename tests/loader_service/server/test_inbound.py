"""What ranks send that a loader has not looked at: bounded by its socket, before any of it is decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from loader_service.server.pool import InlinePool
from loader_service.server.served import Served
from loader_service.server.server import MAX_UNHEARD, LoaderServer
from stoker_proto.wire.encoding import MAX_QUESTION_BYTES
from tests.end_to_end.faults.zmtp import PING, RawPeer
from tests.trainer.feed.fake_loader import make_config

MIB = 1 << 20
pytestmark = pytest.mark.process  # a relay, where the kernel does not let the loader drop resets


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a loader that is bound, and so busy that it looks at nothing."""
    with zmq.Context() as context:
        served = Served(make_config(["tcp://nobody:1"]), {}, {}, "{}", {}, "busy")
        server = LoaderServer(served, tmp_path, InlinePool(tmp_path, 1), context)
        with contextlib.closing(server):
            yield server.bind("tcp://127.0.0.1:*")


def test_what_is_not_looked_at_waits_with_the_rank(address: str) -> None:
    with RawPeer(address) as peer:
        peer.shake_hands()
        peer.socket.settimeout(1.0)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 4 * MAX_UNHEARD:
                peer.send(bytes(MIB // 2))
                sent += 1
    assert MAX_UNHEARD // 2 < sent < 2 * MAX_UNHEARD  # and what the kernel's buffers take


def goes_on(peer: RawPeer) -> bool:
    """Whether a ZMTP PING is answered, and not hung up on."""
    found = b""
    with contextlib.suppress(ConnectionError):
        peer.socket.sendall(PING)
        while more := peer.socket.recv(4096):
            found += more
            if b"PONG" in found:
                return True
    return False


def test_a_question_larger_than_any_rank_asks_ends_the_connection(address: str) -> None:
    with RawPeer(address) as peer:
        peer.shake_hands()
        peer.send(bytes(MAX_QUESTION_BYTES))
        assert goes_on(peer)
        with contextlib.suppress(ConnectionError):
            peer.send(bytes(MAX_QUESTION_BYTES + 1))
        assert not goes_on(peer)
