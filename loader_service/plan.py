"""Steps 1 and 2 of the order: an entry's records -> lanes, a lane's records -> windows -> samples.

    16 records, 2 lanes:   permuted 7 3 12 0 9 ...   ->   lane 0: 7 12 9 ...   lane 1: 3 0 ...
    lane 0, window_records 4, first epoch:   [7] [12 9] [1 4 6] [1 + lane % W] [4 records] [4 records] ...
             any later epoch:                [1 + lane % W] [4 records] [4 records] ...

An `EpochPlan` is two arrays over the records, 8 bytes each record, and answers "which samples are [start, start + count) of
lane l?" by bisection. The front makes it, saves it, and the workers map the same pages.

In the first epoch of a run (and in validation, where the order does not matter) nothing was decoded before, so lanes begin
one after another and their windows grow from one record to `window_records`: the records that are needed then never run far
ahead of the samples that are trained. Later epochs begin with full windows: the loader reads them ahead while the epoch
before ends. One window of each lane has a length that depends on the lane, so that they do not turn over at the same moment.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loader_service.permutation import keyed_permutation
from stoker_proto.config import OrderConfig
from stoker_proto.errors import DataError, LocalProtocolError
from stoker_proto.hashing import key64
from stoker_proto.order import TIME_END

PLAN_VERSION = 2
_FIRST_LANES = 4  # that begin with the epoch
_RECORDS_BETWEEN_LANES = 4  # samples of so many records are trained before the next lane begins ...
_LAST_START = 0.5  # ... but all lanes have begun when this share of the epoch is trained
_MAX_LAYOUTS = 512  # window layouts kept; one is a few KB


class SampleRef(NamedTuple):
    """One sample: which record of the entry, and which of the record's samples."""

    record: int
    sample: int


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive records of a lane, and their samples in training order."""

    start: int
    """Lane position of its first sample."""
    records: NDArray[np.uint32]  # [R], numbers in the entry
    record_of: NDArray[np.uint32]  # [n]: record in the entry of each sample in training order
    sample_of: NDArray[np.uint32]  # [n]: which sample of that record
    first_use: NDArray[np.int64]  # [R]: lane position at which each record is first needed (past the end: never)

    @property
    def stop(self) -> int:
        """Lane position after its last sample."""
        return self.start + len(self.record_of)


class EpochPlan:
    """One entry of one split in one epoch: `lane_lengths`, and the samples of any run of a lane."""

    def __init__(
        self,
        records: NDArray[np.uint32],
        ends: NDArray[np.uint32],
        order: OrderConfig,
        *,
        split: str,
        epoch: int,
        entry: int,
    ) -> None:
        """records, ends: uint32[R] in lane-major order; ends counts the samples of its lane up to and with the record."""
        # Plain arrays: indexing a memmap makes a memmap, at ten times the cost.
        self.records, self.ends, self.order = np.asarray(records), np.asarray(ends), order
        self.split, self.epoch, self.entry = split, epoch, entry
        # Lane l holds every lanes-th record of the permutation from l on.
        sizes = [len(range(lane, len(records), order.lanes)) for lane in range(order.lanes)]
        self._bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)  # [L + 1]
        self._layouts: OrderedDict[tuple[int, int], Window] = OrderedDict()
        self._current: dict[int, Window] = {}  # lane -> the window that was asked last

    @classmethod
    def make(
        cls, num_samples: NDArray[np.uint32], order: OrderConfig, *, split: str, epoch: int, entry: int
    ) -> EpochPlan:
        """Deal the entry's records, num_samples uint32[R], to its lanes. Validation data keeps one order in all epochs."""
        key = key64("records", order.seed, split, epoch if split == "train" else 0, entry)
        permutation = keyed_permutation(len(num_samples), key)
        lanes = [permutation[lane :: order.lanes] for lane in range(order.lanes)]
        ends = np.empty(len(num_samples), np.uint32)
        position = 0
        for records in lanes:
            cumulative = np.cumsum(num_samples[records], dtype=np.int64)
            if len(cumulative) and int(cumulative[-1]) >= 1 << 32:
                raise DataError(f"a lane of {int(cumulative[-1])} samples: at most 2**32; raise data.order.lanes")
            ends[position : position + len(records)] = cumulative
            position += len(records)
        return cls(np.concatenate(lanes), ends, order, split=split, epoch=epoch, entry=entry)

    def save(self, folder: Path) -> None:
        """Write the two arrays where `load` finds them; `ends` last, which says that both are there."""
        for name, array in (("records", self.records), ("ends", self.ends)):
            path = plan_file(folder, self.split, self.epoch, self.entry, name)
            np.save(path.with_suffix(".tmp.npy"), array)
            path.with_suffix(".tmp.npy").rename(path)

    @staticmethod
    def is_saved(folder: Path, split: str, epoch: int, entry: int) -> bool:
        """Whether `load` will find it."""
        return plan_file(folder, split, epoch, entry, "ends").exists()

    @classmethod
    def load(cls, folder: Path, order: OrderConfig, *, split: str, epoch: int, entry: int) -> EpochPlan:
        """The saved plan, its arrays mapped from the file so that all workers of a host share them."""
        records, ends = (
            np.load(plan_file(folder, split, epoch, entry, name), mmap_mode="r") for name in ("records", "ends")
        )
        return cls(records, ends, order, split=split, epoch=epoch, entry=entry)

    def lane_lengths(self) -> list[int]:
        """Samples of each of the entry's lanes."""
        return [self.lane_length(lane) for lane in range(self.order.lanes)]

    def lane_length(self, lane: int) -> int:
        """Samples of one of the entry's lanes."""
        first, last = self._bounds[lane], self._bounds[lane + 1]
        return int(self.ends[last - 1]) if last > first else 0

    @property
    def is_gentle(self) -> bool:
        """Whether lanes begin one after another and windows grow."""
        return self.epoch == 0 or self.split != "train"

    def lane_starts(self) -> list[int]:
        """When each of the entry's lanes begins, in units of 2**-32 of the epoch: see `stoker_proto.order`."""
        lengths = self.lane_lengths()
        if not self.is_gentle or not any(lengths):
            return [0] * len(lengths)
        return gentle_starts(lengths, sum(lengths) / len(self.records))

    def samples(self, lane: int, start: int, count: int) -> list[SampleRef]:
        """The samples [start, start + count) of a lane, in training order."""
        refs: list[SampleRef] = []
        while count > 0:
            window = self.window_at(lane, start)
            low = start - window.start
            high = min(low + count, len(window.record_of))
            refs.extend(map(SampleRef, window.record_of[low:high].tolist(), window.sample_of[low:high].tolist()))
            start, count = start + high - low, count - (high - low)
        return refs

    def window_at(self, lane: int, position: int) -> Window:
        """The window that holds a lane's sample position."""
        current = self._current.get(lane)
        if current is not None and current.start <= position < current.stop:
            return current
        first, last = int(self._bounds[lane]), int(self._bounds[lane + 1])
        ends = self.ends[first:last]
        if not 0 <= position < (int(ends[-1]) if len(ends) else 0):
            raise LocalProtocolError(f"lane {lane} of entry {self.entry} has no sample {position}")
        record = int(np.searchsorted(ends, position, side="right"))
        number, low, high = window_bounds(record, last - first, self.order.window_records, lane, gentle=self.is_gentle)
        layout = self._layouts.get((lane, number))
        if layout is None:
            layout = self._layout(lane, number, low, high)
            self._layouts[lane, number] = layout
            if len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.popitem(last=False)
        self._current[lane] = layout
        return layout

    def _layout(self, lane: int, number: int, low: int, high: int) -> Window:
        base = int(self._bounds[lane])
        ends = self.ends[base + low : base + high].astype(np.int64)
        start = int(self.ends[base + low - 1]) if low else 0
        counts = np.diff(ends, prepend=start)  # [R]
        offsets = ends - counts - start  # [R]: of each record's first sample in the unshuffled window
        epoch = self.epoch if self.split == "train" else 0
        order = keyed_permutation(
            int(counts.sum()), key64("window", self.order.seed, self.split, epoch, self.entry, lane, number)
        )
        record_of = np.repeat(np.arange(high - low, dtype=np.uint32), counts)[order]
        sample_of = (order - offsets[record_of]).astype(np.uint32)
        records = self.records[base + low : base + high]
        first_use = np.full(high - low, start + len(order), np.int64)
        np.minimum.at(first_use, record_of, start + np.arange(len(order)))
        return Window(start, records, records[record_of], sample_of, first_use)


