"""Which rows a rank trains: a function of position, the same global batches for every world and micro-batch size (G4)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.errors import ConfigError, LocalProtocolError
from stoker_proto.order.lanes import Order
from trainer.feed.client.schedule import Schedule, num_steps


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


def test_the_last_step_is_padded_not_dropped() -> None:
    schedule = Schedule(Order([10], 4), epoch=0, global_batch_size=8, micro_batch_size=4, world_size=2, rank=1)
    assert schedule.num_steps(0) == 2
    assert (schedule.slice(0, 1, 0).start, schedule.slice(0, 1, 0).num_rows) == (10, 0)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 or 16"):
        Schedule(Order([10], 4), epoch=0, global_batch_size=12, micro_batch_size=4, world_size=2, rank=0)
    with pytest.raises(LocalProtocolError, match="ranks are 0 to 1"):
        Schedule(Order([10], 4), epoch=0, global_batch_size=8, micro_batch_size=4, world_size=2, rank=2)
