"""Pieces -> one micro-batch of numpy arrays. Images are decoded directly into the batch's buffer.

Letters of shapes: B rows of the micro-batch, Q samples in them (one each, or several where rows are packed), T tokens of its
longest row rounded up to a multiple of 8, I images of all rows, K timesteps of an action chunk, D action dimensions.

    two samples in a row of 8:   input_ids 5 6 7 8 9 - - -   positions 0 1 2 0 1 0 0 0   labels . 6 7 . 9 . . .

The first token of a sample is never a label: the token before it belongs to another sample, or there is none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stoker_proto.errors import RemoteProtocolError
from stoker_proto.wire.digests import digests_of_rows
from stoker_proto.wire.messages import Piece
from trainer.feed.buffers import reused_memory

IGNORED = -100
"""Label of a position that is not trained; torch's cross-entropy ignores this value."""
TOKEN_MULTIPLE = 8
MAX_IMAGES = 1 << 16
"""Of one micro-batch."""


class ImageSize(Protocol):
    """The part of the processor's image description that a batch needs."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...


class Decoder(Protocol):
    """The part of `stoker_proto.processor.Processor` that a batch needs."""

    @property
    def pad_id(self) -> int: ...

    @property
    def image(self) -> ImageSize | None: ...

    def decode_image(self, data: bytes | memoryview, out: NDArray[np.uint8]) -> None:
        """Decode an image from the wire into out: uint8[H, W, 3]."""
        ...


class Allocate(Protocol):
    """Returns an uninitialised array, for what a device needs; the trainer passes one that uses pinned memory."""

    def __call__(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How pieces become micro-batches."""

    processor: Decoder | None = None
    """Decodes images; None: the processor that the loaders send."""
    allocate: Allocate = reused_memory
    """Makes the arrays of the batches, e.g. in pinned memory."""
    threads: int = 1
    """That decode images."""


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """The input of one forward on one rank. Always B = micro_batch_size rows; the last ones may be padding rows."""

    input_ids: NDArray[np.int64]  # [B, T], right padding with the processor's pad id
    attention_mask: NDArray[np.int64]  # [B, T]; 1 at the first token also in padding rows, so that no softmax is empty
    labels: NDArray[np.int64]  # [B, T], IGNORED where nothing is trained; not shifted
    positions: NDArray[np.int64] | None  # [B, T]: restart at 0 with each sample; 0 in the padding; None without packing
    pixels: NDArray[np.uint8] | None  # [I, H, W, 3]: images of row b follow those of row b-1; None if I = 0
    image_counts: NDArray[np.int64]  # [B]
    actions: NDArray[
        np.float32
    ]  # [B, K, D] in action units; NaN in rows without an action; K = D = 0 if no row has one
    auxiliary: NDArray[np.float32]  # [B, A]: learned beside the tokens; NaN in rows without; A = 0 if no row has any
    keys: NDArray[np.int64]  # [B, 3]: entry, record, timestep of the row's first sample; -1 in padding rows
    row_samples: NDArray[np.int64]  # [B]: samples of each row; 0 in padding rows
    sample_keys: NDArray[np.int64]  # [Q, 3]: keys of all samples, row after row
    num_supervised: int
    """Tokens that are labels, over all rows."""
    num_rows: int
    """Rows with samples; the other B - num_rows are padding rows."""
    skipped: list[str]
    """One reason for each sample that came without labels (`data.on_bad_sample: skip`)."""
    row_digests: list[bytes]
    """SHA-256 of keys and payload of each row's samples, as received."""
    digest: bytes
    """SHA-256 over `row_digests`; does not depend on how samples were divided into pieces."""
    on_device: Any = None
    """What `Feed.copy_ahead`'s function returned for this batch."""


