"""Which decoded records are kept, within a limit of bytes, and which were decoded before. Pure bookkeeping."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from loader_service.pieces.piece import EncodedRecord

logger = logging.getLogger(__name__)

MAX_EPOCHS = 3
"""Epochs of each entry that are remembered: ranks are in one, or at the border between two."""


class RecordKey(NamedTuple):
    """A record as decoded in one epoch. The epoch is 0 where it changes nothing, so that frames are kept across epochs."""

    split: str
    epoch: int
    entry: int
    record: int


class SeenRecords:
    """Which records were decoded in the newest epochs of each entry: one bit per record."""

    def __init__(self) -> None:
        self._bits: dict[tuple[str, int], OrderedDict[int, bytearray]] = {}  # (split, entry): epoch, R / 8 bytes

    def is_first(self, key: RecordKey, epoch: int, num_records: int) -> bool:
        """Whether this is the first call for the record in the epoch, which may differ from `key.epoch`. num_records: of the
        entry."""
        epochs = self._bits.setdefault((key.split, key.entry), OrderedDict())
        bits = epochs.get(epoch)
        if bits is None:
            bits = epochs[epoch] = bytearray(-(-num_records // 8))
            if len(epochs) > MAX_EPOCHS:
                epochs.popitem(last=False)
        place, bit = key.record >> 3, 1 << (key.record & 7)
        first = not bits[place] & bit
        bits[place] |= bit
        return first

    def __len__(self) -> int:
        """Number of epochs, over all entries, that are remembered."""
        return sum(map(len, self._bits.values()))


@dataclass(slots=True)
class _Kept:
    value: EncodedRecord
    unserved: int  # samples that no ticket has had yet
    is_ahead: bool = True  # no ticket had any of them yet


class RecordCache:
    """Encoded records within a limit of bytes. Records whose samples were all served are dropped first, the oldest of them
    first."""

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
        """Whether reading ahead drops no record that is still needed."""
        return self.size_bytes - self._served_bytes < self.budget_bytes

    def get(self, key: RecordKey) -> EncodedRecord | None:
        """The record, or None if it is not kept."""
        kept = self._wanted.get(key) or self._served.get(key)
        return kept.value if kept else None

    def put(self, key: RecordKey, value: EncodedRecord) -> None:
        """Keep a record, and drop others (never this one) until the limit is met."""
        self._wanted[key] = _Kept(value, len(value.samples))
        self.num_ahead += 1
        self.size_bytes += value.size_bytes
        self._shrink(key)

    def serve(self, key: RecordKey, count: int) -> None:
        """Note that `count` of its samples were sent. A record that was sent completely is kept while there is room."""
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
