"""A loader that speaks the protocol over a real ROUTER socket and makes pieces as a pure function of their ticket.

It builds nothing from data; faults are switched on by attributes while it runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import zmq
from numpy.typing import NDArray

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.config import ClusterConfig, Config, DataConfig, FeedConfig, ModelConfig, OrderConfig, TrainerConfig
from stoker_proto.hashing import key64
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import (
    Drain,
    Epoch,
    Failure,
    Hello,
    Lanes,
    Message,
    Piece,
    Ping,
    Pong,
    Refuse,
    Ticket,
    Welcome,
)
from stoker_proto.wire.row_bits import unpack_rows

LANES, CELL = 4, 3
LENGTHS = {0: [9, 14, 0, 7], 1: [5, 11, 8, 6]}  # entry -> samples of its lanes: 60 in all
HEIGHT, WIDTH, CHUNK, DIM = 2, 3, 2, 7
FINGERPRINTS = {"tokenizer": "t1", "codec": "c1", "plan": "p1"}


class StandInDecoder:
    """The few members of the processor that a batch needs; an image's bytes are its pixels' common value."""

    pad_id = 99

    class Size:
        height, width = HEIGHT, WIDTH

    image = Size()

    def decode_image(self, data: bytes | memoryview, out: NDArray[np.uint8]) -> None:
        out[:] = data[0]


def make_piece(ticket: Ticket, loader: str) -> Piece:
    """The piece of a ticket: everything in it follows from (split, epoch, lane, position)."""
    positions = list(range(ticket.start, ticket.start + ticket.count))
    if ticket.rows:
        positions = [positions[row] for row in unpack_rows(ticket.rows, ticket.count).tolist()]
    seeds = [key64("sample", ticket.split, ticket.epoch, ticket.lane, position) for position in positions]
    lengths = np.array([3 + seed % 9 for seed in seeds], np.int32)
    input_ids = np.concatenate([np.arange(length) + seed % 50 for seed, length in zip(seeds, lengths, strict=True)])
    supervised = np.concatenate([np.arange(length) >= 2 for length in lengths])
    image_counts = np.array([seed % 3 for seed in seeds], np.uint8)
    images = [
        bytes([(seed >> 8) % 256, n]) for seed, count in zip(seeds, image_counts, strict=True) for n in range(count)
    ]
    return Piece(
        ticket=ticket.ticket,
        loader=loader,
        keys=np.array([[ticket.lane // LANES, ticket.lane, position] for position in positions], np.int64),
        lengths=lengths,
        input_ids=input_ids.astype(np.int32),
        supervised=supervised.astype(np.uint8),
        image_counts=image_counts,
        images=images,
        actions=np.array([np.full((CHUNK, DIM), seed % 11) for seed in seeds], np.float32),
    )


def make_config(addresses: Iterable[str], **overrides: object) -> Config:
    """A config of two entries for ranks of these loaders; overrides go to the trainer or the feed section."""
    feed = {
        key: overrides.pop(key)
        for key in ("prefetch", "ticket_deadline_s", "data_deadline_s", "connect_deadline_s")
        if key in overrides
    }
    trainer = {"micro_batch_size": 4, "global_batch_size": 8, "lr": 1e-3, **overrides}
    return Config(
        cluster=ClusterConfig(loader_addresses=tuple(addresses)),
        model=ModelConfig(base_model_path="none"),
        data=DataConfig(
            dataset_type="mani_openpi",
            train_data_paths=("first.jsonl", "second.jsonl"),
            val_data_paths=("held_out.jsonl",),
            max_seq_len=64,
            order=OrderConfig(lanes=LANES, cell=CELL),
        ),
        trainer=TrainerConfig(feed=FeedConfig(**feed), **trainer),  # type: ignore[arg-type]
    )


class FakeLoader:
    """Context manager: `with FakeLoader(held=[0, 1]) as loader: ... loader.address`."""

    def __init__(
        self,
        *,
        held: Iterable[int] = (0, 1),
        address: str = "tcp://127.0.0.1:*",
        name: str = "fake",
        fingerprints: dict[str, str] | None = None,
        refuse: list[list[str]] | None = None,
    ) -> None:
        self.held, self.name = list(held), name
        self.fingerprints = {**FINGERPRINTS, **(fingerprints or {})}
        self._refuse = refuse
        self.mute = False
        """Receive, but answer nothing."""
        self.ignore_tickets = False
        """Answer all but tickets."""
        self.twice = False
        """Answer each ticket twice."""
        self.data_error_at: tuple[int, int] | None = None
        """(lane, position) of a bad sample."""
        self.tickets: list[Ticket] = []
        self.hellos: list[Hello] = []
        self.drain = threading.Event()
        self._stop = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> FakeLoader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Be gone, whatever was asked."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close(0)
        self._context.term()

    def _run(self) -> None:
        clients: list[bytes] = []
        while not self._stop.is_set():
            if self.drain.is_set() and clients:
                self.drain.clear()
                for client in clients:
                    self._send(client, Drain(loader=self.name))
            if not self._socket.poll(5):
                continue
            client, frame = self._socket.recv_multipart()
            message = encoding.decode(frame)
            if isinstance(message, Hello) and client not in clients:
                clients.append(client)
            if not self.mute:
                for answer in self._answers(message):
                    self._send(client, answer)

    def _send(self, client: bytes, message: Message) -> None:
        self._socket.send_multipart([client, encoding.encode(message)])

    def _answers(self, message: Message) -> list[Message]:
        if isinstance(message, Hello):
            self.hellos.append(message)
            if self._refuse is not None:
                return [Refuse(protocol=PROTOCOL_VERSION, differences=self._refuse)]
            return [self._welcome()]
        if isinstance(message, Epoch):
            lengths = {entry: LENGTHS[entry] for entry in self.held if entry in message.entries}
            return [
                Lanes(
                    split=message.split,
                    epoch=message.epoch,
                    lengths=lengths,
                    starts={entry: [0] * len(lanes) for entry, lanes in lengths.items()},
                    tokens={},
                )
            ]
        if isinstance(message, Ping):
            return [Pong(nonce=message.nonce, progress=self._progress())]
        assert isinstance(message, Ticket)
        self.tickets.append(message)
        if self.ignore_tickets:
            return []
        return [self._answer(message)] * (2 if self.twice else 1)

    def _answer(self, ticket: Ticket) -> Message:
        if self.data_error_at is not None:
            lane, position = self.data_error_at
            if ticket.lane == lane and ticket.start <= position < ticket.start + ticket.count:
                return Failure(ticket=ticket.ticket, reason="data", message=f"obs.npz: record {position}: truncated")
        if ticket.lane // LANES not in self.held:
            return Failure(ticket=ticket.ticket, reason="unavailable", message="not held here")
        return make_piece(ticket, self.name)

    def _welcome(self) -> Welcome:
        manifests = {f"manifest/train/{entry}": f"m{entry}" for entry in self.held}
        return Welcome(
            protocol=PROTOCOL_VERSION,
            loader=self.name,
            fingerprints={**self.fingerprints, **manifests},
            held={"train": self.held, "val": [0]},
            missing={},
            num_entries={"train": 2, "val": 1},
            num_samples={"train": sum(sum(LENGTHS[entry]) for entry in self.held), "val": sum(LENGTHS[0])},
            processor="{}",
        )

    def _progress(self) -> dict[str, float]:
        samples = sum(ticket.count for ticket in self.tickets)
        return {
            "cpu_s": time.process_time(),
            "samples": samples,
            "records_decoded": samples,
            "records_distinct": samples,
        }


def wait_for(condition: object, deadline_s: float = 60.0) -> None:
    """Wait until the callable gives true; AssertionError after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"not within {deadline_s} s"
        time.sleep(0.002)


REPOSITORY = Path(__file__).parents[3]
