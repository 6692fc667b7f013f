"""What --bind may say, what is bound then, and resets that do not arrive."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from pathlib import Path

import pytest
import zmq

from loader_service.server import listening
from loader_service.server.listening import can_drop_resets, is_loopback, listen, parse_bind
from loader_service.server.pool import InlinePool
from loader_service.server.served import Served
from loader_service.server.server import LoaderServer
from stoker_proto.errors import ConfigError, StokerError
from tests.end_to_end.faults.zmtp import RawPeer
from tests.trainer.feed.fake_loader import make_config


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("tcp://127.0.0.1:5555", "127.0.0.1", 5555),
        ("tcp://127.0.0.1:*", "127.0.0.1", 0),
        ("tcp://*:5555", "", 5555),
        ("tcp://[::1]:7", "::1", 7),
        ("tcp://node-3.cluster:65535", "node-3.cluster", 65535),
    ],
)
def test_one_host_and_one_port(address: str, host: str, port: int) -> None:
    assert parse_bind(address) == (host, port)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:0;0.0.0.0:5601",
        "tcp://127.0.0.1:5555;tcp://*:5555",
        "tcp://127.0.0.1:5555/0.0.0.0",
        "tcp://127.0.0.1@0.0.0.0:5555",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:5555\n",
        "tcp://127.0.0.1",
        "tcp://:5555",
        "tcp://::1:5555",
        "ipc:///tmp/socket",
        "127.0.0.1:5555",
        "",
    ],
)
def test_anything_else_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"write one tcp://HOST:PORT"):
        parse_bind(address)
    with pytest.raises(ConfigError, match=r"write one tcp://HOST:PORT"):
        listen(address)


def test_what_can_be_no_name_is_one_line() -> None:
    with pytest.raises(StokerError, match=r"--bind tcp://a\.\.b:5555: .*'a\.\.b' is no name of a host"):
        listen("tcp://a..b:5555")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.8.9.10", "::1", "localhost")],
        *[(host, False) for host in ("", "0.0.0.0", "::", "10.0.0.1", "127.example.org", "localhost.example.org")],
    ],
)
def test_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_what_was_asked_for_is_bound() -> None:
    with listen("tcp://localhost:*") as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(StokerError, match="choose a free port"):
            listen(f"tcp://127.0.0.1:{port}")


@pytest.mark.long
@pytest.mark.skipif(not can_drop_resets(), reason="the kernel lets only CAP_NET_ADMIN drop resets")
def test_a_reset_does_not_arrive_and_an_orderly_end_does() -> None:
    with listen("tcp://127.0.0.1:*") as listener, contextlib.ExitStack() as stack:
        ends = []
        for _ in range(2):
            peer = stack.enter_context(socket.create_connection(listener.getsockname()))
            here = stack.enter_context(listener.accept()[0])
            peer.sendall(b"before")
            ends.append((peer, here))
        (orderly, first), (resetting, second) = ends
        orderly.close()
        resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        resetting.close()
        for here in (first, second):
            assert here.recv(6) == b"before"
        first.settimeout(10)
        assert first.recv(6) == b""
        second.settimeout(0.5)
        with pytest.raises(TimeoutError):  # without the filter: ConnectionResetError
            second.recv(6)


@pytest.mark.process
def test_a_kernel_that_refuses_the_filter_does_not_keep_the_loader_from_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux 6.18 does to a process without CAP_NET_ADMIN, a container of Compose for example."""

    def refuse(_: socket.socket) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(listening, "_drop_resets", refuse)
    assert not can_drop_resets()
    with zmq.Context() as context:
        served = Served(make_config(["tcp://nobody:1"]), {}, {}, "{}", {}, "unprivileged")
        server = LoaderServer(served, tmp_path, InlinePool(tmp_path, 1), context)
        with contextlib.closing(server):
            address = server.bind("tcp://127.0.0.1:*")
            assert address.startswith("tcp://127.0.0.1:")
            with RawPeer(address) as peer:
                peer.shake_hands()  # ZeroMQ answers through the relay
