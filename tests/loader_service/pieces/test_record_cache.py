"""Which decoded records are kept: the bookkeeping of a worker, without threads."""

from __future__ import annotations

import numpy as np
import pytest

from loader_service.pieces.piece import EncodedRecord, EncodedSample
from loader_service.pieces.record_cache import RecordCache, RecordKey

ROW = EncodedSample(np.zeros(1, np.int32), np.zeros(1, np.uint8), (), None, 0)


def record(size: int, samples: int = 2) -> EncodedRecord:
    return EncodedRecord([ROW] * samples, None, size)


def key(number: int) -> RecordKey:
    return RecordKey("train", 0, 0, number)


def test_records_that_are_wholly_served_go_before_wanted_ones() -> None:
    cache = RecordCache(100)
    cache.put(key(1), record(40))
    cache.put(key(2), record(40))
    cache.serve(key(2), 2)
    cache.put(key(3), record(40))
    assert key(1) in cache
    assert key(2) not in cache
    assert cache.size_bytes == 80


def test_records_that_no_ticket_has_touched_are_counted() -> None:
    cache = RecordCache(100)
    cache.put(key(1), record(40))
    cache.put(key(2), record(40))
    assert cache.num_ahead == 2
    cache.serve(key(1), 1)
    cache.serve(key(1), 1)
    assert cache.num_ahead == 1
    cache.put(key(3), record(90))  # pushes both others out
    assert cache.num_ahead == 1


def test_served_records_stay_for_the_next_epoch_while_there_is_room() -> None:
    cache = RecordCache(100)
    cache.put(key(1), record(40))
    cache.serve(key(1), 2)
    assert cache.get(key(1)) is not None
    assert cache.size_bytes == 40


def test_reading_ahead_stops_at_the_budget_but_what_is_needed_is_always_taken(caplog: pytest.LogCaptureFixture) -> None:
    cache = RecordCache(100)
    for number in range(3):
        cache.put(key(number), record(50))
    assert not cache.has_room()
    assert [record.getMessage() for record in caplog.records if "loader.cache_mb" in record.getMessage()]
    assert cache.size_bytes <= 100
    assert key(2) in cache  # the newest is never the one dropped
    cache.put(key(9), record(500))
    assert key(9) in cache
