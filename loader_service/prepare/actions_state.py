"""Counting a part's actions for the cache: what was seen, and how much of the sample can matter later.

The parts of a large source would together keep far more actions than the fit's sample takes. A part with a share of the bytes
has about that share of the sample: so it keeps four times as many, those with the smallest hashes, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from stoker_proto.actions.statistics import StatisticsAccumulator
from stoker_proto.errors import DataError

SAMPLE_CAPACITY = 65_536
"""Actions in the sample that quantiles and codec are fitted on."""
_MIN_KEEP = 256
_MARGIN = 4
_BATCH_RECORDS = 256


def actions_to_keep(part_bytes: int, entry_bytes: int) -> int:
    """Actions that a part of the entry contributes to the sample at most: a power of two.

    >>> actions_to_keep(16 << 20, 16 << 30), actions_to_keep(100, 100)
    (256, 65536)
    """
    wanted = _MARGIN * SAMPLE_CAPACITY * part_bytes / max(entry_bytes, 1)
    keep = _MIN_KEEP
    while keep < wanted and keep < SAMPLE_CAPACITY:
        keep *= 2
    return keep


class ActionCounter:
    """Feeds actions to the statistics in batches, as a numpy call costs as much for 50 actions as for 5,000.

    An action's key is the part's digest plus its number in the part: a function of content alone.
    """

    def __init__(self, shard: str, base: int) -> None:
        self.shard, self.base = shard, np.uint64(base)
        self.count = 0
        self.batch: list[NDArray[np.float32]] = []
        self.accumulator: StatisticsAccumulator | None = None

    def add(self, actions: NDArray[np.float32]) -> None:
        """actions: float32[T, D]."""
        self.batch.append(actions)
        if len(self.batch) == _BATCH_RECORDS:
            self._flush()

    def finish(self) -> StatisticsAccumulator | None:
        """None if there were no actions."""
        self._flush()
        return self.accumulator

    def _flush(self) -> None:
        batch = [actions for actions in self.batch if len(actions)]
        self.batch = []
        if not batch:
            return
        check_same_width((actions.shape[-1] for actions in batch), self.shard, self.accumulator)
        rows = np.concatenate(batch)
        if self.accumulator is None:
            self.accumulator = StatisticsAccumulator(rows.shape[1])
        keys = self.base + np.arange(self.count, self.count + len(rows), dtype=np.uint64)
        self.accumulator.add(rows, keys)
        self.count += len(rows)


def check_same_width(widths: Iterable[int], file: str, before: StatisticsAccumulator | None) -> None:
    """Raises DataError unless all actions have the same number of dimensions."""
    expected = None if before is None else before.dim
    for width in widths:
        if expected is not None and width != expected:
            raise DataError(
                f"actions of {width} dimensions, and of {expected} elsewhere: all train data shares one action codec, "
                "so all of it needs the same number",
                file=file,
                field="actions",
            )
        expected = width
