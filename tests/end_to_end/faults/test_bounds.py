"""G7: what a client does, or does not do, never makes a loader larger than PROTOCOL.md says."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Epoch, Failure, Hello, Lanes, Message, Piece, Ping, Pong, Refuse, Ticket, Welcome
from tests.end_to_end.faults.crew import Crew, num_fds, rss_bytes
from tests.end_to_end.faults.zmtp import PING, PING_TO_LIVE, RawPeer
from tests.end_to_end.fleet import pull, wait_until, write_config, write_demonstrations
from tests.tiny_models import write_model_folder

MIB = 1 << 20
UNREAD_MB, CACHE_MB = 64, 32
LENGTHS = [16] * 40
LANE = sum(LENGTHS) // 4
PIECE_BYTES = LANE * 224 * 224 * 3
"""A whole lane in one piece: 160 samples of 147 KiB, 23 MiB."""
RECORDS_MIB = sum(LENGTHS) * 224 * 224 * 3 / MIB
MOST_MIB = UNREAD_MB + CACHE_MB + 32 + RECORDS_MIB + 7 * PIECE_BYTES / MIB
"""PROTOCOL.md, *Bounds*: unread, cache, 32 MiB waiting for the front, the records that tickets wait for (here all there are), two
pieces for each of 3 threads and one above a limit. Without limits, 60 pieces for one client are 1,380 MiB."""
HELLO = encoding.encode(Hello(protocol=PROTOCOL_VERSION, client="c", rank=0, world_size=1, fingerprints={}))


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """A loader of large samples with small limits."""
    folder = tmp_path_factory.mktemp("bounds")
    (folder / "model").mkdir()
    model = write_model_folder(folder / "model", image_size=224)
    jsonl = write_demonstrations(folder / "demos", LENGTHS)
    config = write_config(folder, model, [jsonl], image={"transport": "pixels"})
    limits = f"loader.unread_mb={UNREAD_MB}", f"loader.cache_mb={CACHE_MB}"
    with Crew(config, 1, *[f"--set={limit}" for limit in limits]) as crew:
        pull(config, crew.addresses)  # so that what it needs for honest work is there already
        yield crew


def tickets(count: int, *, samples: int = LANE, first: int = 0) -> list[bytes]:
    """Tickets for lanes 0 to 3 in turn, each from the lane's start."""
    return [
        encoding.encode(Ticket(ticket=first + i, split="train", epoch=0, lane=i % 4, start=0, count=samples))
        for i in range(count)
    ]


class Reader:
    """An honest connection."""

    def __init__(self, stack: ExitStack, address: str) -> None:
        context = stack.enter_context(zmq.Context())
        self.socket = context.socket(zmq.DEALER)
        stack.callback(self.socket.close, 0)
        self.socket.connect(address)
        self.socket.send(HELLO)
        assert isinstance(self.receive(), Welcome)

    def receive(self) -> Message:
        assert self.socket.poll(60_000), "no answer"
        return encoding.decode(self.socket.recv())

    def counters(self) -> dict[str, float]:
        self.socket.send(encoding.encode(Ping(nonce=1)))
        answer = self.receive()
        assert isinstance(answer, Pong)
        return answer.progress


def peak_while_not_reading(crew: Crew, num_peers: int, num_tickets: int, samples: int = LANE) -> tuple[float, float]:
    """MiB that the loader grew at most while so many peers asked and did not read; answers that it dropped."""
    with ExitStack() as stack:
        reader = Reader(stack, crew.addresses[0])
        before, counters = rss_bytes(crew.pid(0)), reader.counters()
        peers = [stack.enter_context(RawPeer(crew.addresses[0])) for _ in range(num_peers)]
        for peer in peers:
            peer.shake_hands()
            peer.send(
                HELLO,
                encoding.encode(Epoch(split="train", epoch=0, entries=[0])),
                *tickets(num_tickets, samples=samples),
            )
        highest, total = 0, num_peers * num_tickets * samples

        def all_answered() -> bool:
            nonlocal highest
            highest = max(highest, rss_bytes(crew.pid(0)))
            for peer in peers:
                peer.socket.sendall(PING)
            now = reader.counters()
            return now["samples"] - counters["samples"] >= total and now["queued"] == 0

        wait_until(all_answered, 300, f"pieces of {total} samples to be built, and to be sent or dropped")
        return (highest - before) / MIB, reader.counters()["dropped"] - counters["dropped"]


def test_a_client_that_never_reads(crew: Crew) -> None:
    """Of 60 pieces of 23 MiB that are built for it one is kept: two would be more than a quarter of loader.unread_mb."""
    grown_mib, dropped = peak_while_not_reading(crew, 1, 60)
    assert dropped == 59
    assert grown_mib < MOST_MIB


def test_a_client_that_never_reads_small_pieces(crew: Crew) -> None:
    """Of 120 pieces of 1.4 MiB it has 11 in its quarter, and a few that lie in the sockets' buffers; in a half it had 22."""
    _, dropped = peak_while_not_reading(crew, 1, 120, samples=10)
    assert 120 - 20 <= dropped <= 120 - 11


