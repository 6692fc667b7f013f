"""Rows of text: packed to `max_seq_len` tokens, or one sample each and neighbours of similar length. Windows are dealt to lanes.

    records permuted   ->   windows of about data.order.window_rows rows   ->   lane 0: windows 0 2 4 ...   lane 1: 1 3 5 ...
    a packed window    ->   rows [7] [6 2] [5 3] [2] (tokens of their samples; see `packing`), then the rows are permuted

A record of k samples is k - 1 segments of `max_seq_len` tokens, which are rows by themselves, and a last segment that is packed
with those of other records. A window wastes about half of its last row and little else: rows are filled to 99% and more in
windows of 128 rows. A data set that is smaller than a window has one window in one lane.

Where a chat template divides dialogues, the samples of a record have any lengths. Then every one of them is packed.

Windows do not grow in a first epoch, unlike those of trajectories: a row needs its own records only, and text is tokenised
quickly. The plan takes 6 bytes per record (packed) or 4; the lengths of samples stand in the manifest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loader_service.plan.lane_plan import LanePlan, PlanKey, Window, keyed_permutation, plan_file, save_array
from loader_service.plan.packing import MAX_WINDOW_ITEMS, pack_windows
from loader_service.plan.token_counts import TokenCounts
from stoker_proto.config import DataConfig
from stoker_proto.hashing import key64


class RowPlan(LanePlan):
    """R records in W windows; window w is the (w // lanes)-th of lane w % lanes."""

    def __init__(
        self,
        records: NDArray[np.uint32],
        bins: NDArray[np.uint16],
        ends: NDArray[np.int64],
        counts: TokenCounts,
        data: DataConfig,
        key: PlanKey,
    ) -> None:
        """records: uint32[R], permuted. bins: uint16[R], the row that each record's last sample is packed into; uint16[S], that
        of each sample, if `counts` has the lengths of all; [0] without packing. ends: int64[W], rows of a window's lane up to
        and with the window."""
        super().__init__(data.order, key)
        self.records, self.bins, self.ends = np.asarray(records), np.asarray(bins), np.asarray(ends)
        self.num_records, self.data, self.counts = len(records), data, counts
        self._packs_all = data.packing and counts.row_tokens is not None
        self._sample_ends = np.zeros(0, np.int64)  # [R], of the permuted records
        if self._packs_all:
            self._sample_ends = np.cumsum(np.asarray(counts.num_samples[self.records]), dtype=np.int64)
        self._lane_ends = [self.ends[lane :: self.order.lanes] for lane in range(self.order.lanes)]
        self._lengths = [int(ends[-1]) if len(ends) else 0 for ends in self._lane_ends]

    @classmethod
    def make(cls, counts: TokenCounts, data: DataConfig, key: PlanKey) -> RowPlan:
        """Deal the entry's records to windows, and pack these. Validation data keeps one order in all epochs."""
        num_records = len(counts.num_samples)
        shuffle = key64("records", data.order.seed, key.split, key.shuffle_epoch, key.entry)
        records = keyed_permutation(num_records, shuffle)
        full_rows = data.max_seq_len if data.packing else 1
        size = counts.total_tokens if data.packing else counts.total_samples
        num_windows = max(size // (data.order.window_rows * full_rows), -(-num_records // MAX_WINDOW_ITEMS), 1)
        bounds = window_bounds(num_records, min(num_windows, max(num_records, 1)))
        num_samples = np.asarray(counts.num_samples[records])
        bins = np.zeros(0, np.uint16)
        if data.packing and counts.row_tokens is not None:
            before = np.concatenate(([0], np.cumsum(num_samples, dtype=np.int64)))
            while np.diff(before[bounds]).max(initial=0) > MAX_WINDOW_ITEMS and len(bounds) <= num_records:
                bounds = window_bounds(num_records, min(2 * len(bounds), num_records))
            bins, rows = pack_windows(counts.lengths(records), before[bounds], data.max_seq_len)
            num_samples = np.zeros_like(num_samples)  # none is a row by itself
        elif data.packing:
            bins, rows = pack_windows(counts.last_lengths(records), bounds, data.max_seq_len)
            num_samples = np.where(num_samples > 0, num_samples - 1, 0)  # the others are rows by themselves
        else:
            rows = np.zeros(len(bounds) - 1, np.int64)
        before = np.concatenate(([0], np.cumsum(num_samples, dtype=np.int64)))
        rows = rows + before[bounds[1:]] - before[bounds[:-1]]
        ends = np.empty_like(rows)
        for lane in range(data.order.lanes):
            ends[lane :: data.order.lanes] = np.cumsum(rows[lane :: data.order.lanes])
        return cls(records, bins, ends, counts, data, key)

    def save(self, folder: Path) -> None:
        """Write the three arrays where `load` finds them; `ends` last: its presence means that all are there."""
        save_array(folder, self, "records", self.records)
        save_array(folder, self, "bins", self.bins)
        save_array(folder, self, "ends", self.ends)

    @staticmethod
    def exists(folder: Path, key: PlanKey) -> bool:
        """Whether the saved plan is a RowPlan."""
        return plan_file(folder, key, "bins").exists()

    @classmethod
    def load(cls, folder: Path, counts: TokenCounts, data: DataConfig, key: PlanKey) -> RowPlan:
        """The saved plan, its arrays mapped from the files so that all workers of a host share them."""
        records, bins, ends = (
            np.load(plan_file(folder, key, name), mmap_mode="r") for name in ("records", "bins", "ends")
        )
        return cls(records, bins, ends, counts, data, key)

    def lane_length(self, lane: int) -> int:
        """Rows of one of the entry's lanes; 0 where there are fewer windows than lanes."""
        return self._lengths[lane]

    def _find(self, lane: int, position: int) -> tuple[int, int, int]:
        number = int(np.searchsorted(self._lane_ends[lane], position, side="right"))
        window = number * self.order.lanes + lane
        first, last = (self.num_records * w // len(self.ends) for w in (window, window + 1))
        return number, first, last

    def _layout(self, lane: int, number: int, first: int, last: int) -> Window:
        ends = self._lane_ends[lane]
        start, stop = int(ends[number - 1]) if number else 0, int(ends[number])
        key = self._window_key(lane, number)
        records = self.records[first:last]
        num_samples = np.asarray(self.counts.num_samples[records]).astype(np.int64)
        record_of = np.repeat(np.arange(last - first), num_samples)  # [n]
        begins = np.cumsum(num_samples) - num_samples
        sample_of = np.arange(len(record_of)) - begins[record_of]
        if self.data.packing:
            if self._packs_all:
                begin = int(self._sample_ends[first - 1]) if first else 0
                is_packed, bins = np.ones(len(record_of), np.bool_), self.bins[begin : begin + len(record_of)]
            else:
                is_packed, bins = sample_of == num_samples[record_of] - 1, self.bins[first:last][num_samples > 0]
            row_of = np.empty(len(record_of), np.int64)
            row_of[is_packed] = bins
            row_of[~is_packed] = stop - start - np.arange(int((~is_packed).sum()), 0, -1)  # behind the packed rows
            place = np.empty(stop - start, np.int64)
            place[keyed_permutation(stop - start, key)] = np.arange(stop - start)
            row_of = place[row_of]
            order = np.argsort(row_of, kind="stable")
            row_ends = np.cumsum(np.bincount(row_of, minlength=stop - start))
        else:
            lengths = self.counts.lengths(records)
            order = group_by_length(lengths, start, self.order.cell, key)
            row_of = np.empty(len(order), np.int64)
            row_of[order] = np.arange(len(order))
            row_ends = None
        first_use = np.full(last - first, stop, np.int64)
        np.minimum.at(first_use, record_of, start + row_of)
        record_of, sample_of = record_of[order], sample_of[order].astype(np.uint32)
        return Window(start, stop, records, records[record_of], sample_of, first_use, row_ends)


def window_bounds(num_records: int, num_windows: int) -> NDArray[np.int64]:
    """int64[W + 1]: window w holds the records [bounds[w], bounds[w + 1]); sizes differ by one at most."""
    return np.arange(num_windows + 1, dtype=np.int64) * num_records // num_windows


def group_by_length(lengths: NDArray[np.uint32], start: int, cell: int, key: int) -> NDArray[np.int64]:
    """int64[n]: samples of lengths uint32[n] in an order whose cells, counted from lane position `start`, hold similar lengths.

    The samples are sorted by length (equal ones by chance) and cut into cells; which cell comes when is chance too.
    """
    count = len(lengths)
    shuffled = keyed_permutation(count, key)
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    cuts = np.unique(
        np.clip(np.arange(-(start % cell), count + cell, cell), 0, count)
    )  # the lane's cells inside the window
    sizes = np.diff(cuts)
    order = keyed_permutation(len(sizes), key)
    begins = np.empty(len(sizes), np.int64)
    begins[order] = np.cumsum(sizes[order]) - sizes[order]  # where in `by_length` each cell's samples begin
    places = np.arange(count) - np.repeat(cuts[:-1], sizes) + np.repeat(begins, sizes)
    return by_length[places].astype(np.int64)
