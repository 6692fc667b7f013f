"""Which records are decoded next: pure bookkeeping, the threads are in `builder.py`.

Idle threads read ahead the record that is needed soonest over all lanes. Every lane is spread evenly over the epoch, so a record
is due at its first lane position divided by the lane's length: a number that can be compared between lanes.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from loader_service.pieces.record_cache import MAX_EPOCHS, RecordKey
from loader_service.plan.lane_plan import LanePlan


class LaneKey(NamedTuple):
    """One lane of one epoch."""

    split: str
    epoch: int
    entry: int
    lane: int
    """Number inside the entry."""


@dataclass(slots=True)
class _LaneReader:
    plan: LanePlan
    length: int
    asked: int  # lane position up to which tickets have asked
    window: int = -1  # number of the window whose records are being listed
    todo: list[tuple[int, int]] = field(default_factory=list)  # (first use, record), soonest last
    next_start: int = 0  # lane position at which the next window begins
    limit: int = 0  # lane position up to which windows may be listed
    is_over: bool = False  # `asked` has returned True


class ReadAhead:
    """Records to decode before a ticket asks for them: the rest of the current window of every active lane, and its next
    window."""

    def __init__(self) -> None:
        self._lanes: dict[LaneKey, _LaneReader] = {}
        self._epochs: dict[tuple[str, int], OrderedDict[int, None]] = {}  # (split, entry): epochs, the last begun last
        self._heap: list[tuple[int, float, LaneKey]] = []  # (epoch, due, lane)
        self._queued: set[LaneKey] = set()

    def asked(self, lane: LaneKey, plan: LanePlan, length: int, stop: int) -> bool:
        """Note that a ticket asked for the lane's samples up to `stop` (0: no ticket yet, but the first comes soon).

        Returns True once: when `pop` has returned the rest of the lane, so that reading ahead may begin its next epoch.
        """
        if lane not in self._lanes:
            self._forget_for(lane)
            start = max(stop - 1, 0)
            self._lanes[lane] = _LaneReader(plan, length, stop, next_start=plan.window_at(lane.lane, start).start)
        reader = self._lanes[lane]
        reader.asked = max(reader.asked, stop)
        if reader.asked == 0:
            reader.limit = 1  # the first window alone: this epoch has not begun
        elif reader.asked >= length:
            reader.limit = length
        else:
            reader.limit = max(reader.limit, plan.window_at(lane.lane, min(reader.asked, length - 1)).stop + 1)
        self._enqueue(lane, reader)
        is_over = not reader.todo and reader.next_start >= length and not reader.is_over
        reader.is_over = reader.is_over or is_over
        return is_over

    def __len__(self) -> int:
        """Number of lanes in which it reads ahead."""
        return len(self._lanes)

    def peek(self) -> RecordKey | None:
        """The record that is needed soonest and was not popped yet, or None. `RecordKey.epoch` is the lane's epoch."""
        while self._heap:
            lane = self._heap[0][2]
            reader = self._lanes.get(lane)
            if reader is not None and reader.todo:
                return RecordKey(lane.split, lane.epoch, lane.entry, reader.todo[-1][1])
            heapq.heappop(self._heap)
            self._queued.discard(lane)
        return None

    def pop(self) -> RecordKey | None:
        """Remove and return the record of `peek`."""
        key = self.peek()
        if key is not None:
            lane = self._heap[0][2]
            reader = self._lanes[lane]
            reader.todo.pop()
            if reader.todo:
                heapq.heapreplace(self._heap, (lane.epoch, reader.todo[-1][0] / reader.length, lane))
            else:
                heapq.heappop(self._heap)
                self._queued.discard(lane)
                self._enqueue(lane, reader)
        return key

    def _enqueue(self, lane: LaneKey, reader: _LaneReader) -> None:
        if lane in self._queued:
            return
        while not reader.todo and reader.next_start < min(reader.limit, reader.length):
            window = reader.plan.window_at(lane.lane, reader.next_start)
            reader.next_start = window.stop
            uses = zip(window.first_use.tolist(), window.records.tolist(), strict=True)
            reader.todo = sorted(((use, record) for use, record in uses if use < window.stop), reverse=True)
        if reader.todo:
            heapq.heappush(self._heap, (lane.epoch, reader.todo[-1][0] / reader.length, lane))
            self._queued.add(lane)

    def _forget_for(self, lane: LaneKey) -> None:
        """Forget old epochs: ranks are in one epoch of an entry, or at the border between two."""
        epochs = self._epochs.setdefault((lane.split, lane.entry), OrderedDict())
        epochs[lane.epoch] = None
        epochs.move_to_end(lane.epoch)
        old = {epoch for epoch in epochs if epoch < lane.epoch - 1} | set(list(epochs)[:-MAX_EPOCHS])
        if not old:
            return
        for epoch in old:
            del epochs[epoch]
        self._lanes = {
            key: reader for key, reader in self._lanes.items() if key.epoch in self._epochs[key.split, key.entry]
        }
        self._heap = [item for item in self._heap if item[2] in self._lanes]
        heapq.heapify(self._heap)
        self._queued.intersection_update(self._lanes)
