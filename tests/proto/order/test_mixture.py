"""Mixtures: the asked shares at every prefix, every pass exactly once, whatever the weights."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.errors import ConfigError
from stoker_proto.order.lanes import LaneRun, Order
from stoker_proto.order.mixture import (
    MAX_RATE,
    ONE_PASS,
    MixedOrder,
    PassRange,
    PassShare,
    SourceOrder,
    SourceRun,
    pass_shares,
    rates,
)

LANES = 3
Sample = tuple[int, int, int, int]  # source, pass, lane of the stream, position in the lane


def make_epoch(lengths: list[list[int]], found: list[int], epoch: int, cell: int) -> MixedOrder:
    """lengths: for each source its lanes, the same in every pass; found: the rates."""
    sources = []
    for lanes, rate in zip(lengths, found, strict=True):
        order = Order(lanes, cell)
        sources.append([PassRange(share.number, order, *share.cut(order.total)) for share in pass_shares(rate, epoch)])
    numbers = [[source * LANES + lane for lane in range(LANES)] for source in range(len(lengths))]
    return MixedOrder(sources, numbers, cell)


def samples(order: MixedOrder, start: int, stop: int) -> list[Sample]:
    return [
        (run.lane // LANES, run.epoch, run.lane, run.start + i)
        for run in order.runs(start, stop)
        for i in range(run.count)
    ]


SOURCES = st.lists(st.lists(st.integers(0, 25), min_size=LANES, max_size=LANES).filter(any), min_size=1, max_size=4)


@pytest.mark.long
@given(lengths=SOURCES, data=st.data(), cell=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_every_pass_of_every_source_is_trained_exactly_once(
    lengths: list[list[int]], data: st.DataObject, cell: int
) -> None:
    totals = [sum(lanes) for lanes in lengths]
    weights = [data.draw(st.floats(0.5, 2)) * total for total in totals]
    found = rates([str(n) for n in range(len(lengths))], totals, weights)
    epochs = 3
    seen: Counter[Sample] = Counter()
    for epoch in range(epochs):
        order = make_epoch(lengths, found, epoch, cell)
        seen.update(samples(order, 0, order.total))
        assert order.total == sum(order.counts)
    assert set(seen.values()) == {1}
    assert min(found) == ONE_PASS
    for source, (lanes, rate) in enumerate(zip(lengths, found, strict=True)):
        whole = epochs * rate // ONE_PASS
        every = {
            (source, number, source * LANES + lane, position)
            for number in range(whole)
            for lane, length in enumerate(lanes)
            for position in range(length)
        }
        assert every <= seen.keys()


@pytest.mark.long
@given(lengths=SOURCES, data=st.data(), cell=st.integers(1, 9), epoch=st.integers(0, 2))
@settings(max_examples=80, deadline=None)
def test_any_prefix_is_mixed_as_asked_to_within_one_cell(
    lengths: list[list[int]], data: st.DataObject, cell: int, epoch: int
) -> None:
    found = [data.draw(st.integers(ONE_PASS // 2, 4 * ONE_PASS)) for _ in lengths]
    order = make_epoch(lengths, found, epoch, cell)
    stream = [sample[0] for sample in samples(order, 0, order.total)]
    counts: Counter[int] = Counter()
    for position, source in enumerate(stream, 1):
        counts[source] += 1
        for number, whole in enumerate(order.counts):
            share = Fraction(whole, order.total)
            # Each source is half a cell off its own line at most; up to three of them cannot add up to more than one cell.
            most = max(Fraction(1), (1 + share * (len(lengths) - 2)) / 2) * cell
            assert abs(counts[number] - share * position) <= most, (number, position)


@pytest.mark.long
@given(lengths=SOURCES, data=st.data(), cell=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_any_position_is_found_without_those_before(lengths: list[list[int]], data: st.DataObject, cell: int) -> None:
    found = [data.draw(st.integers(ONE_PASS // 3, 3 * ONE_PASS)) for _ in lengths]
    order = make_epoch(lengths, found, 1, cell)
    whole = samples(order, 0, order.total)
    start = data.draw(st.integers(0, order.total))
    stop = data.draw(st.integers(start, order.total))
    assert samples(order, start, stop) == whole[start:stop]


def test_one_source_without_weights_is_its_own_order() -> None:
    lengths = [[9, 14, 7]]
    order = make_epoch(lengths, [ONE_PASS], 2, 4)
    expected = [LaneRun(run.lane, run.start, run.count, 2) for run in Order(lengths[0], 4).runs(0, 30)]
    assert order.runs(0, 30) == expected


def test_shares_follow_the_weights() -> None:
    found = rates(["robots", "chats"], [1000, 100], [3, 1])  # an epoch: 1000 of robots, a third of it of chats
    assert found == [ONE_PASS, round(10 * ONE_PASS / 3)]
    assert [share.number for share in pass_shares(found[1], 1)] == [3, 4, 5, 6]
    order = make_epoch([[400, 300, 300], [50, 50, 0]], found, 1, 8)
    assert order.counts[0] == 1000
    assert abs(order.counts[1] - 333) <= 1


def test_neighbouring_spans_meet() -> None:
    assert PassShare(0, 0, ONE_PASS).cut(7) == (0, 7)
    third = ONE_PASS // 3
    cuts = [PassShare(0, begin, end).cut(10) for begin, end in ((0, third), (third, 2 * third), (2 * third, ONE_PASS))]
    assert cuts == [(0, 3), (3, 7), (7, 10)]


def test_a_tiny_source_with_a_large_weight_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        ConfigError, match=r"tiny with its 2 samples would be repeated 500 times in each epoch, at most"
    ):
        rates(["large", "tiny"], [1000, 2], [1, 1])
    assert rates(["large", "small"], [1000, 1000 // MAX_RATE], [1, 1])[1] == MAX_RATE * ONE_PASS


@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=5), cell=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_turns_are_cells_by_the_time_at_which_their_middle_is_due(counts: list[int], cell: int) -> None:
    cells = []
    for source, count in enumerate(counts):
        for low in range(0, count, cell):
            size = min(cell, count - low)
            cells.append((Fraction(2 * low + size, 2 * count), source, low, size))
    expected = [SourceRun(source, low, size) for _, source, low, size in sorted(cells)]
    assert SourceOrder(counts, cell).runs(0, sum(counts)) == expected


def test_a_source_may_have_more_samples_than_fit_into_32_bits() -> None:
    turns = SourceOrder([6_000_000_000, 3_000_000_000], 8)
    middle = turns.total // 2
    found = turns.runs(middle, middle + 2400)
    assert sum(turn.count for turn in found if turn.source == 0) == pytest.approx(1600, abs=8)
    assert found[0].start == pytest.approx(3_000_000_000, abs=8)
