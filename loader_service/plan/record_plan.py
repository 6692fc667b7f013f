"""Steps 1 and 2 of the order: an entry's records -> lanes, a lane's records -> windows -> samples.

    16 records, 2 lanes:   permuted 7 3 12 0 9 ...   ->   lane 0: 7 12 9 ...   lane 1: 3 0 ...
    lane 0, window_records 4, first epoch:   [7] [12 9] [1 4 6] [1 + lane % W] [4 records] [4 records] ...
             any later epoch:                [1 + lane % W] [4 records] [4 records] ...

An `RecordPlan` is two arrays over the records, 8 bytes each record, and answers "which samples are [start, start + count) of
lane l?" by bisection. The server makes and saves it, and the workers map the same pages.

In the first epoch of a run, and in validation, nothing was decoded before. Lanes then begin one after another (staggered) and
their windows grow from one record to `window_records`, so that only little more is decoded than is trained. Later epochs begin
with full windows: the loader reads them ahead while the epoch before ends. One window of each lane has a length that depends on
the lane, so that not all lanes begin a new window at the same time.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loader_service.plan.lane_plan import (
    FIRST_LANES,
    LanePlan,
    PlanKey,
    Window,
    keyed_permutation,
    plan_file,
    save_array,
)
from stoker_proto.config import OrderConfig
from stoker_proto.errors import DataError
from stoker_proto.hashing import key64

PLAN_VERSION = 2


class RecordPlan(LanePlan):
    """Rows of one sample each; a lane holds every lanes-th record of the permutation."""

    def __init__(
        self,
        records: NDArray[np.uint32],
        ends: NDArray[np.uint32],
        order: OrderConfig,
        key: PlanKey,
    ) -> None:
        """records, ends: uint32[R] in lane-major order; ends counts the samples of its lane up to and with the record."""
        super().__init__(order, key)
        # Plain arrays: indexing a memmap makes a memmap, at ten times the cost.
        self.records, self.ends, self.num_records = np.asarray(records), np.asarray(ends), len(records)
        # Lane l holds every lanes-th record of the permutation from l on.
        sizes = [len(range(lane, len(records), order.lanes)) for lane in range(order.lanes)]
        self._bounds = [0, *accumulate(sizes)]  # [L + 1]
        self._lengths = [
            int(self.ends[last - 1]) if last > first else 0 for first, last in pairwise(self._bounds)
        ]  # [L], in samples

    @classmethod
    def make(cls, num_samples: NDArray[np.uint32], order: OrderConfig, key: PlanKey) -> RecordPlan:
        """Deal the entry's records, num_samples uint32[R], to its lanes. Validation data keeps one order in all epochs."""
        shuffle = key64("records", order.seed, key.split, key.shuffle_epoch, key.entry)
        permutation = keyed_permutation(len(num_samples), shuffle)
        lanes = [permutation[lane :: order.lanes] for lane in range(order.lanes)]
        ends = np.empty(len(num_samples), np.uint32)
        position = 0
        for records in lanes:
            cumulative = np.cumsum(num_samples[records], dtype=np.int64)
            if len(cumulative) and int(cumulative[-1]) >= 1 << 32:
                raise DataError(f"a lane of {int(cumulative[-1])} samples: at most 2**32; raise data.order.lanes")
            ends[position : position + len(records)] = cumulative
            position += len(records)
        return cls(np.concatenate(lanes), ends, order, key)

    def save(self, folder: Path) -> None:
        """Write the two arrays where `load` finds them; `ends` last: its presence means that both are there."""
        save_array(folder, self, "records", self.records)
        save_array(folder, self, "ends", self.ends)

    @classmethod
    def load(cls, folder: Path, order: OrderConfig, key: PlanKey) -> RecordPlan:
        """The saved plan, its arrays mapped from the file so that all workers of a host share them."""
        records, ends = (np.load(plan_file(folder, key, name), mmap_mode="r") for name in ("records", "ends"))
        return cls(records, ends, order, key)

    def lane_length(self, lane: int) -> int:
        """Samples of one of the entry's lanes."""
        return self._lengths[lane]

    def _find(self, lane: int, position: int) -> tuple[int, int, int]:
        base, end = self._bounds[lane], self._bounds[lane + 1]
        # A Python int would be an int64, and the whole lane would be copied to be compared with it.
        record = int(np.searchsorted(self.ends[base:end], np.uint32(position), side="right"))
        window_records = self.order.window_records
        number, low, high = window_bounds(record, end - base, window_records, lane, staggered=self.is_staggered)
        return number, base + low, base + high

    def _layout(self, lane: int, number: int, first: int, last: int) -> Window:
        ends = self.ends[first:last].astype(np.int64)
        start = int(self.ends[first - 1]) if first > self._bounds[lane] else 0
        key = self._window_key(lane, number)
        order = keyed_permutation(int(ends[-1]) - start, key)
        counts = ends.copy()  # [R]
        counts[0] -= start
        counts[1:] -= ends[:-1]
        if len(order) == last - first and counts.all():
            return self._layout_of_singles(start, self.records[first:last], order)
        offsets = ends - counts - start  # [R]: of each record's first sample in the unshuffled window
        record_of = np.repeat(np.arange(last - first, dtype=np.uint32), counts)[order]
        sample_of = (order - offsets[record_of]).astype(np.uint32)
        records = self.records[first:last]
        stop = start + len(order)
        first_use = np.full(last - first, stop, np.int64)
        np.minimum.at(first_use, record_of, start + np.arange(len(order)))
        return Window(start, stop, records, records[record_of], sample_of, first_use)

    def _layout_of_singles(self, start: int, records: NDArray[np.uint32], order: NDArray[np.uint32]) -> Window:
        """`_layout` for windows whose records have one sample each, in a third of the time: such windows are small and many."""
        first_use = np.empty(len(order), np.int64)
        first_use[order] = np.arange(start, start + len(order))
        return Window(start, start + len(order), records, records[order], np.zeros(len(order), np.uint32), first_use)


def window_bounds(
    record: int, num_records: int, window_records: int, lane: int, *, staggered: bool
) -> tuple[int, int, int]:
    """(number, first, last) of the window that holds a lane's record. Sizes are 1 + lane % W, W, W, ...; staggered: growing ones
    before these.

    >>> [window_bounds(record, 100, 3, 1, staggered=True)[1:] for record in (0, 1, 2, 4, 6, 9)]
    [(0, 1), (1, 2), (2, 4), (4, 6), (6, 9), (9, 12)]
    """
    # The lanes that begin together grow at different times: one record 1 + lane % 4 times, then 2, 3, ... W - 1.
    growing = (*[1] * (1 + lane % FIRST_LANES), *range(2, window_records)) if staggered else ()
    first = 0
    for number, size in enumerate((*growing, 1 + lane % window_records)):
        if record < first + size:
            return number, first, min(first + size, num_records)
        first += size
    extra = (record - first) // window_records
    first += extra * window_records
    return len(growing) + 1 + extra, first, min(first + window_records, num_records)
