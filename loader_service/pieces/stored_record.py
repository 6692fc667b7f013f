"""EncodedRecord <-> bytes, as the cache on disk keeps them. No pickle: a head, columns, and the images one after another.

    head, 32 bytes        N samples, I images, K x D of each action, A auxiliary numbers, E excluded samples, size in memory
    int64[N]              timesteps
    int32[N], int32[N]    tokens and images of each sample
    int32[I], int32[E]    bytes of each image; numbers of the excluded samples
    float32[N, K, D]      actions, if K > 0
    float32[N, A]         auxiliary numbers, if A > 0
    int32[S], uint8[S]    input_ids and supervised of all samples
    the images

Numbers are little-endian. The images of a record that was read are views of these bytes: nothing of it is copied again.
"""

from __future__ import annotations

import struct
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loader_service.pieces.piece import EncodedRecord, EncodedSample

LAYOUT = 1
"""Version of the layout; part of every key."""
_HEAD = struct.Struct("<6LQ")
_LARGEST = (1 << 31) - 1


def to_bytes(record: EncodedRecord) -> bytes | None:
    """The record's bytes; None for one that is not kept: bad, without images, or with samples of different kinds."""
    samples = record.samples
    images = [image for sample in samples for image in sample.images]
    if record.error is not None or not images or max(map(len, images)) > _LARGEST:
        return None
    actions = _column([sample.action for sample in samples], 2)
    auxiliary = _column([sample.auxiliary for sample in samples], 1)
    ids = np.concatenate([sample.input_ids for sample in samples])
    supervised = np.concatenate([sample.supervised for sample in samples])
    if actions is None or auxiliary is None or (ids.dtype.str, supervised.dtype.str) != ("<i4", "|u1"):
        return None
    excluded = sorted(record.excluded)
    head = _HEAD.pack(
        len(samples), len(images), *actions.shape[1:], auxiliary.shape[1], len(excluded), record.size_bytes
    )
    columns: list[tuple[Any, DTypeLike]] = [
        ([sample.timestep for sample in samples], "<i8"),
        ([len(sample.input_ids) for sample in samples], "<i4"),
        ([len(sample.images) for sample in samples], "<i4"),
        ([len(image) for image in images], "<i4"),
        (excluded, "<i4"),
        (actions, "<f4"),
        (auxiliary, "<f4"),
        (ids, "<i4"),
        (supervised, "<u1"),
    ]
    return b"".join([head, *(np.asarray(values, dtype).tobytes() for values, dtype in columns), *images])


def from_bytes(data: bytes) -> EncodedRecord:
    """The record of `to_bytes`. Raises ValueError for bytes that are none."""
    reader = _Reader(data)
    num_samples, num_images, steps, dims, extra, num_excluded, size_bytes = reader.head
    timesteps = reader.take("<i8", num_samples).tolist()
    lengths = reader.take("<i4", num_samples)
    counts = reader.take("<i4", num_samples)
    sizes = reader.take("<i4", num_images)
    excluded = reader.take("<i4", num_excluded).tolist()
    actions = reader.take("<f4", num_samples * steps * dims).reshape(num_samples, steps, dims)
    auxiliary = reader.take("<f4", num_samples * extra).reshape(num_samples, extra)
    if any(len(column) and column.min() < 0 for column in (lengths, counts, sizes)) or counts.sum() != num_images:
        raise ValueError("its counts do not agree")
    num_tokens = int(lengths.sum(dtype=np.int64))
    ids, supervised = reader.take("<i4", num_tokens), reader.take("<u1", num_tokens)
    if reader.at + int(sizes.sum(dtype=np.int64)) != len(data):
        raise ValueError("its images do not end where it does")
    view = memoryview(data)
    images: list[Any] = [view[start:stop] for start, stop in pairwise(accumulate(sizes.tolist(), initial=reader.at))]
    tokens = pairwise(accumulate(lengths.tolist(), initial=0))
    shown = pairwise(accumulate(counts.tolist(), initial=0))
    samples = [
        EncodedSample(
            ids[start:stop],
            supervised[start:stop],
            tuple(images[first:last]),
            actions[i] if steps else None,
            timestep,
            auxiliary[i] if extra else None,
        )
        for i, (timestep, (start, stop), (first, last)) in enumerate(zip(timesteps, tokens, shown, strict=True))
    ]
    return EncodedRecord(samples, None, size_bytes, frozenset(excluded), is_stored=True)


def _column(values: list[NDArray[np.float32] | None], num_dimensions: int) -> NDArray[np.float32] | None:
    """float32[N, ...]; sides of 0 where no sample has a value; None where samples differ."""
    known = [value for value in values if value is not None]
    if not known:
        return np.empty((len(values), *[0] * num_dimensions), np.float32)
    first = known[0]
    if len(known) < len(values) or not first.size or any((v.shape, v.dtype.str) != (first.shape, "<f4") for v in known):
        return None
    return np.stack(known)


class _Reader:
    """Columns of a record, one after another, each checked against the bytes that are there."""

    def __init__(self, data: bytes) -> None:
        if len(data) < _HEAD.size:
            raise ValueError("it is shorter than its head")
        self.head: tuple[int, ...] = _HEAD.unpack_from(data)
        self.at = _HEAD.size
        self._data = data

    def take(self, dtype: str, count: int) -> NDArray[Any]:
        size = np.dtype(dtype).itemsize * count
        if self.at + size > len(self._data):
            raise ValueError("a column does not end where the record does")
        column = np.frombuffer(self._data, dtype, count, self.at)
        self.at += size
        return column
