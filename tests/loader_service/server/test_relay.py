"""What passes between ranks and ZeroMQ, and what does not: a reset."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader_service.server.relay import Relay

MIB = 1 << 20


class Ends:
    """A relay with ZeroMQ's place taken by a plain Unix socket."""

    def __init__(self, folder: Path) -> None:
        self.inner = socket.socket(socket.AF_UNIX)
        self.inner.bind(str(folder / "ranks"))
        self.inner.listen()
        self.inner.settimeout(20)
        listener = socket.create_server(("127.0.0.1", 0))
        self.place = listener.getsockname()
        self.relay = Relay(listener, folder / "ranks")
        self.thread = threading.Thread(target=self.relay.run)
        self.thread.start()

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """(the rank's end, ZeroMQ's end)."""
        outer = socket.create_connection(self.place, timeout=20)
        inner, _ = self.inner.accept()
        inner.settimeout(20)
        return outer, inner


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    made = Ends(tmp_path)
    yield made
    made.relay.close(linger_s=0)
    made.thread.join(20)
    assert not made.thread.is_alive()
    made.inner.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(made.place)


def reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def read_all(end: socket.socket) -> bytes:
    found = bytearray()
    while data := end.recv(MIB):
        found += data
    return bytes(found)


@pytest.mark.long
def test_both_directions_pass_whole_whatever_the_pace(ends: Ends) -> None:
    """32 MiB each way at once, more than all buffers between hold. The readers start when the writers stand still."""
    chance, found = random.Random(1), {}
    pairs = [ends.connect()]
    sent = {(i, side): chance.randbytes(32 * MIB) for i in range(1) for side in range(2)}

    def write(number: int, side: int) -> None:
        pairs[number][side].sendall(sent[number, side])

    def read(number: int, side: int) -> None:
        data = bytearray()
        while len(data) < 32 * MIB:
            data += pairs[number][side].recv(MIB)
        found[number, side] = hashlib.sha256(data).digest()

    writers = [threading.Thread(target=write, args=key) for key in sent]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join(0.2)
        assert thread.is_alive(), "nothing holds a writer back"
    readers = [threading.Thread(target=read, args=key) for key in sent]
    for thread in readers:
        thread.start()
    for thread in [*writers, *readers]:
        thread.join(60)
        assert not thread.is_alive()
    assert {(i, 1 - side): hashlib.sha256(data).digest() for (i, side), data in sent.items()} == found
    for pair in pairs:
        for end in pair:
            end.close()


def test_a_reset_arrives_as_an_orderly_end_and_what_is_still_written_is_dropped(ends: Ends) -> None:
    outer, inner = ends.connect()
    outer.sendall(b"before")
    assert inner.recv(6) == b"before"
    reset(outer)
    assert inner.recv(1) == b""
    inner.sendall(bytes(4 * MIB))  # more than all buffers between hold: somebody reads it
    inner.close()
    other, another = ends.connect()
    with other, another:
        other.sendall(b"next")
        assert another.recv(4) == b"next"


@pytest.mark.long
def test_a_reset_waits_until_what_came_before_it_is_read(ends: Ends) -> None:
    """As where ZeroMQ's input stands still."""
    outer, inner = ends.connect()
    outer.settimeout(0.5)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 64 * MIB:
            sent += outer.send(bytes(MIB))
    assert sent < 64 * MIB, "nothing holds a writer back"
    reset(outer)
    with inner:
        found = read_all(inner)
    assert 0 < len(found) <= sent
    assert not any(found)


@pytest.mark.long
def test_no_connection_is_accepted_while_many_that_were_reset_are_still_read(ends: Ends) -> None:
    """Peers that flood, reset and come again do not fill ZeroMQ with what is left of them."""
    with contextlib.ExitStack() as open_ones:
        left = []
        for _ in range(16):
            outer, inner = ends.connect()
            left.append(open_ones.enter_context(inner))
            outer.sendall(bytes(64))
            reset(outer)
        another = open_ones.enter_context(socket.create_connection(ends.place, timeout=20))  # the kernel queues it
        ends.inner.settimeout(1)
        with pytest.raises(TimeoutError):
            ends.inner.accept()
        ends.inner.settimeout(20)
        for inner in left:
            assert len(read_all(inner)) <= 64  # less where the reset came before the relay had read them
            inner.close()
        inner = open_ones.enter_context(ends.inner.accept()[0])
        another.sendall(b"now")
        assert inner.recv(3) == b"now"


def test_the_last_bytes_of_an_ended_connection_arrive(ends: Ends) -> None:
    outer, inner = ends.connect()
    writer = threading.Thread(target=lambda: (inner.sendall(bytes(6 * MIB)), inner.close()))
    writer.start()
    with outer:
        assert len(read_all(outer)) == 6 * MIB
    writer.join(20)


def test_without_anybody_behind_it_a_connection_is_closed(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    ends.inner.close()
    with socket.create_connection(ends.place, timeout=20) as outer:
        assert outer.recv(1) == b""
    with socket.create_connection(ends.place, timeout=20) as outer:
        assert outer.recv(1) == b""
    assert caplog.messages == ["a connection could not be passed on: [Errno 111] Connection refused; 0 are open"], (
        "said once, not for each connection"
    )


def test_without_descriptors_a_connection_is_closed_and_the_next_one_passes(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(ends.relay, "_connect", fail)
        with socket.create_connection(ends.place, timeout=20) as outer:
            assert outer.recv(1) == b""
    outer, inner = ends.connect()
    with outer, inner:
        outer.sendall(b"next")
        assert inner.recv(4) == b"next"