def plan_file(folder: Path, split: str, epoch: int, entry: int, name: str) -> Path:
    """Where one array of a plan is kept."""
    return folder / f"plan-{split}-{epoch}-{entry}-{name}.npy"


def window_bounds(
    record: int, num_records: int, window_records: int, lane: int, *, gentle: bool
) -> tuple[int, int, int]:
    """(number, first, last) of the window that holds a lane's record: sizes 1 + lane % W, W, W, ...; gentle: smaller ones before.

    >>> [window_bounds(record, 100, 3, 1, gentle=True)[1:] for record in (0, 1, 2, 4, 6, 9)]
    [(0, 1), (1, 2), (2, 4), (4, 6), (6, 9), (9, 12)]
    """
    # The lanes that begin together grow at different times: one record 1 + lane % 4 times, then 2, 3, ... W - 1.
    growing = (*[1] * (1 + lane % _FIRST_LANES), *range(2, window_records)) if gentle else ()
    first = 0
    for number, size in enumerate((*growing, 1 + lane % window_records)):
        if record < first + size:
            return number, first, min(first + size, num_records)
        first += size
    extra = (record - first) // window_records
    first += extra * window_records
    return len(growing) + 1 + extra, first, min(first + window_records, num_records)


def gentle_starts(lengths: Sequence[int], samples_per_record: float) -> list[int]:
    """Times, in units of 2**-32, at which lanes of these lengths begin, so that a new one needs its first record only every so
    many samples of the stream. Plain float64 arithmetic in a fixed order: the same on every machine.
    """
    used = [lane for lane, length in enumerate(lengths) if length]
    late = max(1, len(used) - _FIRST_LANES)
    distance = min(_RECORDS_BETWEEN_LANES * samples_per_record, _LAST_START * sum(lengths) / late)
    starts = [0] * len(lengths)
    time = rate = 0.0  # rate: samples per unit of time, of the lanes that have begun
    for number, lane in enumerate(used):
        if number >= _FIRST_LANES:
            time += distance / rate
            starts[lane] = int(time * TIME_END)
        rate += lengths[lane] / (1.0 - time)
    return starts
