"""The loader's half of the order: dealing, windows, positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader_service.plan.lane_plan import PlanKey, SampleRef, staggered_starts
from loader_service.plan.record_plan import RecordPlan, window_bounds
from stoker_proto.config import OrderConfig
from stoker_proto.errors import LocalProtocolError
from stoker_proto.order.lanes import TIME_END, Order

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=60).map(lambda counts: np.array(counts, np.uint32))
ORDERS = st.builds(OrderConfig, lanes=st.integers(1, 7), window_records=st.integers(1, 5), seed=st.integers(0, 3))


def whole_epoch(plan: RecordPlan) -> list[list[SampleRef]]:
    return [
        [SampleRef(*pair) for pair in plan.rows(lane, 0, length).samples]
        for lane, length in enumerate(plan.lane_lengths())
    ]


@settings(deadline=None)
@given(COUNTS, ORDERS, st.integers(0, 3))
def test_lanes_hold_every_sample_exactly_once(counts: np.ndarray, order: OrderConfig, epoch: int) -> None:
    plan = RecordPlan.make(counts, order, PlanKey("train", epoch, 0))
    seen = sorted(ref for lane in whole_epoch(plan) for ref in lane)
    assert seen == [(record, sample) for record, count in enumerate(counts) for sample in range(count)]


@settings(deadline=None)
@given(COUNTS, ORDERS, st.data())
def test_any_part_of_a_lane_is_a_part_of_the_whole(counts: np.ndarray, order: OrderConfig, data: st.DataObject) -> None:
    plan = RecordPlan.make(counts, order, PlanKey("train", 0, 0))
    lane = data.draw(st.integers(0, order.lanes - 1))
    length = plan.lane_lengths()[lane]
    start = data.draw(st.integers(0, length))
    count = data.draw(st.integers(0, length - start))
    fresh = RecordPlan.make(counts, order, PlanKey("train", 0, 0))  # no layout cached by the first read
    assert fresh.rows(lane, start, count).samples == plan.rows(lane, 0, length).samples[start : start + count]


def test_samples_of_one_record_stay_within_its_window() -> None:
    counts = np.full(64, 10, np.uint32)
    order = OrderConfig(lanes=2, window_records=4)
    plan = RecordPlan.make(counts, order, PlanKey("train", 0, 0))
    for lane, refs in enumerate(whole_epoch(plan)):
        places: dict[int, list[int]] = {}
        for place, ref in enumerate(refs):
            places.setdefault(ref.record, []).append(place)
        for record, where in places.items():
            assert max(where) - min(where) < order.window_records * 10, (lane, record)
        mixed = refs[100:140]
        assert len({ref.record for ref in mixed}) > 2  # samples are shuffled between the records of a window


def test_epochs_seeds_and_entries_differ_and_repeat() -> None:
    counts = np.full(40, 5, np.uint32)

    def stream(seed: int = 0, epoch: int = 0, entry: int = 0, split: str = "train") -> list[list[SampleRef]]:
        return whole_epoch(RecordPlan.make(counts, OrderConfig(lanes=4, seed=seed), PlanKey(split, epoch, entry)))

    assert stream() == stream()
    assert stream() != stream(epoch=1)
    assert stream() != stream(seed=1)
    assert stream() != stream(entry=1)
    assert stream(split="val") == stream(split="val", epoch=1)  # validation is the same every time


def test_records_change_lanes_between_epochs() -> None:
    def records(epoch: int) -> list[int]:
        plan = RecordPlan.make(np.full(40, 5, np.uint32), OrderConfig(lanes=4), PlanKey("train", epoch, 0))
        return sorted({record for record, _ in plan.rows(0, 0, plan.lane_length(0)).samples})

    assert records(0) != records(1)


def test_the_order_is_pinned() -> None:
    """Another order under the same fingerprint would silently mix loaders of two versions: raise PLAN_VERSION instead."""
    plan = RecordPlan.make(np.array([2, 1, 3, 2], np.uint32), OrderConfig(lanes=2), PlanKey("train", 0, 0))
    assert [[tuple(ref) for ref in lane] for lane in whole_epoch(plan)] == PINNED


PINNED = [[(2, 2), (2, 0), (2, 1), (0, 0), (0, 1)], [(1, 0), (3, 1), (3, 0)]]


def test_windows_grow_then_are_staggered_by_lane() -> None:
    bounds = [window_bounds(record, 1000, 4, lane=2, staggered=True) for record in range(24)]
    sizes = [last - first for _, first, last in sorted(set(bounds))]
    assert sizes == [1, 1, 1, 2, 3, 3, 4, 4, 4, 4]  # the repeated ones and 1 + 2 % 4 = 3 put the lanes out of step
    for record, (_, first, last) in enumerate(bounds):
        assert first <= record < last
    assert window_bounds(999, 1000, 4, lane=2, staggered=True)[2] == 1000


def test_later_epochs_begin_with_full_windows() -> None:
    sizes = [
        last - first for _, first, last in sorted({window_bounds(r, 1000, 4, 2, staggered=False) for r in range(15)})
    ]
    assert sizes == [3, 4, 4, 4]


def test_lanes_of_a_first_epoch_begin_one_after_another() -> None:
    """So many records must be decoded by the time so many samples are trained: the surplus grows slowly, from four records."""
    counts = np.full(640, 50, np.uint32)
    plan = RecordPlan.make(counts, OrderConfig(lanes=32), PlanKey("train", 0, 0))
    order = Order(plan.lane_lengths(), 8, plan.lane_starts())
    seen: set[int] = set()
    position = 0
    for run in order.runs(0, 6400):
        seen.update(record for record, _ in plan.rows(run.lane, run.start, run.count).samples)
        position += run.count
        assert len(seen) * 50 <= 1.43 * position + 250, position
    assert order.runs(6400, 6400 + 800)[-1].lane >= 0
    assert len({run.lane for run in order.runs(6400, 6400 + 800)}) == 32  # by now all take turns
    later = RecordPlan.make(counts, OrderConfig(lanes=32), PlanKey("train", 1, 0))
    assert later.lane_starts() == [0] * 32


def test_a_small_epoch_begins_all_its_lanes_by_its_middle() -> None:
    plan = RecordPlan.make(np.full(64, 50, np.uint32), OrderConfig(lanes=32), PlanKey("train", 0, 0))
    order = Order(plan.lane_lengths(), 8, plan.lane_starts())
    assert len({run.lane for run in order.runs(0, 1800)}) == 32
    assert len({run.lane for run in order.runs(0, 32)}) == 4


@pytest.mark.long
@settings(max_examples=300)
@given(
    st.lists(st.one_of(st.just(0), st.integers(1, 3), st.integers(1, 100_000)), min_size=1, max_size=40).filter(any),
    st.floats(0.01, 1e6),
)
def test_lanes_begin_within_the_epoch_however_their_lengths_differ(lengths: list[int], rows_per_record: float) -> None:
    starts = staggered_starts(lengths, rows_per_record)
    used = [start for start, length in zip(starts, lengths, strict=True) if length]
    assert all(0 <= start < TIME_END for start in starts)
    assert used == sorted(used)
    assert used[:4] == [0] * len(used[:4])
    order = Order(lengths, 128, starts)
    assert sum(run.count for run in order.runs(0, order.total)) == sum(lengths)


def test_short_first_lanes_let_the_others_begin_by_the_middle() -> None:
    starts = staggered_starts([1] * 4 + [10_000] * 4, 5000.5)
    assert starts[:7] == [0, 0, 0, 0, *(TIME_END // 8 * n for n in (1, 2, 3))]
    assert starts[6] < starts[7] < TIME_END // 2


def test_starts_that_were_good_are_pinned() -> None:
    """They decide the order of runs that are under way: a change of them is a change of PLAN_VERSION."""
    assert staggered_starts([100] * 8, 10.0) == [0, 0, 0, 0, 429496729, 765624604, 1037112504, 1261792145]
    assert staggered_starts([10] * 4 + [30] * 4, 2.0) == [0, 0, 0, 0, 858993459, 1302344922, 1587356576, 1791704555]


def test_a_saved_plan_is_mapped_and_equal(tmp_path: Path) -> None:
    counts = np.arange(50, dtype=np.uint32)
    plan = RecordPlan.make(counts, OrderConfig(lanes=3), PlanKey("train", 2, 1))
    plan.save(tmp_path)
    loaded = RecordPlan.load(tmp_path, OrderConfig(lanes=3), PlanKey("train", 2, 1))
    assert isinstance(loaded.records.base, np.memmap)
    assert whole_epoch(loaded) == whole_epoch(plan)


def test_positions_outside_a_lane_are_refused() -> None:
    plan = RecordPlan.make(np.array([3], np.uint32), OrderConfig(lanes=2), PlanKey("train", 0, 0))
    with pytest.raises(LocalProtocolError, match="lane 1 of entry 0 has no row 0"):
        plan.rows(1, 0, 1)
    with pytest.raises(LocalProtocolError, match="lane 0 of entry 0 has no row 3"):
        plan.rows(0, 2, 2)
