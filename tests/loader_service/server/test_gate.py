"""The gate's answers, asked over ZAP as libzmq asks, and what it counts and logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import zmq
from zmq.utils import z85

from loader_service.server.gate import Gate
from stoker_proto.wire.keys import Key

RANK, STRANGER = bytes(range(32)), bytes(32)


class Asked:
    """A gate, and a socket that asks as libzmq would."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.router = context.socket(zmq.ROUTER)
        self.gate = Gate(context, self.router, Key("loader", zmq.curve_keypair()[1]), {z85.encode(RANK): "rank-0"})
        self.peer = context.socket(zmq.REQ)
        self.peer.linger = 0
        self.peer.connect("inproc://zeromq.zap.01")

    def ask(self, *credentials: bytes, mechanism: bytes = b"CURVE") -> list[bytes]:
        self.peer.send_multipart([b"1.0", b"7", b"stoker", b"10.0.0.9", b"", mechanism, *credentials])
        assert self.gate.zap.poll(20_000)
        self.gate.look()
        assert self.peer.poll(20_000)
        return self.peer.recv_multipart()


@pytest.fixture
def asked() -> Iterator[Asked]:
    with zmq.Context() as context:
        it = Asked(context)
        yield it
        it.gate.close()
        it.router.close(0)
        it.peer.close(0)


def test_a_listed_key_is_admitted_by_name(asked: Asked) -> None:
    assert asked.ask(RANK) == [b"1.0", b"7", b"200", b"OK", b"rank-0", b""]
    assert asked.gate.refused == 0


def test_an_unknown_key_is_refused_and_named(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    assert asked.ask(STRANGER)[2] == b"400"
    assert asked.gate.refused == 1
    (record,) = caplog.records
    assert record.getMessage() == (
        f"refused connection 1, from 10.0.0.9: its public key {z85.encode(STRANGER).decode()} is not in "
        "cluster.security.allowed_ranks"
    )


@pytest.mark.parametrize(
    ("credentials", "mechanism"), [((), b"NULL"), ((b"me", b"secret"), b"PLAIN"), ((), b"CURVE"), ((RANK,), b"GSSAPI")]
)
def test_other_mechanisms_are_refused(asked: Asked, credentials: tuple[bytes, ...], mechanism: bytes) -> None:
    assert asked.ask(*credentials, mechanism=mechanism)[2] == b"400"
    assert asked.gate.refused == 1


def test_many_refusals_are_all_counted_and_few_are_logged(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(1000):
        asked.ask(STRANGER)
    assert asked.gate.refused == 1000
    assert len(caplog.records) == 20
    assert "refused connection 1000" in caplog.records[-1].getMessage()
    asked.ask(mechanism=b"NULL")  # a rank without a key, while the stranger goes on
    assert caplog.records[-1].getMessage() == "refused connection 1001, from 10.0.0.9: it brought no CURVE key"
