"""The epoch's stream: a bijection, the same from any position, every lane spread evenly."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.config import DataConfig, OrderConfig, SourceConfig
from stoker_proto.errors import LocalProtocolError
from stoker_proto.order.lanes import MAX_CELLS, TIME_END, LaneRun, Order, order_fingerprint

LENGTHS = st.lists(st.integers(0, 40), min_size=0, max_size=8)
CELL = st.integers(1, 9)


def samples(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    return [(run.lane, run.start + i) for run in order.runs(start, stop) for i in range(run.count)]


def test_literal_stream() -> None:
    assert [lane for lane, _ in samples(Order([4, 2], 1), 0, 6)] == [0, 1, 0, 0, 1, 0]
    assert Order([7, 0, 4], 3).runs(0, 11) == [
        LaneRun(0, 0, 3),  # due 1/6
        LaneRun(2, 0, 3),  # due 1/4
        LaneRun(0, 3, 3),  # due 1/2
        LaneRun(2, 3, 1),  # due 3/4, the rest of the lane
        LaneRun(0, 6, 1),  # due 5/6
    ]
    assert Order([7, 0, 4], 3).runs(2, 5) == [LaneRun(0, 2, 1), LaneRun(2, 0, 2)]


@settings(deadline=None)
@given(lengths=LENGTHS, cell=CELL)
def test_every_sample_once_and_lanes_in_their_order(lengths: list[int], cell: int) -> None:
    order = Order(lengths, cell)
    stream = samples(order, 0, order.total)
    assert sorted(stream) == [(lane, position) for lane, length in enumerate(lengths) for position in range(length)]
    for lane, length in enumerate(lengths):
        assert [position for of, position in stream if of == lane] == list(range(length))


@pytest.mark.long
@settings(deadline=None)
@given(
    lanes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, TIME_END - 1)), max_size=8), cell=CELL, data=st.data()
)
def test_lanes_that_begin_later(lanes: list[tuple[int, int]], cell: int, data: st.DataObject) -> None:
    order = Order([length for length, _ in lanes], cell, [start for _, start in lanes])
    stream = samples(order, 0, order.total)
    assert sorted(stream) == [(lane, position) for lane, (length, _) in enumerate(lanes) for position in range(length)]
    low = data.draw(st.integers(0, order.total))
    high = data.draw(st.integers(low, order.total))
    assert samples(order, low, high) == stream[low:high]


def test_a_late_lane_in_numbers() -> None:
    """Lane 0: due at 1/8 3/8 5/8 7/8. Lane 1 begins at 1/2: due at 5/8 7/8. Ties go to the lower lane."""
    assert [lane for lane, _ in samples(Order([4, 2], 1, [0, 1 << 31]), 0, 6)] == [0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("starts", [[0], [0, -1], [0, 1 << 32]])
def test_impossible_starts_are_refused(starts: list[int]) -> None:
    with pytest.raises(LocalProtocolError, match="starts of 2 lanes"):
        Order([4, 2], 1, starts)


@settings(deadline=None)
@given(lengths=LENGTHS, cell=CELL, cuts=st.lists(st.floats(0, 1), max_size=6))
def test_slices_agree_with_the_whole(lengths: list[int], cell: int, cuts: list[float]) -> None:
    order = Order(lengths, cell)
    bounds = sorted({0, order.total, *(int(cut * order.total) for cut in cuts)})
    pieces = [sample for low, high in pairwise(bounds) for sample in samples(order, low, high)]
    assert pieces == samples(order, 0, order.total)


@settings(deadline=None)
@given(lengths=LENGTHS, cell=CELL)
def test_runs_are_parts_of_single_cells(lengths: list[int], cell: int) -> None:
    order = Order(lengths, cell)
    for run in order.runs(0, order.total):
        assert run.count >= 1
        assert run.start // cell == (run.start + run.count - 1) // cell


@settings(deadline=None)
@given(lengths=LENGTHS, cell=CELL)
def test_lanes_mix_in_proportion_at_every_prefix(lengths: list[int], cell: int) -> None:
    """After any number of samples each lane has given its share of its own length, to within a few cells."""
    order = Order(lengths, cell)
    given_so_far = np.zeros(len(lengths))
    for number, (lane, _) in enumerate(samples(order, 0, order.total), start=1):
        given_so_far[lane] += 1
        share = number / order.total
        assert np.abs(given_so_far - share * np.array(lengths)).max() <= cell * (
            1 + len(lengths) * max(lengths) / order.total
        )


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, cell=CELL)
def test_due_times_decide_ties_by_lane(lengths: list[int], cell: int) -> None:
    order = Order(lengths, cell)
    cells = [
        (Fraction((2 * k + 1) << 32, 2 * n).__floor__(), lane, k)
        for lane, n in enumerate(order.num_cells.tolist())
        for k in range(n)
    ]
    expected = [(lane, k) for _, lane, k in sorted(cells)]
    assert [(run.lane, run.start // cell) for run in order.runs(0, order.total)] == expected


def test_positions_of_a_huge_epoch() -> None:
    lengths = np.full(3200, 112_500) + np.arange(3200) % 7  # 360 million samples in 100 entries of 32 lanes
    order = Order(lengths, 8)
    middle = order.total // 2
    assert sum(run.count for run in order.runs(middle, middle + 512)) == 512
    assert samples(order, middle, middle + 64)[32:] == samples(order, middle + 32, middle + 64)


def test_what_it_refuses() -> None:
    with pytest.raises(LocalProtocolError, match="cell 0"):
        Order([1], 0)
    with pytest.raises(LocalProtocolError, match="lengths >= 0"):
        Order([1, -1], 1)
    with pytest.raises(LocalProtocolError, match="use more lanes"):
        Order([MAX_CELLS], 1)
    with pytest.raises(LocalProtocolError, match=r"\[0, 5\) of an epoch of 4 samples"):
        Order([4], 1).runs(0, 5)


def test_fingerprint_sees_every_key() -> None:
    order = OrderConfig()
    data = DataConfig(dataset_type="mani_openpi", train_data_paths=("demos",), max_seq_len=64, order=order)
    changed = [
        dataclasses.replace(data, order=dataclasses.replace(order, **{field.name: getattr(order, field.name) + 1}))
        for field in dataclasses.fields(order)
    ]
    packed = dataclasses.replace(data, packing=True)
    changed += [packed, dataclasses.replace(packed, max_seq_len=65), dataclasses.replace(data, group_by_length=True)]
    assert len({order_fingerprint(config) for config in (data, *changed)}) == 1 + len(changed)
    assert order_fingerprint(dataclasses.replace(data, max_seq_len=65)) == order_fingerprint(data)  # no row moves


def test_fingerprint_sees_which_paths_are_one_source_and_what_they_weigh() -> None:
    def of(*sources: tuple[int, float | None], weigh_by: Literal["samples", "tokens"] = "samples") -> str:
        listed = tuple(
            SourceConfig(dataset_type="x", paths=("a",) * count, weight=weight, name=str(n))
            for n, (count, weight) in enumerate(sources)
        )
        return order_fingerprint(DataConfig(sources=listed, weigh_by=weigh_by, max_seq_len=8))

    kinds = [
        of((2, None)),
        of((1, None), (1, None)),
        of((1, 1.0), (1, 1.0)),
        of((1, 1.0), (1, 2.0)),
        of((1, 1.0), (1, 2.0), weigh_by="tokens"),
        of((2, 1.0), (1, 2.0)),
    ]
    assert len(set(kinds)) == len(kinds)
