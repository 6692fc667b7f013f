"""What every plan of an epoch is: lanes of rows, in windows, and which samples of which records a row holds.

There are two kinds: `record_plan.RecordPlan` (a row is a sample; records are dealt to lanes) and `row_plan.RowPlan` (rows of
text, packed or of similar length; windows are dealt to lanes).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stoker_proto.config import OrderConfig
from stoker_proto.errors import LocalProtocolError
from stoker_proto.hashing import key64, keyed_hashes
from stoker_proto.host.files import whole_file
from stoker_proto.order.lanes import TIME_END

FIRST_LANES = 4
"""Lanes that begin together at the start of a staggered epoch."""
_RECORDS_BETWEEN_LANES = 4  # rows of so many records are trained before the next lane begins ...
_LAST_START = 0.5  # ... but all lanes have begun when this share of the epoch is trained
_MAX_LAYOUTS = 512  # window layouts kept; one is a few KB


class PlanKey(NamedTuple):
    """Which plan: one entry of one split in one epoch."""

    split: str
    epoch: int
    entry: int

    @property
    def shuffle_epoch(self) -> int:
        """The epoch as permutations see it: validation data keeps one order."""
        return self.epoch if self.split == "train" else 0


class SampleRef(NamedTuple):
    """One sample: which record of the entry, and which of the record's samples."""

    record: int
    sample: int


class Rows(NamedTuple):
    """Rows of a lane, one after another."""

    samples: list[tuple[int, int]]
    """(record, sample) of the samples of all rows, one after another: what a SampleRef names. Plain pairs cost half as much."""
    row_samples: list[int] | None
    """How many samples each row has; None: one each."""


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive records of a lane, and their samples in training order. R records, n samples."""

    start: int
    """Lane position of its first row."""
    stop: int
    """Lane position after its last row."""
    records: NDArray[np.uint32]  # [R], numbers in the entry
    record_of: NDArray[np.uint32]  # [n]: record in the entry of each sample in training order
    sample_of: NDArray[np.uint32]  # [n]: which sample of that record
    first_use: NDArray[np.int64]  # [R]: lane position at which each record is first needed (past the end: never)
    row_ends: NDArray[np.int64] | None = None  # [stop - start]: samples up to and with each row; None: one each


class LanePlan(ABC):
    """One entry of one split in one epoch: `lane_lengths`, and the samples of any run of a lane."""

    num_records: int

    def __init__(self, order: OrderConfig, key: PlanKey) -> None:
        self.order, self.key = order, key
        self._layouts: OrderedDict[tuple[int, int], Window] = OrderedDict()
        self._current: dict[int, Window] = {}  # lane -> the window that was asked last

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write its arrays where `load` finds them."""

    @abstractmethod
    def lane_length(self, lane: int) -> int:
        """Rows of one of the entry's lanes."""

    @abstractmethod
    def _find(self, lane: int, position: int) -> tuple[int, int, int]:
        """(number, first, last): the window of a lane that holds a row, and its records [first, last) in the plan's arrays."""

    @abstractmethod
    def _layout(self, lane: int, number: int, first: int, last: int) -> Window:
        """That window."""

    def _window_key(self, lane: int, number: int) -> int:
        """Of the permutation of a window's samples."""
        key = self.key
        return key64("window", self.order.seed, key.split, key.shuffle_epoch, key.entry, lane, number)

    @property
    def is_staggered(self) -> bool:
        """Whether lanes begin one after another, because nothing was decoded before: a run's first epoch, and validation."""
        return self.key.epoch == 0 or self.key.split != "train"

    def lane_lengths(self) -> list[int]:
        """Rows of each of the entry's lanes."""
        return [self.lane_length(lane) for lane in range(self.order.lanes)]

    def lane_starts(self) -> list[int]:
        """Start of each lane of the entry, in units of 2**-32 of the epoch; see `stoker_proto.order.lanes`."""
        lengths = self.lane_lengths()
        if not self.is_staggered or not any(lengths):
            return [0] * len(lengths)
        return staggered_starts(lengths, sum(lengths) / self.num_records)

    def rows(self, lane: int, start: int, count: int) -> Rows:
        """The rows [start, start + count) of a lane, in training order."""
        samples: list[tuple[int, int]] = []
        row_samples: list[int] | None = None
        while count > 0:
            window = self.window_at(lane, start)
            low, high = start - window.start, min(start + count, window.stop) - window.start
            start, count = start + high - low, count - (high - low)
            if window.row_ends is not None:
                ends = np.concatenate(([0], window.row_ends))[low : high + 1]
                row_samples = (row_samples or []) + np.diff(ends).tolist()
                low, high = int(ends[0]), int(ends[-1])
            samples += zip(window.record_of[low:high].tolist(), window.sample_of[low:high].tolist(), strict=True)
        return Rows(samples, row_samples)

    def window_at(self, lane: int, position: int) -> Window:
        """The window that holds a row of a lane."""
        current = self._current.get(lane)
        if current is not None and current.start <= position < current.stop:
            return current
        if not 0 <= position < self.lane_length(lane):
            raise LocalProtocolError(f"lane {lane} of entry {self.key.entry} has no row {position}")
        number, first, last = self._find(lane, position)
        layout = self._layouts.get((lane, number))
        if layout is None:
            layout = self._layout(lane, number, first, last)
            self._layouts[lane, number] = layout
            if len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.popitem(last=False)
        self._current[lane] = layout
        return layout