def test_a_client_that_is_refused_in_between_and_never_reads(crew: Crew) -> None:
    """What it has not read stays counted: of six pieces of 23 MiB, one for each time that it agrees anew, one is kept."""
    refused = encoding.encode(Hello(protocol=PROTOCOL_VERSION + 1, client="c", rank=0, world_size=1, fingerprints={}))
    with ExitStack() as stack:
        reader = Reader(stack, crew.addresses[0])
        before = reader.counters()
        peer = stack.enter_context(RawPeer(crew.addresses[0]))
        peer.shake_hands()
        for number in range(6):
            peer.send(HELLO, *tickets(1, first=number))

            def answered(number: int = number) -> bool:
                peer.socket.sendall(PING)
                now = reader.counters()
                return now["bytes_sent"] + now["dropped"] * PIECE_BYTES >= (
                    before["bytes_sent"] + before["dropped"] * PIECE_BYTES + (number + 1) * PIECE_BYTES
                )

            wait_until(answered, 30, f"an answer to ticket {number}")
            peer.send(refused)
        after = reader.counters()
    assert after["dropped"] - before["dropped"] == 5
    assert after["bytes_sent"] - before["bytes_sent"] < 2 * PIECE_BYTES


def test_a_rank_that_is_refused_gets_no_more(crew: Crew) -> None:
    with ExitStack() as stack:
        reader = Reader(stack, crew.addresses[0])
        reader.socket.send(
            encoding.encode(Hello(protocol=PROTOCOL_VERSION + 1, client="c", rank=0, world_size=1, fingerprints={}))
        )
        reader.socket.send(tickets(1, samples=1)[0])
        assert isinstance(reader.receive(), Refuse)
        reader.socket.send(HELLO)
        assert isinstance(reader.receive(), Welcome), "and nothing for the ticket"
        reader.socket.send(tickets(1, samples=1)[0])
        assert isinstance(reader.receive(), Piece)


def test_many_clients_that_never_read(crew: Crew) -> None:
    """Together they hold loader.unread_mb, not a quarter each."""
    grown_mib, dropped = peak_while_not_reading(crew, 24, 10)
    assert dropped >= 24 * 10 - 12
    assert grown_mib < MOST_MIB


def test_afterwards_memory_and_descriptors_are_given_back_and_honest_ranks_are_served(crew: Crew) -> None:
    config, pid = crew.config, crew.pid(0)
    fds = num_fds(pid)
    for _ in range(30):  # ranks that ask, and die before the answers come
        peer = RawPeer(crew.addresses[0])
        peer.shake_hands()
        peer.send(HELLO, *tickets(4, samples=8))
        peer.socket.sendall(PING_TO_LIVE)
        peer.vanish()
    wait_until(lambda: num_fds(pid) <= fds, 60, "closing the connections of ranks that are gone")
    assert len(pull(config, crew.addresses).keys) == sum(LENGTHS)


def test_a_client_that_asks_for_far_too_much(crew: Crew) -> None:
    with ExitStack() as stack:
        reader, watcher = Reader(stack, crew.addresses[0]), Reader(stack, crew.addresses[0])
        for ticket in tickets(800):
            reader.socket.send(ticket)
        refused, built = 0, 0

        def all_answered() -> bool:
            nonlocal refused, built
            while reader.socket.poll(500):  # what is built faster than it is read is dropped
                answer = encoding.decode(reader.socket.recv())
                built += isinstance(answer, Piece)
                if isinstance(answer, Failure):
                    assert answer.message.endswith(" rows of this rank are in work, of 16384")
                    refused += 1
            return refused > 0 and watcher.counters()["queued"] == 0

        wait_until(all_answered, 300, "an answer to each ticket, or its loss")
        assert refused > 100
        assert built > 0
        reader.socket.send(tickets(1, samples=16_385, first=5000)[0])
        refusal = reader.receive()
        assert isinstance(refusal, Failure)
        assert (refusal.reason, refusal.message) == ("rejected", "16385 rows at once: at most 16384 are built")
        reader.socket.send(encoding.encode(Epoch(split="train", epoch=0, entries=[0])))
        assert isinstance(reader.receive(), Lanes), "and goes on"


def test_epochs_that_nobody_trains_do_not_pile_up(crew: Crew) -> None:
    with ExitStack() as stack:
        reader = Reader(stack, crew.addresses[0])

        def ask(epochs: range) -> None:
            for epoch in epochs:
                reader.socket.send(encoding.encode(Epoch(split="train", epoch=epoch, entries=[0])))
                assert isinstance(reader.receive(), Lanes)
                reader.socket.send(
                    encoding.encode(Ticket(ticket=epoch, split="train", epoch=epoch, lane=0, start=0, count=1))
                )
                assert isinstance(reader.receive(), Piece)

        def kept() -> tuple[int, int]:
            folders = Path(tempfile.gettempdir()).glob(f"stoker-loader-{crew.pid(0)}-*")
            return num_fds(crew.pid(0)), sum(1 for folder in folders for _ in folder.iterdir())

        ask(range(10_015, 10_000, -1))  # downwards: none of them is long past when the next one comes
        descriptors, files = kept()
        assert files > 8, "the plans' files"
        ask(range(9_000, 8_900, -1))
        now = kept()
        assert now[0] <= descriptors + 20, "each plan is two mapped files"
        assert now[1] <= files + 20
