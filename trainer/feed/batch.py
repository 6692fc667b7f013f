"""Pieces -> one micro-batch of numpy arrays, images decoded straight into the batch's own buffer.

Letters of shapes: B rows of the micro-batch, T tokens of its longest row rounded up to a multiple of 8, I images of all
rows, K timesteps of an action chunk, D action dimensions, N samples of one piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stoker_proto.errors import RemoteProtocolError
from stoker_proto.messages import Piece

IGNORED = -100
"""Label of a position that is not trained: the value that torch's cross-entropy ignores."""
TOKEN_MULTIPLE = 8
MAX_IMAGES = 1 << 16
"""Of one micro-batch."""


class ImageSize(Protocol):
    """What of the processor's image description a batch needs."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...


class Decoder(Protocol):
    """What a batch needs of `stoker_proto.processor.Processor`."""

    @property
    def pad_id(self) -> int: ...

    @property
    def image(self) -> ImageSize | None: ...

    def decode_image(self, data: bytes, out: NDArray[np.uint8]) -> None:
        """Write the transported image into out: uint8[H, W, 3]."""
        ...


class Allocate(Protocol):
    """Gives an uninitialised array; the trainer's may lie in pinned memory."""

    def __call__(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]: ...


def plain_memory(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Ordinary memory: the default of `Allocate`."""
    return np.empty(shape, dtype)


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """What one rank puts through one forward. Always B = micro_batch_size rows; the last ones may be padding rows."""

    input_ids: NDArray[np.int64]  # [B, T], right padding with the processor's pad id
    attention_mask: NDArray[np.int64]  # [B, T]; the first token always counts, so that no softmax is empty
    labels: NDArray[np.int64]  # [B, T], IGNORED where nothing is trained; not shifted
    pixels: NDArray[np.uint8] | None  # [I, H, W, 3]: images of row b follow those of row b-1; None if I = 0
    image_counts: NDArray[np.int64]  # [B]
    actions: NDArray[
        np.float32
    ]  # [B, K, D] in action units; NaN in rows without an action; K = D = 0 if no row has one
    keys: NDArray[np.int64]  # [B, 3]: entry, record, timestep; -1 in padding rows
    num_supervised: int
    """Tokens that are labels, over all rows."""
    num_rows: int
    """Rows that are samples; the other B - num_rows are padding rows."""
    skipped: list[str]
    """Why a sample came as a row without labels (`data.on_bad_sample: skip`), one text each."""
    row_digests: list[bytes]
    """SHA-256 of keys and payload of each sample, as it came; empty where digests are switched off."""
    digest: bytes
    """SHA-256 over `row_digests`: does not depend on how the samples were cut into pieces."""


@dataclass(slots=True, kw_only=True)
class StepBatch:
    """What one rank trains in one optimizer step: A = global_batch_size / (micro_batch_size x world_size) micro-batches."""

    micro_batches: list[MicroBatch]
    wait_s: float
    """Seconds that the consumer was blocked for these micro-batches: the data wait of the step."""
    epoch: int
    step: int
    """Counted from the sample at which the epoch was entered."""
    num_steps: int
    """Steps of the epoch from there."""
    first_sample: int
    """Stream position of the global batch's first row."""
    next_sample: int
    """The cursor after this step: where `Feed.steps` goes on after a resume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBuilder:
    """Pieces of one slice -> `MicroBatch`. Thread-safe: holds no state."""

    decoder: Decoder
    num_rows: int
    """B."""
    max_tokens: int
    """No row may be longer: `data.max_seq_len`."""
    allocate: Allocate = plain_memory
    digests: bool = True
    """Compute `row_digests` and `digest`."""

    def __call__(self, pieces: Sequence[Piece]) -> MicroBatch:
        """Raises RemoteProtocolError where the pieces are not what a batch can be made of."""
        keys = self.allocate((self.num_rows, 3), np.int64)
        image_counts = self.allocate((self.num_rows,), np.int64)
        lengths = np.zeros(self.num_rows, np.int64)  # [B]
        keys[:], image_counts[:] = -1, 0
        count = sum(len(piece.lengths) for piece in pieces)
        if count > self.num_rows:
            raise RemoteProtocolError(f"pieces of {count} samples for a micro-batch of {self.num_rows} rows")
        if count:
            keys[:count] = np.concatenate([piece.keys for piece in pieces])
            image_counts[:count] = np.concatenate([piece.image_counts for piece in pieces])
            lengths[:count] = np.concatenate([piece.lengths for piece in pieces])
        input_ids, attention_mask, labels = self._tokens(pieces, lengths)
        row_digests = [digest for piece in pieces for digest in sample_digests(piece)] if self.digests else []
        return MicroBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            pixels=self._pixels([image for piece in pieces for image in piece.images]),
            image_counts=image_counts,
            actions=self._actions(pieces),
            keys=keys,
            num_supervised=int((labels != IGNORED).sum()),
            num_rows=count,
            skipped=[why for piece in pieces for _, why in sorted(piece.skipped.items())],
            row_digests=row_digests,
            digest=hashlib.sha256(b"".join(row_digests)).digest() if self.digests else b"",
        )

    def _tokens(
        self, pieces: Sequence[Piece], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        longest, shortest = int(lengths.max()), int(lengths.min())
        if longest > self.max_tokens or shortest < 0:
            raise RemoteProtocolError(
                f"a sample of {longest if shortest >= 0 else shortest} tokens: 0 to data.max_seq_len = {self.max_tokens} "
                "are expected; do loader and trainer read the same config?"
            )
        width = -(-max(longest, 1) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
        inside = np.arange(width) < lengths[:, None]  # [B, T]
        attention_mask = self.allocate((self.num_rows, width), np.int64)
        attention_mask[:] = inside
        attention_mask[:, 0] = 1
        input_ids = self.allocate((self.num_rows, width), np.int64)
        labels = self.allocate((self.num_rows, width), np.int64)
        input_ids[:], labels[:] = self.decoder.pad_id, IGNORED
        if pieces:
            ids = np.concatenate([piece.input_ids for piece in pieces]).astype(np.int64)
            supervised = np.concatenate([piece.supervised for piece in pieces]) != 0
            input_ids[inside] = ids
            labels[inside] = np.where(supervised, ids, IGNORED)
        return input_ids, attention_mask, labels

    def _pixels(self, images: list[bytes]) -> NDArray[np.uint8] | None:
        if not images:
            return None
        size = self.decoder.image
        if size is None or len(images) > MAX_IMAGES:
            rule = "the model takes none" if size is None else f"at most {MAX_IMAGES}"
            raise RemoteProtocolError(f"{len(images)} images in a micro-batch: {rule}")
        pixels = self.allocate((len(images), size.height, size.width, 3), np.uint8)
        for image, out in zip(images, pixels, strict=True):
            self.decoder.decode_image(image, out)
        return pixels

    def _actions(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        chunk = max((piece.actions.shape[1] for piece in pieces), default=0)
        dim = max((piece.actions.shape[2] for piece in pieces), default=0)
        actions = self.allocate((self.num_rows, chunk, dim), np.float32)
        actions[:] = np.nan
        row = 0
        for piece in pieces:
            if piece.actions.size:
                if piece.actions.shape[1:] != (chunk, dim):
                    raise RemoteProtocolError(
                        f"actions of shapes {piece.actions.shape[1:]} and {(chunk, dim)} in one batch"
                    )
                actions[row : row + len(piece.actions)] = piece.actions
            row += len(piece.lengths)
        return actions


def sample_digests(piece: Piece) -> list[bytes]:
    """SHA-256 of each sample: key, sizes, tokens, labels, action chunk, and images as they travelled."""
    tokens = np.concatenate([[0], np.cumsum(piece.lengths, dtype=np.int64)]).tolist()
    images = np.concatenate([[0], np.cumsum(piece.image_counts, dtype=np.int64)]).tolist()
    digests = []
    for row in range(len(piece.lengths)):
        sizes = (piece.lengths[row], *piece.actions.shape[1:], piece.image_counts[row])
        digest = hashlib.sha256(piece.keys[row].tobytes() + np.array(sizes, "<i8").tobytes())
        digest.update(piece.input_ids[tokens[row] : tokens[row + 1]].tobytes())
        digest.update(piece.supervised[tokens[row] : tokens[row + 1]].tobytes())
        digest.update(piece.actions[row].tobytes())
        for image in piece.images[images[row] : images[row + 1]]:
            digest.update(len(image).to_bytes(8, "little"))
            digest.update(image)
        digests.append(digest.digest())
    return digests
