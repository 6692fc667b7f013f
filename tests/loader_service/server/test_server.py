"""What a live loader answers to messages that no honest rank sends, and to one that does: over a raw socket."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Drain, Epoch, Failure, Hello, Lanes, Message, Ping, Pong, Refuse, Ticket, Welcome
from tests.end_to_end.fleet import Loader, serving, wait_until, write_config, write_demonstrations
from tests.tiny_models import write_model_folder

pytestmark = pytest.mark.process

HELLO = Hello(protocol=PROTOCOL_VERSION, client="test", rank=0, world_size=1, fingerprints={})
TICKET = Ticket(ticket=5, split="train", epoch=0, lane=0, start=0, count=1)


class Peer:
    """A bare DEALER."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def send(self, message: Message | bytes) -> None:
        self.socket.send(message if isinstance(message, bytes) else encoding.encode(message))

    def receive(self) -> Message:
        assert self.socket.poll(60_000), "no answer"
        return encoding.decode(self.socket.recv())

    def ask(self, message: Message) -> Message:
        self.send(message)
        return self.receive()


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    folder = tmp_path_factory.mktemp("server")
    with serving(_config(folder)) as running:
        yield running


def _config(folder: Path, **data: Any) -> Path:
    (folder / "model").mkdir()
    jsonl = write_demonstrations(folder / "demos", [4] * 6)
    return write_config(folder, write_model_folder(folder / "model"), [jsonl], **data)


@contextmanager
def peer_of(loader: Loader) -> Iterator[Peer]:
    with zmq.Context() as context:
        peer = Peer(context, loader.address)
        try:
            yield peer
        finally:
            peer.socket.close(0)


def test_an_honest_rank_gets_what_it_asks_for(loader: Loader) -> None:
    with peer_of(loader) as peer:
        welcome = peer.ask(HELLO)
        assert isinstance(welcome, Welcome)
        assert welcome.held == {"train": [0], "val": []}
        assert welcome.num_samples["train"] == 24
        lanes = peer.ask(Epoch(split="train", epoch=0, entries=[0, 7]))
        assert isinstance(lanes, Lanes)
        assert sum(lanes.lengths[0]) == 24
        piece = peer.ask(TICKET)
        assert piece.ticket == 5  # type: ignore[union-attr]
        pong = peer.ask(Ping(nonce=3))
        assert isinstance(pong, Pong)
        assert pong.nonce == 3
        assert pong.progress["samples"] >= 1


def test_a_worker_that_dies_says_of_what(tmp_path: Path) -> None:
    with serving(_config(tmp_path), "--set", "loader.workers=2") as loader, peer_of(loader) as peer:
        assert isinstance(peer.ask(HELLO), Welcome)
        workers = psutil.Process(loader.process.pid).children()
        worker = next(process for process in workers if process.cmdline()[-2] == "0")  # that of lane 0
        worker.suspend()  # so that the ticket is in work when it dies
        peer.send(TICKET)
        while not peer.ask(Ping(nonce=1)).progress["queued"]:  # type: ignore[union-attr]
            pass
        worker.kill()
        assert peer.receive() == Failure(ticket=5, reason="died", message="worker 0 died and is being restarted")


@pytest.mark.parametrize(
    ("hello", "name"),
    [
        (replace(HELLO, protocol=PROTOCOL_VERSION + 1), "protocol"),
        (replace(HELLO, fingerprints={"tokenizer": "another"}), "tokenizer"),
        (replace(HELLO, fingerprints={"manifest/train/0": "another"}), "manifest/train/0"),
    ],
)
def test_a_rank_that_differs_is_refused_and_gets_nothing(loader: Loader, hello: Hello, name: str) -> None:
    with peer_of(loader) as peer:
        refusal = peer.ask(hello)
        assert isinstance(refusal, Refuse)
        (difference,) = refusal.differences
        assert difference[0] == name
        assert difference[2] in ("another", str(PROTOCOL_VERSION + 1))
        peer.send(TICKET)  # not admitted: no answer to this ...
        assert isinstance(peer.ask(HELLO), Welcome)  # ... the next answer is to this


@pytest.mark.parametrize(
    ("ticket", "reason"),
    [
        (replace(TICKET, start=10_000), "rejected"),
        (replace(TICKET, count=10_000), "rejected"),
        (replace(TICKET, count=0), "rejected"),
        (replace(TICKET, start=-1), "rejected"),
        (replace(TICKET, lane=4 * 7), "unavailable"),
        (replace(TICKET, split="val"), "unavailable"),
    ],
)
def test_impossible_tickets_are_answered_and_cost_nothing(loader: Loader, ticket: Ticket, reason: str) -> None:
    with peer_of(loader) as peer:
        peer.ask(HELLO)
        failure = peer.ask(ticket)
        assert isinstance(failure, Failure)
        assert (failure.ticket, failure.reason) == (5, reason)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"T",
        b"?????",
        b"T\xc1",
        b"P" + b"\x80",
        b"H" + b"\xdf\xff\xff\xff\xff",
        bytes(2000),
        encoding.encode(Drain(loader="x")),
    ],
)
def test_garbage_is_dropped_and_the_loader_goes_on(loader: Loader, garbage: bytes) -> None:
    with peer_of(loader) as peer:
        peer.ask(HELLO)
        before = peer.ask(Ping(nonce=1))
        peer.send(garbage)
        after = peer.ask(Ping(nonce=2))
        assert isinstance(before, Pong)
        assert isinstance(after, Pong)
        assert after.progress["rejected"] == before.progress["rejected"] + 1


def test_what_a_rank_asked_for_before_it_went_is_no_strangers(loader: Loader) -> None:
    """It ended in mid-epoch: what it had asked for lies in the loader's queue, whose first answer says that nobody is there."""
    with peer_of(loader) as other:
        other.ask(HELLO)
        before = other.ask(Ping(nonce=1))
        for _ in range(10):
            with peer_of(loader) as peer:
                peer.ask(HELLO)
                for number in range(300):
                    peer.send(replace(TICKET, ticket=number))
                peer.receive()
        after = other.ask(Ping(nonce=2))
        assert isinstance(before, Pong)
        assert isinstance(after, Pong)
        assert after.progress["rejected"] == before.progress["rejected"]
        assert other.ask(TICKET).ticket == TICKET.ticket  # type: ignore[union-attr]


def test_sigterm_says_drain_and_ends(tmp_path: Path) -> None:
    with serving(_config(tmp_path)) as loader, peer_of(loader) as peer:
        peer.ask(HELLO)
        loader.process.send_signal(signal.SIGTERM)
        assert isinstance(peer.receive(), Drain)
        assert loader.process.wait(60) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_read_that_hangs_in_the_file_system_does_not_stop_sigterm(workers: int, tmp_path: Path) -> None:
    """As on a network file system whose server is gone: the kernel gives the read back to nobody."""
    pipe = tmp_path / "pipe"
    kind = "tests.loader_service.dataset_classes:Hanging"
    config = _config(tmp_path, dataset_type=kind, options={"pipe": str(pipe)})
    options = "--set", f"loader.workers={workers}", "--drain-timeout", "1"
    with serving(config, *options) as loader, peer_of(loader) as peer:
        peer.ask(HELLO)
        assert isinstance(peer.ask(Epoch(split="train", epoch=0, entries=[0])), Lanes)
        os.mkfifo(pipe)
        peer.send(TICKET)
        wait_until(lambda: pipe.with_suffix(".opened").exists(), 60, "nothing was read")
        loader.process.send_signal(signal.SIGTERM)
        assert isinstance(peer.receive(), Drain)
        assert loader.process.wait(60) == 0