@dataclass(slots=True, kw_only=True)
class StepBatch:
    """One rank's part of one optimizer step: A = global_batch_size / (micro_batch_size x world_size) micro-batches."""

    micro_batches: list[MicroBatch]
    wait_s: float
    """Seconds that the consumer waited for these micro-batches: the data wait of the step."""
    epoch: int
    step: int
    """Counted from the sample at which the epoch was entered."""
    num_steps: int
    """Steps from there to the epoch's end."""
    first_sample: int
    """Stream position of the global batch's first row."""
    next_sample: int
    """Stream position after this step: pass it to `Feed.steps` to resume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBuilder:
    """Pieces of one slice -> `MicroBatch`. Thread-safe, as it has no state."""

    decoder: Decoder
    num_rows: int
    """B."""
    max_tokens: int
    """Longest row allowed: `data.max_seq_len`."""
    allocate: Allocate = reused_memory
    packing: bool = False
    """`data.packing`: rows may hold several samples; `positions` shows where each begins."""

    def __call__(self, pieces: Sequence[Piece]) -> MicroBatch:
        """Build the batch. Raises RemoteProtocolError if the pieces do not fit together or into the batch."""
        keys, image_counts = np.empty((self.num_rows, 3), np.int64), np.empty(self.num_rows, np.int64)
        row_samples = np.zeros(self.num_rows, np.int64)  # [B]
        keys[:], image_counts[:] = -1, 0
        count = sum(piece.num_rows for piece in pieces)
        if count > self.num_rows:
            raise RemoteProtocolError(f"pieces of {count} rows for a micro-batch of {self.num_rows}")
        lengths, sample_keys = np.zeros(0, np.int64), np.zeros((0, 3), np.int64)  # [Q], [Q, 3]
        if count:
            row_samples[:count] = np.concatenate([self._row_samples(piece) for piece in pieces])
            lengths = np.concatenate([piece.lengths for piece in pieces]).astype(np.int64)
            sample_keys = np.concatenate([piece.keys for piece in pieces])
            firsts = np.cumsum(row_samples[:count]) - row_samples[:count]
            keys[:count] = sample_keys[firsts]
            images = np.concatenate([piece.image_counts for piece in pieces])
            image_counts[:count] = np.add.reduceat(images.astype(np.int64), firsts)
        input_ids, attention_mask, labels, positions = self._tokens(pieces, lengths, row_samples)
        row_digests, pixels = self._digests_and_pixels(pieces)
        return MicroBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            positions=positions,
            pixels=pixels,
            image_counts=image_counts,
            actions=self._actions(pieces),
            auxiliary=self._auxiliary(pieces),
            keys=keys,
            row_samples=row_samples,
            sample_keys=sample_keys,
            num_supervised=int((labels != IGNORED).sum()),
            num_rows=count,
            skipped=[why for piece in pieces for _, why in sorted(piece.skipped.items())],
            row_digests=row_digests,
            digest=hashlib.sha256(b"".join(row_digests)).digest(),
        )

    def _row_samples(self, piece: Piece) -> NDArray[np.int64]:
        """int64[N]: samples of each row of a piece."""
        if not len(piece.row_samples):
            return np.ones(len(piece.lengths), np.int64)
        if not self.packing:
            raise RemoteProtocolError(
                "packed rows, but data.packing is false; do loader and trainer read the same config?"
            )
        return piece.row_samples.astype(np.int64)

    def _tokens(
        self, pieces: Sequence[Piece], lengths: NDArray[np.int64], row_samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]:
        """input_ids, attention_mask, labels and positions of samples of `lengths`: int64[Q]."""
        rows = np.zeros(self.num_rows, np.int64)  # [B]: tokens of each
        np.add.at(rows, np.repeat(np.arange(self.num_rows), row_samples), lengths)
        longest, shortest = int(rows.max()), int(lengths.min(initial=0))
        if longest > self.max_tokens or shortest < 0:
            raise RemoteProtocolError(
                f"a row of {longest if shortest >= 0 else shortest} tokens: 0 to data.max_seq_len = {self.max_tokens} "
                "are expected; do loader and trainer read the same config?"
            )
        shape = (self.num_rows, -(-max(longest, 1) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE)
        inside = np.arange(shape[1]) < rows[:, None]  # [B, T]
        attention_mask = self.allocate(shape, np.int64)
        attention_mask[:] = inside
        attention_mask[:, 0] = 1
        input_ids, labels = self.allocate(shape, np.int64), np.empty(shape, np.int64)
        input_ids[:], labels[:] = self.decoder.pad_id, IGNORED
        positions = self.allocate(shape, np.int64) if self.packing else None
        if positions is not None:
            positions[:] = 0  # in the padding each token restarts at 0, so it attends to itself only
        if pieces:
            begins = np.cumsum(lengths) - lengths  # [Q]: first token of each sample, of all tokens
            ids = np.concatenate([piece.input_ids for piece in pieces]).astype(np.int64)
            supervised = np.concatenate([piece.supervised for piece in pieces]) != 0
            supervised[begins[lengths > 0]] = False
            input_ids[inside] = ids
            labels[inside] = np.where(supervised, ids, IGNORED)
            if positions is not None:
                positions[inside] = np.arange(len(ids)) - np.repeat(begins, lengths)
        return input_ids, attention_mask, labels, positions

    def _digests_and_pixels(self, pieces: Sequence[Piece]) -> tuple[list[bytes], NDArray[np.uint8] | None]:
        """Digests of all rows, and uint8[I, H, W, 3]. Piece by piece, so that an image is read while it is in the cache."""
        count = sum(len(piece.images) for piece in pieces)
        size = self.decoder.image
        if count and (size is None or count > MAX_IMAGES):
            rule = "the model takes none" if size is None else f"at most {MAX_IMAGES}"
            raise RemoteProtocolError(f"{count} images in a micro-batch: {rule}")
        pixels = self.allocate((count, size.height, size.width, 3), np.uint8) if count and size else None
        digests, place = [], 0
        for piece in pieces:
            digests += digests_of_rows(piece)
            for image in piece.images:
                self.decoder.decode_image(image, pixels[place])  # type: ignore[index]  # as there are images
                place += 1
        return digests, pixels

    def _actions(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        chunk = max((piece.actions.shape[1] for piece in pieces), default=0)
        dim = max((piece.actions.shape[2] for piece in pieces), default=0)
        actions = np.full((self.num_rows, chunk, dim), np.nan, np.float32)
        row = 0
        for piece in pieces:
            if piece.actions.size:
                if len(piece.row_samples):
                    raise RemoteProtocolError("actions in packed rows: packing is for text")
                if piece.actions.shape[1:] != (chunk, dim):
                    raise RemoteProtocolError(
                        f"actions of shapes {piece.actions.shape[1:]} and {(chunk, dim)} in one batch"
                    )
                actions[row : row + len(piece.actions)] = piece.actions
            row += piece.num_rows
        return actions

    def _auxiliary(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        width = max((piece.auxiliary.shape[1] for piece in pieces), default=0)
        auxiliary = self.allocate((self.num_rows, width), np.float32)
        auxiliary[:] = np.nan
        row = 0
        for piece in pieces:
            if piece.auxiliary.size:
                if len(piece.row_samples) or piece.auxiliary.shape[1] != width:
                    raise RemoteProtocolError(
                        f"auxiliary values of widths {piece.auxiliary.shape[1]} and {width} in one batch, or in packed rows"
                    )
                auxiliary[row : row + len(piece.auxiliary)] = piece.auxiliary
            row += piece.num_rows
        return auxiliary
