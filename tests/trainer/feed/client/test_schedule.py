"""Which rows a rank trains: a function of position, the same global batches for every world and micro-batch size (G4)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.errors import ConfigError, LocalProtocolError
from stoker_proto.order.lanes import Order
from stoker_proto.order.mixture import MixedOrder, PassRange
from trainer.feed.client import schedule as schedule_module
from trainer.feed.client.schedule import RunsAhead, Schedule, num_steps


def positions(order: Order, first: int, step: int, **sizes: int) -> list[list[tuple[int, int]]]:
    """For each pass of each rank in (pass, rank) order: the (lane, position) of its rows."""
    world_size = sizes["world_size"]
    schedules = [Schedule(order, epoch=0, rank=rank, **sizes) for rank in range(world_size)]
    slices = [schedule.slice(first, step, a) for a in range(schedules[0].passes) for schedule in schedules]
    return [[(run.lane, run.start + i) for run in slice_.runs for i in range(run.count)] for slice_ in slices]


def test_the_example_of_the_docstring() -> None:
    order = Order([11], 3)
    sizes = {"global_batch_size": 8, "micro_batch_size": 2, "world_size": 2}
    rows = [[[p for _, p in part] for part in positions(order, 0, step, **sizes)] for step in (0, 1)]
    assert rows == [[[0, 1], [2, 3], [4, 5], [6, 7]], [[8, 9], [10], [], []]]


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    cell=st.integers(1, 9),
    first=st.integers(0, 60),
    splits=st.lists(
        st.sampled_from([(1, 12), (1, 4), (2, 6), (3, 2), (4, 3), (12, 1), (6, 1)]), min_size=2, max_size=2
    ),
)
def test_global_batches_do_not_depend_on_ranks_or_micro_batches(
    lengths: list[int], cell: int, first: int, splits: list[tuple[int, int]]
) -> None:
    order = Order(lengths, cell)
    first = min(first, order.total)
    streams = []
    for world_size, micro_batch_size in splits:
        sizes = {"global_batch_size": 12, "micro_batch_size": micro_batch_size, "world_size": world_size}
        steps = [positions(order, first, step, **sizes) for step in range(num_steps(order.total, first, 12))]
        streams.append([[row for part in step for row in part] for step in steps])
    whole = [(run.lane, run.start + i) for run in order.runs(first, order.total) for i in range(run.count)]
    assert streams[0] == streams[1]
    assert [row for step in streams[0] for row in step] == whole


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    cells=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ahead=st.integers(1, 50),
    asked=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), min_size=1, max_size=8),
)
def test_runs_computed_ahead_are_those_of_the_order(
    lengths: list[int], cells: tuple[int, int], ahead: int, asked: list[tuple[int, int]]
) -> None:
    sources = [[PassRange(0, Order([length], cells[0]), 0, length)] for length in lengths]
    order = MixedOrder(sources, [[number] for number in range(len(lengths))], cells[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "_AHEAD", ahead)
        runs = RunsAhead(order)
        for start, count in asked:
            start = min(start, order.total)
            stop = min(start + count, order.total)
            assert runs.runs(start, stop) == order.runs(start, stop)


def test_runs_are_computed_once_for_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Order([4096] * 4, 8)
    calls: list[tuple[int, int]] = []
    computed = Order.runs
    monkeypatch.setattr(Order, "runs", lambda self, a, b: calls.append((a, b)) or computed(self, a, b))
    schedule = Schedule(order, epoch=0, global_batch_size=32, micro_batch_size=32, world_size=1, rank=0)
    slices = [schedule.slice(64, step, 0) for step in range(200)]
    assert [slice_.start for slice_ in slices[:3]] == [64, 96, 128]
    assert calls == [(64, 4160), (4160, 8256)]


def test_the_last_step_is_padded_not_dropped() -> None:
    schedule = Schedule(Order([10], 4), epoch=0, global_batch_size=8, micro_batch_size=4, world_size=2, rank=1)
    assert schedule.num_steps(0) == 2
    assert (schedule.slice(0, 1, 0).start, schedule.slice(0, 1, 0).num_rows) == (10, 0)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 or 16"):
        Schedule(Order([10], 4), epoch=0, global_batch_size=12, micro_batch_size=4, world_size=2, rank=0)
    with pytest.raises(LocalProtocolError, match="ranks are 0 to 1"):
        Schedule(Order([10], 4), epoch=0, global_batch_size=8, micro_batch_size=4, world_size=2, rank=2)
