"""The epoch's stream of samples, computed from the lengths of its lanes: the order that loaders and trainers must agree on.

Lane l holds `lengths[l]` samples, cut into cells of `cell` samples (its last cell may be shorter). Cell k of a lane of n
cells is due at the time (2k + 1) / 2n of the epoch, a fraction in (0, 1). The stream takes the cells by due time, and cells with
the same due time by lane. So each lane is spread evenly over the whole epoch, lanes of equal length take turns, and all end
together:

    lengths [4, 2], cell 1:   due times 1/8 3/8 5/8 7/8 and 1/4 3/4   ->   lanes 0 1 0 0 1 0

A lane may begin later than the epoch: with a start s in [0, 1) its cells are spread over (s, 1) instead. In a run's first epoch
the loader's plan starts lanes one after another, so that the first batches need few decoded records.

Due times are compared as integers (scaled by 2**32 and truncated), so every machine finds the same order. A position is found by
bisection over time: no list of all cells is made, and memory is one array of lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stoker_proto.config import DataConfig
from stoker_proto.errors import LocalProtocolError
from stoker_proto.hashing import fingerprint

ORDER_VERSION = 3
"""Version of the rule above. Raise it when the same lengths give another stream."""
_SCALE = 32  # bits of a due time
TIME_END = 1 << _SCALE
"""The end of the epoch, in units of due times."""
MAX_CELLS = 1 << 29  # per lane, so that (2k + 1) << 32 stays inside int64


@dataclass(frozen=True, slots=True)
class LaneRun:
    """Samples [start, start + count) of one lane, as one ticket requests them."""

    lane: int
    start: int
    count: int
    epoch: int = 0
    """Number of the pass over the lane's data, which loaders call epoch (`stoker_proto.order.mixture`)."""


def order_fingerprint(data: DataConfig) -> str:
    """Fingerprint of everything in the config that determines the stream, and so the meaning of a checkpoint's position."""
    mixture = [[source.weight, len(source.paths)] for source in data.all_sources()]
    rows: dict[str, int] = {"packing": data.packing, "group_by_length": data.group_by_length}
    if data.packing:
        rows["max_seq_len"] = data.max_seq_len
    tree = {"version": ORDER_VERSION, "order": dataclasses.asdict(data.order), "sources": mixture, "rows": rows}
    return fingerprint({**tree, "weigh_by": data.weigh_by} if len(mixture) > 1 else tree)


class Order:
    """The stream of one epoch: `total` samples. `runs(a, b)` returns stream positions [a, b) as runs of lanes."""

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        cell: int,
        starts: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> None:
        """Args:
            lengths: int64[L], samples of each lane.
            cell: consecutive samples of a lane before the stream moves on to the next lane.
            starts: int64[L], times in units of 2**-32 of the epoch at which the lanes begin; default: 0.

        Raises:
            LocalProtocolError: a negative length, a cell below 1, too many cells, or a wrong start.
        """
        self.lengths = np.asarray(lengths, dtype=np.int64)  # [L]
        self.cell = cell
        if cell < 1 or (self.lengths.size and int(self.lengths.min()) < 0):
            raise LocalProtocolError(
                f"lane lengths {self.lengths.tolist()} and cell {cell}: lengths >= 0 and cell >= 1"
            )
        self.num_cells = -(-self.lengths // cell)  # [L]
        if self.lengths.size and int(self.num_cells.max()) >= MAX_CELLS:
            raise LocalProtocolError(
                f"a lane of {int(self.lengths.max())} samples: at most {MAX_CELLS} cells; use more lanes"
            )
        self.starts = np.zeros_like(self.lengths) if starts is None else np.asarray(starts, dtype=np.int64)  # [L]
        if self.starts.shape != self.lengths.shape or ((self.starts < 0) | (self.starts >= TIME_END)).any():
            raise LocalProtocolError(f"{self.starts.size} starts of {self.lengths.size} lanes: one each, in [0, 2**32)")
        self._spans = TIME_END - self.starts  # [L]
        self._twice_cells, self._twice_spans, self._round_up = 2 * self.num_cells, 2 * self._spans, self._spans - 1
        self._all_at_once = not self.starts.any()
        self.total = int(self.lengths.sum())

    def runs(self, start: int, stop: int) -> list[LaneRun]:
        """Stream positions [start, stop) as runs, in stream order. Raises LocalProtocolError outside the epoch."""
        if not 0 <= start <= stop <= self.total:
            raise LocalProtocolError(f"stream positions [{start}, {stop}) of an epoch of {self.total} samples")
        if start == stop:
            return []
        before = self._cells_due_before(self._last_time(start))  # [L]: the cells wholly before `start`
        after = self._cells_due_before(self._last_time(stop - 1) + 1)  # [L]: the cells that reach `stop`
        counts = after - before
        lanes = np.repeat(np.arange(len(counts)), counts)  # [C]: the cells between the two, in any order
        cells = np.arange(len(lanes)) + np.repeat(before - (np.cumsum(counts) - counts), counts)
        due = self.starts[lanes] + (2 * cells + 1) * self._spans[lanes] // (2 * self.num_cells[lanes])
        by_due = np.lexsort((lanes, due))
        lanes, lows = lanes[by_due], cells[by_due] * self.cell
        sizes = np.minimum(self.cell, self.lengths[lanes] - lows)
        ends = self._samples(before) + np.cumsum(sizes)  # [C]: stream positions
        first = np.maximum(start - (ends - sizes), 0)  # [C]: samples cut off at the front ...
        last = np.minimum(sizes, stop - (ends - sizes))  # ... and at the back
        inside = np.flatnonzero(first < last)
        columns = (lanes[inside], (lows + first)[inside], (last - first)[inside])
        return [LaneRun(*run) for run in zip(*(column.tolist() for column in columns), strict=True)]

    def _last_time(self, position: int) -> int:
        """The largest time before which at most `position` samples are due; position < total.

        By the time t in (0, 1) a lane of n cells has given n t cells, plus or minus one half, and its last cell may be short. So
        the samples by t are total t, plus or minus one and a half cells of each lane. The bisection searches this interval; where
        lanes begin at different times, it searches the whole epoch.
        """
        low, high = 0, TIME_END  # invariant: at most `position` samples are due before `low`, and more before `high`
        if self._all_at_once:
            slack = 2 * self.cell * int(np.count_nonzero(self.lengths))
            low = max(((position - slack) << _SCALE) // self.total, low)
            high = min(((position + slack) << _SCALE) // self.total + 1, high)
        while high - low > 1:
            middle = (low + high) // 2
            if self._samples(self._cells_due_before(middle)) <= position:
                low = middle
            else:
                high = middle
        return low

    def _cells_due_before(self, time: int) -> NDArray[np.int64]:
        """int64[L]: the cells k of each lane with due(k) < time, i.e. (2k + 1) span < 2 n (time - start); time <= TIME_END.

        That is ceil((2 n (time - start) - span) / (2 span)). It works in place, and without a division where all lanes have the
        span 2**32: a bisection calls it some thirty times, and there may be 10,000 lanes.
        """
        if self._all_at_once:
            cells: NDArray[np.int64] = self._twice_cells * time  # < 2**62: see MAX_CELLS
            cells += TIME_END - 1
            cells >>= _SCALE + 1
            return cells
        cells = self._twice_cells * (time - self.starts)
        cells += self._round_up
        cells //= self._twice_spans
        np.maximum(cells, 0, out=cells)
        return cells

    def _samples(self, cells: NDArray[np.int64]) -> int:
        return int(np.minimum(cells * self.cell, self.lengths).sum())
