"""The messages of `proto/PROTOCOL.md`, one frozen dataclass each. `encoding.py` turns them into bytes.

Letters of shapes: N rows of a piece, Q their samples together (Q = N unless rows are packed), S the tokens of these, I their
images, K timesteps of an action chunk, D action dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Rank -> loader, first message of a connection: who I am, and what a batch means to me."""

    protocol: int
    client: str
    """Random name of this incarnation of the rank."""
    rank: int
    world_size: int
    fingerprints: dict[str, str]
    """What the rank already knows (tokenizer, image, dialogue, plan ...). Compared where both sides have the name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Loader -> rank: we agree, and this is the data that I hold."""

    protocol: int
    loader: str
    """Random name of this incarnation of the loader, shown with its address."""
    fingerprints: dict[str, str]
    """All fingerprints, including `codec` and `manifest/<split>/<entry>` for the entries held."""
    held: dict[str, list[int]]
    """split -> indices of the entries of its data paths that this loader holds, whole or in part."""
    missing: dict[str, list[list[int | str]]]
    """split -> shards of these entries that are not here, in order: for each range of shard numbers [first, stop)
    [entry, first, stop, shards of the entry, name of the first missing one, name of the last]."""
    num_entries: dict[str, int]
    """split -> number of entries in the config."""
    num_samples: dict[str, int]
    """split -> samples of the entries held."""
    processor: str
    """JSON of the one object that turns observations into tokens and tokens into actions (`stoker_proto.processor`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Loader -> rank: we disagree, so you may not use my data."""

    protocol: int
    differences: list[list[str]]
    """[name, the loader's value, the rank's value] each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Rank -> loader: how long are the lanes of these entries in this pass?"""

    split: str
    epoch: int
    """Number of the pass. The rank knows which passes make an epoch of the run (`stoker_proto.order.mixture`)."""
    entries: list[int]
    """The entries that the rank asks about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Loader -> rank: the answer to Epoch."""

    split: str
    epoch: int
    lengths: dict[int, list[int]]
    """entry asked about and held -> rows of each of its lanes. Lane number of the stream = entry * lanes per entry + index."""
    starts: dict[int, list[int]]
    """entry -> time, in units of 2**-32 of the epoch, at which each of its lanes begins (`stoker_proto.order.lanes`)."""
    tokens: dict[int, int]
    """entry -> tokens of all its samples, images included; an estimate where they were not counted, 0 where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Rank -> loader: send rows [start, start + count) of one lane. A ticket is also one credit."""

    ticket: int
    """Number chosen by the rank, repeated in the answer."""
    split: str
    epoch: int
    lane: int
    start: int
    count: int
    rows: bytes = b""
    """Which of these rows are wanted, one bit each (`wire.row_bits`); empty: all of them."""

    @property
    def num_rows(self) -> int:
        """Rows that the answer has."""
        return int.from_bytes(self.rows).bit_count() if self.rows else self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Loader -> rank, in place of a Piece: not all rows of the ticket lie in shards that are here."""

    ticket: int
    loader: str
    shards: list[int]
    """Number of the shard, within the entry, of each row of the ticket."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Loader -> rank: the rows of a ticket. All arrays are little-endian."""

    ticket: int
    loader: str
    keys: NDArray[np.int64]  # [Q, 3]: entry, record, timestep
    lengths: NDArray[np.int32]  # [Q]: tokens of each sample
    input_ids: NDArray[np.int32]  # [S], sample after sample
    supervised: NDArray[np.uint8]  # [S]: 1 where the token is a label
    image_counts: NDArray[np.uint8]  # [Q]: images of each sample
    images: list[bytes | memoryview]  # [I]: what `data.image.transport` says; views into the frame where this is large
    actions: NDArray[np.float32]  # [Q, K, D] in action units; [Q, 0, 0] where the source has none
    skipped: dict[int, str] = field(default_factory=dict)
    """sample -> why it has no labels (policy `skip`)."""
    row_samples: NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))
    """[N]: samples of each row, at least 1; [0] without packing, where each row is one sample."""
    auxiliary: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """[Q, A]: what training predicts beside the tokens, NaN for a sample without; [0, 0] where no sample has any."""

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.row_samples) or len(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Loader -> rank: there is no piece for this ticket."""

    ticket: int
    reason: str
    """`data`: every loader would fail the same way, so the run ends; `unavailable`: not held, or draining: ask another loader;
    `died`: the worker died while it built the piece: ask another loader; `rejected`: the ticket is not valid."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Rank -> loader: are you alive, and what is your progress?"""

    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """Loader -> rank: the answer to Ping, with progress (PROTOCOL.md lists the counters)."""

    nonce: int
    progress: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Loader -> rank: I am leaving. I still answer open tickets; send new ones to other loaders."""

    loader: str


Message = Hello | Welcome | Refuse | Epoch | Lanes | Ticket | Shards | Piece | Failure | Ping | Pong | Drain


def piece_payload(piece: Piece) -> list[Any]:
    """The parts of a piece that its ticket determines, in a fixed order: the bytes that guarantee G2 promises to be identical."""
    return [
        piece.keys.tobytes(),
        piece.lengths.tobytes(),
        piece.input_ids.tobytes(),
        piece.supervised.tobytes(),
        piece.image_counts.tobytes(),
        *piece.images,
        piece.actions.tobytes(),
        piece.row_samples.tobytes(),
        piece.auxiliary.tobytes(),
    ]
