"""Statistics and samples of the actions (and likewise the states) of one part, for the cache.

For a codec that is fitted to whole chunks (`fast`) chunks are sampled beside single actions, an eighth as many.

Together, the parts of a large source would keep far more actions than the sample of the fit holds. A part's share of the sample
is about its share of the bytes. So a part keeps four times that many actions, those with the smallest hashes. A part that turns
out to have many more actions for its bytes than the others (no images in its rows, more of its episodes chosen) is scanned again
and keeps more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stoker_proto.actions import codec_class
from stoker_proto.actions.chunk_sample import CHUNK_CAPACITY, ChunkSample
from stoker_proto.actions.statistics import StatisticsAccumulator
from stoker_proto.config import ActionConfig
from stoker_proto.errors import DataError

SAMPLE_CAPACITY = 65_536
"""Actions in the sample that quantiles and codec are fitted on."""
_MIN_KEEP = 256
_MARGIN = 4
_DEVIATIONS = 6
_BATCH_RECORDS = 256
_ACTIONS_PER_CHUNK = SAMPLE_CAPACITY // CHUNK_CAPACITY  # of the two samples, so that a part keeps its share of both


def actions_to_keep(part_bytes: int, entry_bytes: int) -> int:
    """Actions that a part of the entry contributes to the sample at most: a power of two.

    >>> actions_to_keep(16 << 20, 16 << 30), actions_to_keep(100, 100)
    (256, 65536)
    """
    return _power_of_two(_MARGIN * SAMPLE_CAPACITY * part_bytes / max(entry_bytes, 1))


def actions_needed(count: int, total: int, chunk: int) -> int:
    """Actions that a part must keep at least, so that the samples of the whole entry are fair: a power of two.

    count: the part's actions; total: the entry's; chunk: see `sampled_chunk`.

    That is what a sample takes of the part on average, and six standard deviations more.

    >>> actions_needed(1_000, 1_000_000, 0), actions_needed(100_000, 1_000_000, 0), actions_needed(300, 300, 1)
    (256, 8192, 4096)
    """

    def share(capacity: int) -> float:
        mean = capacity * count / max(total, 1)
        return min(count, capacity, mean + _DEVIATIONS * math.sqrt(mean) + _DEVIATIONS)

    needed = share(SAMPLE_CAPACITY)
    if chunk:  # a part keeps an eighth as many chunks
        needed = max(needed, _ACTIONS_PER_CHUNK * share(CHUNK_CAPACITY))
    return _power_of_two(needed)


def _power_of_two(wanted: float) -> int:
    keep = _MIN_KEEP
    while keep < wanted and keep < SAMPLE_CAPACITY:
        keep *= 2
    return keep


def sampled_chunk(action: ActionConfig) -> int:
    """Timesteps of the chunks that a scan samples for the codec's fit; 0 for a codec that needs no chunks."""
    return action.chunk if codec_class(action.codec).fits_chunks else 0


@dataclass(slots=True)
class GatheredActions:
    """Statistics of actions, and a sample of them."""

    statistics: StatisticsAccumulator
    chunks: ChunkSample | None
    """None where the codec needs none."""

    @classmethod
    def empty(cls, dim: int, chunk: int) -> Self:
        """Of actions of `dim` numbers; chunk: see `sampled_chunk`."""
        return cls(StatisticsAccumulator(dim, capacity=SAMPLE_CAPACITY), ChunkSample(dim, chunk) if chunk > 0 else None)

    @property
    def dim(self) -> int:
        """D."""
        return self.statistics.dim

    def merge(self, other: GatheredActions) -> None:
        """Add what another one has gathered."""
        self.statistics.merge(other.statistics)
        if self.chunks is not None:
            if other.chunks is None:
                raise DataError("a scan without chunks; run loader-prepare again")
            self.chunks.merge(other.chunks)

    def to_arrays(self, keep: int) -> dict[str, NDArray[Any]]:
        """Arrays for a file, with at most `keep` actions and an eighth as many chunks."""
        chunks = {} if self.chunks is None else self.chunks.to_arrays(keep // _ACTIONS_PER_CHUNK)
        return {**self.statistics.to_arrays(keep), **chunks}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], keep: int, chunk: int) -> Self | None:
        """The inverse of `to_arrays`; None if fewer than `keep` were stored although there were more."""
        statistics = StatisticsAccumulator.from_arrays(arrays, keep, capacity=SAMPLE_CAPACITY)
        if statistics is None or chunk == 0:
            return None if statistics is None else cls(statistics, None)
        chunks = ChunkSample.from_arrays(arrays, keep // _ACTIONS_PER_CHUNK)
        return None if chunks is None else cls(statistics, chunks)


class ActionCounter:
    """Feeds actions to the statistics in batches, as a numpy call costs as much for 50 actions as for 5,000.

    An action's key is the part's digest plus its number in the part: a function of content alone.
    """

    def __init__(self, shard: str, base: int, chunk: int = 0, what: str = "actions") -> None:
        """chunk: see `sampled_chunk`; what: actions or states."""
        self.shard, self.base, self.chunk, self.what = shard, np.uint64(base), chunk, what
        self.count = 0
        self.batch: list[NDArray[np.float32]] = []
        self.offsets: NDArray[np.int64] | None = None
        self.gathered: GatheredActions | None = None

    def add(self, actions: NDArray[np.float32], offsets: NDArray[np.int64] | None = None) -> None:
        """actions: float32[T, D]; offsets: see `ScannedRecord.chunk_offsets`."""
        if not _same(offsets, self.offsets):
            self._flush()
            self.offsets = offsets
        self.batch.append(actions)
        if len(self.batch) == _BATCH_RECORDS:
            self._flush()

    def finish(self) -> GatheredActions | None:
        """What was gathered; None without actions."""
        self._flush()
        return self.gathered

    def _flush(self) -> None:
        batch = [actions for actions in self.batch if len(actions)]
        self.batch = []
        if not batch:
            return
        check_same_width((actions.shape[-1] for actions in batch), self.shard, self.gathered, self.what)
        rows = np.concatenate(batch)
        if self.gathered is None:
            self.gathered = GatheredActions.empty(rows.shape[1], self.chunk)
        keys = self.base + np.arange(self.count, self.count + len(rows), dtype=np.uint64)
        self.gathered.statistics.add(rows, keys)
        if self.gathered.chunks is not None:
            lengths = np.array([len(actions) for actions in batch])
            ends = np.cumsum(lengths)
            begins, ends = np.repeat(ends - lengths, lengths), np.repeat(ends, lengths)
            self.gathered.chunks.add(rows, keys, begins, ends, self.offsets)
        self.count += len(rows)


def _same(one: NDArray[np.int64] | None, other: NDArray[np.int64] | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def check_same_width(widths: Iterable[int], file: str, before: GatheredActions | None, what: str = "actions") -> None:
    """Raises DataError unless all actions (or states) have the same number of dimensions."""
    expected = None if before is None else before.dim
    for width in widths:
        if expected is not None and width != expected:
            shared = "one action codec" if what == "actions" else "one scale of its states"
            raise DataError(
                f"{what} of {width} dimensions, and of {expected} elsewhere: all train data shares {shared}, "
                "so all of it needs the same number",
                file=file,
                field=what,
            )
        expected = width
