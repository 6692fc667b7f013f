"""G10: no peer can end a loader, and what one sends costs the others little, however much it is and however it ends.

libzmq aborts its process when a connection whose input stands still is reset and it then sends a heartbeat or answers a PING
on it (zeromq/libzmq#4767). So these peers send more than the loader can look at, and reset their connections in the midst of it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Epoch, Hello, Ticket
from tests.end_to_end.faults.conftest import Arena
from tests.end_to_end.faults.crew import Crew, peak_rss, rss_bytes
from tests.end_to_end.faults.zmtp import PING, RawPeer, frame
from tests.end_to_end.fleet import pull

MIB = 1 << 20
ATTACK_S = 4.0
"""Longer than the heartbeats' time-out (1.5 s) and a rank's time to live (3 s)."""
MOST_GROWTH_MIB = 260
"""Of a loader that was not flooded before: 16 messages of 0.9 MiB of each of 8 peers, 64 MiB of other messages that wait, and
what an honest epoch needs. Without limits, 70 messages of each peer are 480 MiB, and more in each round."""
HELLO = encoding.encode(Hello(protocol=PROTOCOL_VERSION, client="c", rank=0, world_size=1, fingerprints={}))
UNKNOWN_FIELDS = b"H" + msgpack.packb({f"unknown{number:05d}": number for number in range(57_000)})
TICKETS = [encoding.encode(Ticket(ticket=n, split="train", epoch=0, lane=n % 4, start=0, count=1)) for n in range(1000)]


@pytest.fixture(scope="module")
def crew(arena: Arena) -> Iterator[Crew]:
    """One loader of its own, warm."""
    with Crew(arena.config, 1) as crew:
        pull(arena.config, crew.addresses)
        yield crew


def send_unknown_fields(peer: RawPeer) -> None:
    """70 messages of 900 KB, none of whose fields there is."""
    for _ in range(70):
        peer.send(UNKNOWN_FIELDS)


def ask_and_never_read(peer: RawPeer) -> None:
    """Honest tickets without end, with the heartbeats of an honest rank; the answers stay unread."""
    peer.send(HELLO, encoding.encode(Epoch(split="train", epoch=0, entries=[0])))
    deadline = time.monotonic() + ATTACK_S / 2
    bundle = b"".join(map(frame, TICKETS)) + PING
    with contextlib.suppress(TimeoutError):  # the loader has enough of it: it waits for its turn
        while time.monotonic() < deadline:
            peer.socket.sendall(bundle)
    time.sleep(max(0.0, deadline - time.monotonic()))


def send_empty_messages(peer: RawPeer) -> None:
    """The smallest message there is, up to 600,000 times, with PINGs among them."""
    bundle = frame(b"") * 4000 + PING
    deadline = time.monotonic() + ATTACK_S / 2
    for _ in range(150):
        if time.monotonic() > deadline:  # the loader takes them slowly
            return
        peer.socket.sendall(bundle)


@pytest.mark.parametrize("attack", [send_unknown_fields, ask_and_never_read, send_empty_messages])
@pytest.mark.parametrize("num_peers", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_flood_of_messages(arena: Arena, crew: Crew, attack: Callable[[RawPeer], None], num_peers: int) -> None:
    """Each floods, is reset, and comes again, for longer than heartbeats wait. An honest rank is served meanwhile."""
    assert len(UNKNOWN_FIELDS) > 880_000
    pid, over = crew.pid(0), threading.Event()
    before, rss = rss_bytes(pid), [0]
    rounds = [0] * num_peers

    def flood(number: int) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # the loader hung up, or does not take more
                peer = RawPeer(crew.addresses[0])
                try:
                    peer.socket.settimeout(2)
                    peer.shake_hands()
                    with contextlib.suppress(OSError):
                        attack(peer)
                    rounds[number] += 1
                finally:
                    peer.vanish()

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(num_peers)]
    threads.append(threading.Thread(target=lambda: rss.extend(peak_rss(pid, over))))
    for thread in threads:
        thread.start()
    try:
        began = time.monotonic()
        while time.monotonic() < began + ATTACK_S or (not all(rounds) and time.monotonic() < began + 60):
            assert pull(arena.config, crew.addresses).steps == arena.expected.steps
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert all(rounds), rounds
    assert pull(arena.config, crew.addresses).steps == arena.expected.steps
    assert crew.pid(0) == pid
    assert (max(rss) - before) / MIB < MOST_GROWTH_MIB


def test_peers_that_flood_and_come_again_do_not_pile_up(arena: Arena, crew: Crew) -> None:
    """ZeroMQ gives each connection of which something is unread a turn: an honest rank would get one in thousands."""
    over, most, rounds = threading.Event(), [0], [0] * 8
    descriptors = Path(f"/proc/{crew.pid(0)}/fd")

    def come_again(number: int) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):  # it has to wait
                peer = RawPeer(crew.addresses[0])
                try:
                    peer.socket.settimeout(2)
                    peer.shake_hands()
                    peer.socket.sendall(frame(b"") * 30_000)
                    rounds[number] += 1
                finally:
                    peer.vanish()

    threads = [threading.Thread(target=come_again, args=(number,)) for number in range(len(rounds))]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + ATTACK_S
        while time.monotonic() < deadline:
            most.append(len(list(descriptors.iterdir())))
            time.sleep(0.01)
        assert pull(arena.config, crew.addresses).steps == arena.expected.steps
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert sum(rounds) > 8, rounds
    assert max(most) < 1200  # 3,000 where nothing holds them back


def test_a_peer_that_stops_reading_and_is_reset_later(arena: Arena, crew: Crew) -> None:
    """Its answers fill all buffers, its questions stand in the queue; its connection lasts longer than heartbeats wait."""
    with RawPeer(crew.addresses[0]) as peer:
        peer.shake_hands()
        peer.socket.settimeout(1)
        with contextlib.suppress(OSError):
            ask_and_never_read(peer)
        deadline = time.monotonic() + ATTACK_S
        while time.monotonic() < deadline:
            assert pull(arena.config, crew.addresses).steps == arena.expected.steps
        peer.vanish()
    assert pull(arena.config, crew.addresses).steps == arena.expected.steps
