"""Which stream positions a rank trains, as a pure function: no state, any step can be computed.

With G rows per optimizer step, micro-batches of m rows and W ranks, a step has A = G / (m W) passes. Step s of an epoch
entered at sample `first` trains stream positions first + s G + [0, G), and of these micro-batch a of rank r is

    first + s G + (a W + r) m + [0, m)        clipped at the epoch's end; padding rows fill the rest

so the concatenation over (a, r) has the same rows for every world size and micro-batch size.

    G 8, m 2, W 2, first 0, epoch of 11 samples:   step 0   rank 0: [0,2) [4,6)    rank 1: [2,4) [6,8)
                                                   step 1   rank 0: [8,10) []      rank 1: [10,11) []
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from itertools import accumulate

from stoker_proto.config import check_batch_arithmetic
from stoker_proto.errors import LocalProtocolError
from stoker_proto.order.lanes import LaneRun, Order
from stoker_proto.order.mixture import MixedOrder
from stoker_proto.order.stream import Share

_AHEAD = 4096
"""Stream positions that are computed together: a bisection over time costs as much as 500 cells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One micro-batch of one rank: stream positions [start, start + num_rows) of an epoch, as runs of lanes."""

    epoch: int
    step: int
    """Counted from the sample at which the epoch was entered."""
    index: int
    """a: which micro-batch of the step on this rank, from 0."""
    start: int
    num_rows: int
    """Samples; fewer than the micro-batch size only at the epoch's end."""
    runs: tuple[LaneRun, ...]


@dataclass(slots=True)
class SlicePosition:
    """The next slice to ask for."""

    session: int
    epoch: int
    first: int
    step: int
    index: int
    num_epochs: int
    """The first epoch that is no longer entered."""


def num_steps(num_samples: int, first: int, global_batch_size: int) -> int:
    """Optimizer steps from sample `first` to the end of an epoch; the last may be partly padding.

    >>> num_steps(11, 0, 8), num_steps(11, 8, 8), num_steps(11, 11, 8)
    (2, 1, 0)
    """
    return -(-max(num_samples - first, 0) // global_batch_size)


class RunsAhead:
    """Runs of an epoch's stream, computed for many positions at once and then given out in parts."""

    def __init__(self, order: Order | MixedOrder) -> None:
        self._order = order
        self._first = self._last = 0  # stream positions that are known
        self._runs: list[LaneRun] = []
        self._ends: list[int] = []  # stream position behind each run

    def runs(self, start: int, stop: int) -> list[LaneRun]:
        """As `Order.runs`."""
        if not self._first <= start <= stop <= self._last:
            last = max(stop, min(start + _AHEAD, self._order.total))
            self._runs = self._order.runs(start, last)
            self._first, self._last = start, last
            self._ends = list(accumulate((run.count for run in self._runs), initial=start))[1:]
        found: list[LaneRun] = []
        position, number = start, bisect.bisect_right(self._ends, start)
        while position < stop:
            run, end = self._runs[number], self._ends[number]
            count, skipped = min(stop, end) - position, position - (end - run.count)
            found.append(run if count == run.count else replace(run, start=run.start + skipped, count=count))
            position, number = position + count, number + 1
        return found


class Schedule:
    """The slices of one rank in one epoch. Not thread-safe."""

    def __init__(
        self,
        order: Order | MixedOrder,
        *,
        epoch: int,
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int,
        rank: int,
    ) -> None:
        """Raises ConfigError where the global batch does not divide, LocalProtocolError for a rank outside the world."""
        if not 0 <= rank < world_size:
            raise LocalProtocolError(f"rank {rank} of {world_size} ranks: ranks are 0 to {world_size - 1}")
        self.passes = check_batch_arithmetic(global_batch_size, micro_batch_size, world_size)
        self.order, self.epoch, self._ahead = order, epoch, RunsAhead(order)
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.world_size, self.rank = world_size, rank

    def num_steps(self, first: int) -> int:
        """Optimizer steps from sample `first` to the epoch's end."""
        return num_steps(self.order.total, first, self.global_batch_size)

    def slice(self, first: int, step: int, index: int) -> Slice:
        """Micro-batch `index` of step `step`, the epoch being entered at sample `first`."""
        if not (first >= 0 and step >= 0 and 0 <= index < self.passes):
            raise LocalProtocolError(
                f"slice {index} of step {step} from sample {first}: slices are 0 to {self.passes - 1}"
            )
        share = Share(world_size=self.world_size, micro_batch_size=self.micro_batch_size)
        begin = first + step * self.global_batch_size
        start, stop = share.positions(begin, self.rank, index, self.order.total)
        return Slice(
            epoch=self.epoch,
            step=step,
            index=index,
            start=start,
            num_rows=stop - start,
            runs=tuple(self._ahead.runs(start, stop)),
        )
