"""A sample of whole action chunks, for codecs that are fitted to movements over time rather than to single actions.

As in `statistics`, the chunks whose keys have the smallest hashes are kept. So the sample depends neither on the order in which a
source is scanned nor on the number of processes.

    trajectory a b c, chunk 2:  chunks (a, b), (b, c), (c, c): the last action repeats after the end, as in training
    with offsets -1 and 0:      chunks (a, a), (a, b), (b, c)

Letters: N timesteps, D dimensions of an action, K timesteps of a chunk, M chunks in the sample.
"""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from stoker_proto.actions.statistics import Float32Array, smallest_hashes
from stoker_proto.errors import DataError
from stoker_proto.hashing import mix64

CHUNK_CAPACITY = 8_192
"""Largest M."""
_KEY = np.uint64(0x6368756E6B)  # so that the timesteps differ from those of the sample of single actions


class ChunkSample:
    """Mergeable. The chunks do not depend on the order of `add` and `merge`."""

    def __init__(self, dim: int, chunk: int, *, capacity: int = CHUNK_CAPACITY) -> None:
        self.dim, self.chunk, self.capacity = dim, chunk, capacity
        self.count = 0
        """Number of chunks seen."""
        self._hashes = np.empty(0, dtype=np.uint64)
        self._chunks = np.empty((0, chunk, dim), dtype=np.float32)

    def add(
        self,
        actions: Float32Array,
        keys: npt.NDArray[np.uint64],
        begins: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Count one chunk for each timestep of the actions float32[N, D]; keys uint64[N] identify the timesteps.

        Args:
            begins, ends: int64[N], the range [begin, end) in `actions` of each timestep's trajectory.
            offsets: int64[K], the timesteps of a chunk relative to its own; default: 0, 1, 2 ...
        """
        offsets = np.arange(self.chunk) if offsets is None else offsets
        if len(offsets) != self.chunk:
            raise DataError(f"chunks of {len(offsets)} timesteps: data.action.chunk is {self.chunk}")
        self.count += len(actions)
        hashes = mix64(keys ^ _KEY)
        starts = np.arange(len(actions))
        if len(self._hashes) == self.capacity:  # most chunks of a large source are dropped here
            near = hashes < self._hashes.max()
            hashes, starts = hashes[near], starts[near]
        hashes, starts = smallest_hashes(hashes, starts, self.capacity)
        places = np.clip(starts[:, None] + offsets, begins[starts][:, None], ends[starts][:, None] - 1)  # [n, K]
        self._keep(hashes, actions[places], self.capacity)

    def merge(self, other: "ChunkSample") -> None:
        """Add the chunks of `other`, which stays as it is. Raises DataError where the shapes differ."""
        if (self.dim, self.chunk) != (other.dim, other.chunk):
            raise DataError(
                f"chunks of {other.chunk} x {other.dim} do not merge into chunks of {self.chunk} x {self.dim}"
            )
        self.count += other.count
        self._keep(other._hashes, other._chunks, self.capacity)

    def finish(self) -> Float32Array:
        """float32[M, K, D] in the order of the hashes, so any part of it is a fair sample."""
        return self._chunks[np.argsort(self._hashes, kind="stable")]

    def to_arrays(self, keep: int) -> dict[str, npt.NDArray[Any]]:
        """Arrays for a file, with at most `keep` chunks."""
        order = np.argsort(self._hashes, kind="stable")[:keep]
        return {
            "num_chunks": np.array(self.count),
            "chunk_hashes": self._hashes[order],
            "chunks": self._chunks[order],
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], keep: int) -> Self | None:
        """The inverse, with at most `keep` chunks. None if the file holds fewer than `keep` although more were seen."""
        hashes, chunks, count = arrays["chunk_hashes"], arrays["chunks"], int(arrays["num_chunks"])
        if len(hashes) < min(keep, count):
            return None
        if chunks.ndim != 3 or len(chunks) != len(hashes):
            raise DataError("saved chunks whose arrays do not fit each other")
        sample = cls(chunks.shape[2], chunks.shape[1])
        sample.count = count
        sample._keep(hashes, chunks, keep)
        return sample

    def _keep(self, hashes: npt.NDArray[np.uint64], chunks: Float32Array, limit: int) -> None:
        hashes, chunks = np.concatenate([self._hashes, hashes]), np.concatenate([self._chunks, chunks])
        self._hashes, self._chunks = smallest_hashes(hashes, chunks, limit)