def plan_file(folder: Path, key: PlanKey, name: str) -> Path:
    """Path of one array of a plan."""
    return folder / f"plan-{key.split}-{key.epoch}-{key.entry}-{name}.npy"


def save_array(folder: Path, plan: LanePlan, name: str, array: NDArray[np.generic]) -> None:
    """Write one array of a plan; a reader sees all of it or nothing."""
    with whole_file(plan_file(folder, plan.key, name)) as unfinished, unfinished.open("wb") as file:
        np.save(file, array)


def staggered_starts(lengths: Sequence[int], rows_per_record: float) -> list[int]:
    """Start of each lane, in units of 2**-32 of the epoch: a new lane begins after a fixed number of trained rows, so that its
    first record is needed only then. Plain float64 arithmetic in a fixed order: the same on every machine.

    0 <= start < 2**32, ascending over the lanes that have rows. If the first lanes are so short that the epoch would end before
    all lanes have begun, the others begin at even distances at the latest.
    """
    used = [lane for lane, length in enumerate(lengths) if length]
    late = max(1, len(used) - FIRST_LANES)
    distance = min(_RECORDS_BETWEEN_LANES * rows_per_record, _LAST_START * sum(lengths) / late)
    times = _late_times([lengths[lane] for lane in used], distance)
    if len(times) < len(used):
        times = _late_times([lengths[lane] for lane in used], distance, at_most=_LAST_START / late)
    starts = [0] * len(lengths)
    for lane, time in zip(used, times, strict=True):
        starts[lane] = int(time * TIME_END)
    return starts


def _late_times(lengths: Sequence[int], distance: float, at_most: float = math.inf) -> list[float]:
    """Start times in [0, 1) of lanes of these lengths, none of them 0; lanes that would begin after the epoch's end are left out.

    A lane begins `distance` rows after the one before it, and the n-th late lane at time n * `at_most` at the latest."""
    times: list[float] = []
    time = rate = 0.0  # rate: rows per unit of time, of the lanes that have begun
    for number, length in enumerate(lengths):
        if number >= FIRST_LANES:
            time = min(time + distance / rate, at_most * (number + 1 - FIRST_LANES))
        if time >= 1:
            break
        times.append(time)
        rate += length / (1.0 - time)
    return times


def keyed_permutation(count: int, key: int) -> NDArray[np.uint32]:
    """uint32[count]: the numbers 0..count-1 in the order that the 64-bit key decides. count < 2**32.

    Numbers are sorted by their splitmix64 hash under the key. The hash is a bijection of uint64, so there are no ties, and any
    sorting algorithm returns the same order; NumPy's own generators promise no such thing from version to version.
    """
    return np.argsort(keyed_hashes(count, key)).astype(np.uint32)
