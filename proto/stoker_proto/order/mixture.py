"""Several sources in one stream: which source comes when, and which passes over a source an epoch of the run contains.

Within a source the order of a *pass* is that of `lanes.py` over the lanes of all its entries. Between sources: a source gives n
samples to the epoch, in cells of `data.order.cell`. A cell is due at the time of its middle sample i, which is i / n of the
epoch. So at any time each source is within half a cell of its even share.

    epoch 1, rate 2.5 passes:   second half of pass 2, pass 3, pass 4     (epoch 0 took passes 0, 1 and the first half of 2)

Without weights every epoch is one pass over all sources. With weights an epoch is one pass over the source that lasts longest and
`rate` passes over another. Rates are whole multiples of 2**-32, so all ranks agree. An epoch begins a source where the epoch
before stopped, so every pass of every source is trained exactly once, at any rate.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heapreplace
from itertools import accumulate

from stoker_proto.errors import ConfigError, LocalProtocolError
from stoker_proto.order.lanes import LaneRun, Order

_SCALE = 32  # bits of a fraction of a pass
_TIME = 1 << 48  # the end of the epoch; whole numbers, so that all machines agree
ONE_PASS = 1 << _SCALE
MAX_RATE = 100
"""Most passes over one source in an epoch: each needs a plan."""


@dataclass(frozen=True, slots=True)
class PassShare:
    """The part of one pass that an epoch contains: the fraction [begin, end) of it in units of 2**-32."""

    number: int
    """Number of the pass, from 0."""
    begin: int
    end: int

    def cut(self, num_samples: int) -> tuple[int, int]:
        """The positions [first, last) in a pass of `num_samples`. Neighbouring shares meet without gap or overlap."""
        half = ONE_PASS // 2  # to the nearest: a rate of 2.4 passes is not exactly that in binary
        return (num_samples * self.begin + half) >> _SCALE, (num_samples * self.end + half) >> _SCALE


def pass_shares(rate: int, epoch: int) -> list[PassShare]:
    """The passes of one epoch at `rate` (in units of 2**-32 passes per epoch).

    >>> [(share.number, share.begin / ONE_PASS, share.end / ONE_PASS) for share in pass_shares(5 * ONE_PASS // 2, 1)]
    [(2, 0.5, 1.0), (3, 0.0, 1.0), (4, 0.0, 1.0)]
    """
    first, last = epoch * rate, (epoch + 1) * rate
    return [
        PassShare(number, max(first - (number << _SCALE), 0), min(last - (number << _SCALE), ONE_PASS))
        for number in range(first >> _SCALE, -(-last >> _SCALE))
    ]


def rates(names: Sequence[str], num_samples: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The passes per epoch of each source, in units of 2**-32: 2**32 for the source that lasts longest.

    Args:
        names: for messages.
        num_samples: samples of one pass over each source.
        weights: shares of samples; they need not add up to 1.

    Raises:
        ConfigError: a source would repeat more than `MAX_RATE` times.
    """
    needed = [Fraction(weight) / max(count, 1) for weight, count in zip(weights, num_samples, strict=True)]
    slowest = min(needed)
    found = [round(need / slowest * ONE_PASS) for need in needed]
    for name, rate, count in zip(names, found, num_samples, strict=True):
        if rate > MAX_RATE * ONE_PASS:
            raise ConfigError(
                f"data.sources: {name} with its {count} samples would be repeated {rate / ONE_PASS:.0f} times in each epoch, "
                f"at most {MAX_RATE} times is possible: lower its weight, give it more data, or the largest source less"
            )
    return found


@dataclass(frozen=True, slots=True)
class PassRange:
    """Positions [first, last) of one pass over a source."""

    number: int
    """Number of the pass."""
    order: Order
    """Order of the pass."""
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class SourceRun:
    """Consecutive samples of one source."""

    source: int
    start: int
    """Position among the source's samples of the epoch."""
    count: int


class SourceOrder:
    """The source at any stream position, found by bisection over time without computing the positions before."""

    def __init__(self, counts: Sequence[int], cell: int) -> None:
        """counts: samples of each source in the epoch."""
        self.counts, self.cell = list(counts), cell
        self.total = sum(counts)

    def runs(self, start: int, stop: int) -> list[SourceRun]:
        """Stream positions [start, stop) as runs of sources, in stream order. Raises LocalProtocolError outside the epoch."""
        if not 0 <= start <= stop <= self.total:
            raise LocalProtocolError(f"stream positions [{start}, {stop}) of an epoch of {self.total} samples")
        runs: list[SourceRun] = []
        time = self._last_time(start) if start < stop else 0
        cells = [self._cells_before(source, time) for source in range(len(self.counts))]
        position = sum(map(self._samples, range(len(cells)), cells))
        queue = [(self._due(source, cell), source, cell) for source, cell in enumerate(cells)]
        heapify(queue)
        while position < stop:
            _, source, cell = queue[0]
            heapreplace(queue, (self._due(source, cell + 1), source, cell + 1))
            low, high = self._samples(source, cell), self._samples(source, cell + 1)
            first, last = max(low, low + start - position), min(high, low + stop - position)
            if first < last:
                runs.append(SourceRun(source, first, last - first))
            position += high - low
        return runs

    def _samples(self, source: int, cells: int) -> int:
        return min(cells * self.cell, self.counts[source])

    def _due(self, source: int, cell: int) -> int:
        """The due time of a cell's middle; a time beyond the epoch where there is no such cell."""
        low, high = self._samples(source, cell), self._samples(source, cell + 1)
        return (low + high) * _TIME // (2 * self.counts[source]) if low < high else 2 * _TIME

    def _cells_before(self, source: int, time: int) -> int:
        """Number of the source's cells that are due before a time."""
        count, cell = self.counts[source], self.cell
        if not count:
            return 0
        full = count // cell  # cell k < full is due at (2k + 1) cell / 2 count
        cells = -(-(2 * count * time - cell * _TIME) // (2 * cell * _TIME))
        if cells < full:
            return max(cells, 0)
        return full + (full * cell < count and self._due(source, full) < time)

    def _last_time(self, position: int) -> int:
        """The largest time before which at most `position` samples are due; position < total."""
        slack = self.cell * len(self.counts)
        low = max(
            (position - slack) * _TIME // self.total, 0
        )  # samples due before `low` <= position, before `high` more
        high = min((position + slack + 1) * _TIME // self.total + 1, 2 * _TIME)
        while high - low > 1:
            middle = (low + high) // 2
            if sum(self._samples(n, self._cells_before(n, middle)) for n in range(len(self.counts))) <= position:
                low = middle
            else:
                high = middle
        return low


class MixedOrder:
    """The stream of one epoch of the run: `total` samples. `runs(a, b)` returns stream positions [a, b) as runs of lanes."""

    def __init__(self, sources: Sequence[Sequence[PassRange]], lanes: Sequence[Sequence[int]], cell: int) -> None:
        """Args:
        sources: of each source the ranges of passes that this epoch contains, in order.
        lanes: of each source the stream's numbers of its lanes, in the order of the lengths in `PassRange.order`.
        cell: consecutive samples of one source before the stream moves on to the next source.
        """
        self._sources, self._lanes = sources, lanes
        self._ends = [list(accumulate(part.last - part.first for part in parts)) for parts in sources]
        self._source_order = SourceOrder([ends[-1] if ends else 0 for ends in self._ends], cell)
        self.total = self._source_order.total

    @property
    def counts(self) -> list[int]:
        """Number of samples of each source in this epoch."""
        return self._source_order.counts

    def runs(self, start: int, stop: int) -> list[LaneRun]:
        """Stream positions [start, stop) as runs, in stream order."""
        turns = self._source_order.runs(start, stop) if len(self._sources) > 1 else [SourceRun(0, start, stop - start)]
        return [run for turn in turns for run in self._of_source(turn.source, turn.start, turn.start + turn.count)]

    def _of_source(self, source: int, start: int, stop: int) -> list[LaneRun]:
        """Positions [start, stop) among a source's samples of this epoch, as runs of its lanes."""
        ends, lanes, runs = self._ends[source], self._lanes[source], []
        number = bisect.bisect_right(ends, start)
        while start < stop:
            part = self._sources[source][number]
            offset = part.first - (ends[number - 1] if number else 0)
            last = min(stop, ends[number])
            runs += [
                LaneRun(lanes[run.lane], run.start, run.count, part.number)
                for run in part.order.runs(start + offset, last + offset)
            ]
            start, number = last, number + 1
        return runs
