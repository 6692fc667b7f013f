"""Which records are decoded next, and which decoded ones are kept: pure bookkeeping, the threads are in `worker.py`.

Records that a ticket waits for come first, in the order of the tickets; idle threads read ahead, always the record that is
needed soonest over all lanes. As every lane is spread evenly over the epoch, "soonest" is its first lane position divided by
the lane's length: one number comparable between lanes.
"""

from __future__ import annotations

import heapq
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from loader_service.pieces.piece import EncodedRecord
from loader_service.plan.lane_plan import LanePlan

logger = logging.getLogger(__name__)


class RecordKey(NamedTuple):
    """A record as it is decoded in one epoch (the epoch is 0 where it changes nothing, so frames are kept across epochs)."""

    split: str
    epoch: int
    entry: int
    record: int


_MAX_EPOCHS = 3  # of each entry that anything is remembered of: ranks are in one, or at the border between two


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
    is_over: bool = False  # all was given, and this was said


class ReadAhead:
    """Records worth decoding before they are asked for: the rest of every active lane's window, and its next one."""

    def __init__(self) -> None:
        self._lanes: dict[LaneKey, _LaneReader] = {}
        self._epochs: dict[tuple[str, int], OrderedDict[int, None]] = {}  # (split, entry): epochs, the last begun last
        self._heap: list[tuple[int, float, LaneKey]] = []  # (epoch, due, lane)
        self._queued: set[LaneKey] = set()

    def asked(self, lane: LaneKey, plan: LanePlan, length: int, stop: int) -> bool:
        """A ticket asked for the lane's samples up to `stop` (0: nothing yet, but it soon will be).

        True once: when all the rest of the lane was given by `pop`, so that its next epoch may be begun.
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
        """Lanes that are read ahead in."""
        return len(self._lanes)

    def peek(self) -> RecordKey | None:
        """The record that is needed soonest of those not yet given, or None. `RecordKey.epoch` is the lane's own."""
        while self._heap:
            lane = self._heap[0][2]
            reader = self._lanes.get(lane)
            if reader is not None and reader.todo:
                return RecordKey(lane.split, lane.epoch, lane.entry, reader.todo[-1][1])
            heapq.heappop(self._heap)
            self._queued.discard(lane)
        return None

    def pop(self) -> RecordKey | None:
        """Give the record of `peek`."""
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
        """Ranks are in one epoch of an entry, or at the border between two; whatever else is asked for is not kept long."""
        epochs = self._epochs.setdefault((lane.split, lane.entry), OrderedDict())
        epochs[lane.epoch] = None
        epochs.move_to_end(lane.epoch)
        old = {epoch for epoch in epochs if epoch < lane.epoch - 1} | set(list(epochs)[:-_MAX_EPOCHS])
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


class SeenRecords:
    """Which records were decoded in the epochs that entries are in: one bit each."""

    def __init__(self) -> None:
        self._bits: dict[tuple[str, int], OrderedDict[int, bytearray]] = {}  # (split, entry): epoch, R / 8 bytes

    def is_first(self, key: RecordKey, epoch: int, num_records: int) -> bool:
        """Whether this record of num_records was not told of before in the epoch (whatever `key.epoch` says)."""
        epochs = self._bits.setdefault((key.split, key.entry), OrderedDict())
        bits = epochs.get(epoch)
        if bits is None:
            bits = epochs[epoch] = bytearray(-(-num_records // 8))
            if len(epochs) > _MAX_EPOCHS:
                epochs.popitem(last=False)
        place, bit = key.record >> 3, 1 << (key.record & 7)
        first = not bits[place] & bit
        bits[place] |= bit
        return first

    def __len__(self) -> int:
        """Epochs of entries that are kept in mind."""
        return sum(map(len, self._bits.values()))


@dataclass(slots=True)
class _Kept:
    value: EncodedRecord
    unserved: int  # samples that no ticket has had yet
    is_ahead: bool = True  # no ticket had any of them yet


class RecordCache:
    """Encoded records within a byte budget. Those whose samples were all served go first, the oldest of them first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.size_bytes = 0
        self._wanted: OrderedDict[RecordKey, _Kept] = OrderedDict()
        self._served: OrderedDict[RecordKey, _Kept] = OrderedDict()
        self._served_bytes = 0
        self._warned = False
        self.num_ahead = 0
        """Records kept of which no ticket has had a sample yet."""

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._wanted or key in self._served

    def has_room(self) -> bool:
        """Whether reading ahead would not push out what is still wanted."""
        return self.size_bytes - self._served_bytes < self.budget_bytes

    def get(self, key: RecordKey) -> EncodedRecord | None:
        """The record, or None where it is not kept."""
        kept = self._wanted.get(key) or self._served.get(key)
        return kept.value if kept else None

    def put(self, key: RecordKey, value: EncodedRecord) -> None:
        """Keep a record, and drop others down to the budget (never this one)."""
        self._wanted[key] = _Kept(value, len(value.samples))
        self.num_ahead += 1
        self.size_bytes += value.size_bytes
        self._shrink(key)

    def serve(self, key: RecordKey, count: int) -> None:
        """`count` samples of it have gone out. In a later epoch its samples go out again."""
        kept = self._wanted.get(key)
        if kept is None:
            if key in self._served:
                self._served.move_to_end(key)
            return
        self.num_ahead -= kept.is_ahead
        kept.is_ahead = False
        kept.unserved -= count
        if kept.unserved <= 0:
            del self._wanted[key]
            self._served[key] = kept
            self._served_bytes += kept.value.size_bytes
            self._shrink(key)

    def _shrink(self, newest: RecordKey) -> None:
        while self.size_bytes > self.budget_bytes and self._served:
            _, kept = self._served.popitem(last=False)
            self._served_bytes -= kept.value.size_bytes
            self.size_bytes -= kept.value.size_bytes
        while self.size_bytes > self.budget_bytes and len(self._wanted) > 1:
            oldest = next(iter(self._wanted))
            if oldest == newest:
                break
            dropped = self._wanted.pop(oldest)
            self.size_bytes -= dropped.value.size_bytes
            self.num_ahead -= dropped.is_ahead
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the %d MiB of loader.cache_mb do not hold the open windows: records are decoded more than once; raise it, "
                    "or lower data.order.lanes or window_records",
                    self.budget_bytes >> 20,
                )
