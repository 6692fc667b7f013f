"""One message of every kind, and the script that writes their pinned frames: `python tests/proto/wire/make_golden.py`.

Run it only for a new version of the protocol: a frame that changes without one is what the test is there to catch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

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
    Shards,
    Ticket,
    Welcome,
)

GOLDEN = Path(__file__).parents[3] / "proto" / "golden"

MESSAGES: dict[str, Message] = {
    "hello": Hello(protocol=5, client="3f2a", rank=1, world_size=2, fingerprints={"order": "aa", "codec": "bb"}),
    "welcome": Welcome(
        protocol=5,
        loader="9c41",
        fingerprints={"codec": "bb", "manifest/train/0": "cc"},
        held={"train": [0], "val": []},
        missing={"train": [[0, 2, 5, 20, "b-2.jsonl", "b-4.jsonl"], [0, 9, 10, 20, "c.jsonl", "c.jsonl"]], "val": []},
        num_entries={"train": 2, "val": 0},
        num_samples={"train": 360_000_000, "val": 0},
        processor='{"version":1}',
    ),
    "refuse": Refuse(protocol=5, differences=[["codec", "bb", "dd"]]),
    "epoch": Epoch(split="train", epoch=3, entries=[0, 1]),
    "lanes": Lanes(
        split="train",
        epoch=3,
        lengths={0: [9, 14, 0, 7], 1: [70_000, 1]},
        starts={0: [0, 0, 0, 0], 1: [0, 1 << 31]},
        tokens={0: 4800, 1: 0},
    ),
    "ticket": Ticket(ticket=7, split="train", epoch=0, lane=3, start=16, count=8),
    "ticket_chosen": Ticket(ticket=9, split="train", epoch=0, lane=3, start=16, count=12, rows=b"\x09\x02"),
    "shards": Shards(ticket=7, loader="9c41", shards=[2, 0, 300, 2]),
    "piece": Piece(
        ticket=7,
        loader="9c41",
        keys=np.array([[0, 5, 0], [0, 5, 1]], np.int64),
        lengths=np.array([3, 2], np.int32),
        input_ids=np.array([1, 300, 2, 1, 31_999], np.int32),
        supervised=np.array([0, 1, 1, 0, 0], np.uint8),
        image_counts=np.array([1, 0], np.uint8),
        images=[b"\xff\xd8 a frame \xff\xd9"],
        actions=np.array([[[0.5, -1.0]], [[0.0, 0.25]]], np.float32),
        skipped={1: "traj_7/obs.npz: frame 1 is missing"},
        auxiliary=np.array([[0.25, -0.5, 2.0], [np.inf, 0.0, 1.5]], np.float32),
    ),
    "piece_packed": Piece(
        ticket=8,
        loader="9c41",
        keys=np.array([[1, 9, 0], [1, 4, 0], [1, 6, 0]], np.int64),
        lengths=np.array([3, 2, 1], np.int32),
        input_ids=np.array([1, 300, 2, 1, 31_999, 2], np.int32),
        supervised=np.array([1, 1, 1, 0, 1, 0], np.uint8),
        image_counts=np.zeros(3, np.uint8),
        images=[],
        actions=np.zeros((3, 0, 0), np.float32),
        skipped={2: "chats.jsonl: record 6: no turns"},
        row_samples=np.array([2, 1], np.uint16),
    ),
    "failure": Failure(ticket=7, reason="unavailable", message="the loader is draining"),
    "ping": Ping(nonce=11),
    "pong": Pong(nonce=11, progress={"cpu_s": 1.5, "samples": 64, "records_decoded": 8}),
    "drain": Drain(loader="9c41"),
}


def main() -> None:
    """Write every frame."""
    GOLDEN.mkdir(exist_ok=True)
    for name, message in MESSAGES.items():
        (GOLDEN / f"{name}.bin").write_bytes(encoding.encode(message))


if __name__ == "__main__":
    main()
