"""What is decoded next: the bookkeeping of a worker, without threads."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from loader_service.pieces.piece import EncodedRecord, EncodedSample
from loader_service.pieces.read_ahead import LaneKey, ReadAhead
from loader_service.pieces.record_cache import RecordKey, SeenRecords
from loader_service.plan.lane_plan import PlanKey
from loader_service.plan.record_plan import RecordPlan
from stoker_proto.config import OrderConfig

ROW = EncodedSample(np.zeros(1, np.int32), np.zeros(1, np.uint8), (), None, 0)


def record(size: int, samples: int = 2) -> EncodedRecord:
    return EncodedRecord([ROW] * samples, None, size)


def key(number: int) -> RecordKey:
    return RecordKey("train", 0, 0, number)


def test_read_ahead_gives_each_record_of_this_and_the_next_window_once_soonest_first() -> None:
    order = OrderConfig(lanes=2, window_records=3)
    plan = RecordPlan.make(np.full(40, 4, np.uint32), order, PlanKey("train", 0, 0))
    lengths = plan.lane_lengths()
    ahead = ReadAhead()
    for lane in (0, 1):
        ahead.asked(LaneKey("train", 0, 0, lane), plan, lengths[lane], 1)
    given = []
    while (item := ahead.pop()) is not None:
        given.append(item.record)
    expected: dict[int, tuple[float, int]] = {}
    for lane in (0, 1):
        first = plan.window_at(lane, 0)
        for window in (first, plan.window_at(lane, first.stop)):
            for use, number in zip(window.first_use.tolist(), window.records.tolist(), strict=True):
                expected[number] = (use / lengths[lane], lane)
    assert sorted(given) == sorted(expected)
    assert given == sorted(given, key=lambda number: expected[number])


def test_read_ahead_covers_a_whole_lane_as_tickets_advance() -> None:
    order = OrderConfig(lanes=1, window_records=3)
    plan = RecordPlan.make(np.full(20, 3, np.uint32), order, PlanKey("train", 0, 0))
    ahead, lane, given = ReadAhead(), LaneKey("train", 0, 0, 0), []
    for stop in range(1, 61):
        ahead.asked(lane, plan, 60, stop)
        while (item := ahead.pop()) is not None:
            given.append(item.record)
    assert sorted(given) == list(range(20))


def test_read_ahead_after_a_resume_starts_at_the_window_that_was_asked() -> None:
    order = OrderConfig(lanes=1, window_records=2)
    plan = RecordPlan.make(np.full(20, 3, np.uint32), order, PlanKey("train", 0, 0))
    ahead = ReadAhead()
    ahead.asked(LaneKey("train", 0, 0, 0), plan, 60, 31)
    given = set()
    while (item := ahead.pop()) is not None:
        given.add(item.record)
    assert given <= {record for record, _ in plan.rows(0, plan.window_at(0, 30).start, 20).samples}
    assert plan.rows(0, 30, 1).samples[0][0] in given


@pytest.mark.parametrize("epochs", [range(50), range(50, 0, -1)])
def test_epochs_that_ranks_are_not_in_are_forgotten(epochs: range) -> None:
    """In whatever order a client asks for them."""
    order = OrderConfig(lanes=2, window_records=2)
    ahead, seen = ReadAhead(), SeenRecords()
    for epoch in epochs:
        plan = RecordPlan.make(np.full(20, 3, np.uint32), order, PlanKey("train", epoch, 0))
        for lane in range(2):
            ahead.asked(LaneKey("train", epoch, 0, lane), plan, 30, 1)
        assert seen.is_first(RecordKey("train", 0, 0, 7), epoch, 20)
        assert not seen.is_first(RecordKey("train", 0, 0, 7), epoch, 20)
        assert len(ahead) <= 6
        assert len(seen) <= 3
    given = set()
    while (item := ahead.pop()) is not None:
        given.add(item.epoch)
    assert 0 < len(given) <= 3


def epochs_read_ahead(*asked: tuple[int, int]) -> set[int]:
    """Epochs of what is read ahead after these (epoch, lane) were asked for."""
    order, ahead = OrderConfig(lanes=2, window_records=2), ReadAhead()
    for epoch, lane in asked:
        plan = RecordPlan.make(np.full(20, 3, np.uint32), order, PlanKey("train", epoch, 0))
        ahead.asked(LaneKey("train", epoch, 0, lane), plan, 30, 1)
    given = set()
    while (item := ahead.pop()) is not None:
        given.add(item.epoch)
    return given


def test_an_epoch_that_has_passed_goes_before_there_are_too_many() -> None:
    assert epochs_read_ahead((0, 0), (1, 0)) == {0, 1}
    assert epochs_read_ahead((0, 0), (1, 0), (2, 0)) == {1, 2}


def test_of_too_many_epochs_the_one_not_asked_for_longest_goes() -> None:
    assert epochs_read_ahead((5, 0), (4, 0), (3, 0), (4, 1), (2, 0), (1, 0)) == {4, 2, 1}


def test_what_nobody_pops_does_not_pile_up() -> None:
    """As while the cache is full."""
    order, ahead = OrderConfig(lanes=2, window_records=2), ReadAhead()
    plan = RecordPlan.make(np.full(20, 3, np.uint32), order, PlanKey("train", 0, 0))

    def ask(epochs: range) -> None:
        for epoch in epochs:
            for lane in range(2):
                ahead.asked(LaneKey("train", epoch, 0, lane), plan, 30, 1)

    ask(range(100))
    tracemalloc.start()
    try:
        ask(range(100, 600))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 20_000


def test_an_entry_that_passes_fast_does_not_make_another_forget() -> None:
    """A small source is in its fifth pass while a large one is in its first."""
    order = OrderConfig(lanes=1, window_records=2)
    ahead, seen = ReadAhead(), SeenRecords()
    large = RecordPlan.make(np.full(20, 3, np.uint32), order, PlanKey("train", 0, 0))
    ahead.asked(LaneKey("train", 0, 0, 0), large, 60, 1)
    assert seen.is_first(RecordKey("train", 0, 0, 7), 0, 20)
    for epoch in range(1, 6):
        plan = RecordPlan.make(np.full(4, 3, np.uint32), order, PlanKey("train", epoch, 1))
        ahead.asked(LaneKey("train", epoch, 1, 0), plan, 12, 1)
        seen.is_first(RecordKey("train", 0, 1, 0), epoch, 4)
    assert not seen.is_first(RecordKey("train", 0, 0, 7), 0, 20)
    entries = set()
    while (item := ahead.pop()) is not None:
        entries.add(item.entry)
    assert entries == {0, 1}
