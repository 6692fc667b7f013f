import json
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.actions import ActionStatistics, StatisticsAccumulator
from stoker_proto.errors import DataError
from stoker_proto.hashing import mix64


def keys(*values):
    return np.array(values, dtype=np.uint64)


def test_statistics_of_four_actions_are_the_numbers_worked_out_by_hand():
    accumulator = StatisticsAccumulator(2)
    accumulator.add([[1.0, -2.0], [2.0, -2.0]], keys(0, 1))
    accumulator.add([[3.0, -2.0], [6.0, -2.0]], keys(2, 3))
    statistics, sample = accumulator.finish(mask=[True, False])
    assert statistics.to_json() == {
        "count": 4,
        "min": [1.0, -2.0],
        "max": [6.0, -2.0],
        "mean": [3.0, -2.0],
        "std": [1.8708286933869707, 0.0],  # sqrt(14 / 4)
        "q01": [1.03, -2.0],
        "q99": [5.909999999999999, -2.0],
        "mask": [True, False],
    }
    assert sorted(sample.tolist()) == [[1.0, -2.0], [2.0, -2.0], [3.0, -2.0], [6.0, -2.0]]


def test_quantiles_are_those_of_numpy():
    rows = np.random.default_rng(5).normal(size=(777, 3)).astype(np.float32)
    accumulator = StatisticsAccumulator(3)
    accumulator.add(rows, np.arange(777, dtype=np.uint64))
    statistics, _ = accumulator.finish()
    assert statistics.q01 == pytest.approx(np.quantile(rows.astype(np.float64), 0.01, axis=0), abs=1e-12)
    assert statistics.q99 == pytest.approx(np.quantile(rows.astype(np.float64), 0.99, axis=0), abs=1e-12)


def test_sums_are_exact_where_float64_sums_lose_everything():
    rows = np.array([[1e30], [1.0], [-1e30], [1.0]], dtype=np.float32)
    accumulator = StatisticsAccumulator(1)
    accumulator.add(rows, np.arange(4, dtype=np.uint64))
    assert accumulator.finish()[0].mean.tolist() == [0.5]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.long
@settings(deadline=None, database=None, max_examples=60)
@given(
    st.lists(st.tuples(finite, finite), min_size=1, max_size=60), st.randoms(use_true_random=False), st.integers(1, 4)
)
def test_any_order_of_adding_and_merging_gives_the_same_bits(rows, random, num_parts):
    def gathered(order, num_parts):
        parts = [StatisticsAccumulator(2, capacity=16) for _ in range(num_parts)]
        for i, index in enumerate(order):
            parts[i % num_parts].add(np.array([rows[index]], dtype=np.float32), keys(index))
        random.shuffle(parts)
        for part in parts[1:]:
            parts[0].merge(part)
        statistics, sample = parts[0].finish()
        return json.dumps(statistics.to_json()), sample.tobytes()

    order = list(range(len(rows)))
    expected = gathered(order, 1)
    random.shuffle(order)
    assert gathered(order, num_parts) == expected


def test_merging_a_large_source_in_another_order_gives_the_same_bits(smooth_actions):
    rows, names = smooth_actions(30_000, seed=1), np.arange(30_000, dtype=np.uint64)
    whole = StatisticsAccumulator(7, capacity=1_000)
    whole.add(rows, names)
    parts = [StatisticsAccumulator(7, capacity=1_000) for _ in range(3)]
    for i, start in enumerate(range(0, 30_000, 37)):
        parts[i % 3].add(rows[start : start + 37], names[start : start + 37])
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    (expected, expected_sample), (found, found_sample) = whole.finish(), parts[2].finish()
    assert json.dumps(found.to_json()) == json.dumps(expected.to_json())
    assert found_sample.tobytes() == expected_sample.tobytes()
    assert found.mean == pytest.approx(rows.astype(np.float64).mean(axis=0), abs=1e-12)
    assert found.std == pytest.approx(rows.astype(np.float64).std(axis=0), abs=1e-12)


def test_the_sample_is_the_actions_with_the_smallest_hashes_in_their_order():
    rows = np.arange(500, dtype=np.float32)[:, None]
    accumulator = StatisticsAccumulator(1, capacity=20)
    accumulator.add(rows, np.arange(500, dtype=np.uint64))
    _, sample = accumulator.finish()
    expected = np.argsort(mix64(np.arange(500, dtype=np.uint64)))[:20]
    assert sample[:, 0].tolist() == expected.tolist()


def test_memory_does_not_grow_with_the_source():
    accumulator = StatisticsAccumulator(7, capacity=1_000)
    block = np.zeros((4_000, 7), dtype=np.float32)

    def feed(start):
        for i in range(start, start + 50):
            accumulator.add(block, np.arange(4_000, dtype=np.uint64) + np.uint64(4_000 * i))

    feed(0)
    tracemalloc.start()
    feed(50)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000


def test_json_round_trip_keeps_every_bit(smooth_actions, summary):
    statistics, _ = summary(smooth_actions(500, seed=3))
    text = json.dumps(statistics.to_json())
    assert json.dumps(ActionStatistics.from_json(json.loads(text)).to_json()) == text


def test_normalise_by_quantiles_where_masked_and_constant_dimensions_to_zero():
    statistics = ActionStatistics(
        count=9,
        min=np.array([-3.0, 0.0, 7.0]),
        max=np.array([3.0, 1.0, 7.0]),
        mean=np.zeros(3),
        std=np.zeros(3),
        q01=np.array([-1.0, 0.0, 7.0]),
        q99=np.array([3.0, 1.0, 7.0]),
        mask=np.array([True, False, True]),
    )
    actions = np.array([[-1.0, 0.0, 7.0], [1.0, 0.25, 7.0], [3.0, 1.0, 7.0], [-3.0, 1.0, 7.0]])
    clipped = [[-1.0, 0.0, 0.0], [0.0, 0.25, 0.0], [1.0, 1.0, 0.0], [-1.0, 1.0, 0.0]]
    assert statistics.normalise(actions) == pytest.approx(np.array(clipped), abs=1e-6)
    assert statistics.normalise(actions).dtype == np.float32
    assert statistics.unnormalise(statistics.normalise(actions[:3])) == pytest.approx(actions[:3], abs=1e-6)


def test_an_unmasked_dimension_that_never_moves_comes_back_as_its_value(summary):
    statistics, _ = summary([[0.1, -1.0], [0.2, -1.0]], mask=[True, False])
    assert statistics.normalise([[0.1, -1.0]])[0, 1] == 0.0
    assert statistics.unnormalise([[0.1, 0.0]])[0, 1] == -1.0


def test_a_dimension_with_equal_quantiles_stays_finite_and_bounded(summary):
    rows = np.zeros((1_000, 1), dtype=np.float32)
    rows[0] = 5.0
    statistics, _ = summary(rows)
    assert np.abs(statistics.normalise([[5.0], [0.0]])).max() <= 1.0
    assert statistics.unnormalise(statistics.normalise([[0.0]])).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.0, 1.0], [float("nan"), 1.0]], "row 1: dimension 0 is nan; an action needs finite numbers"),
        ([[0.0, 1.0], [0.0, 1.0], [0.0, float("-inf")]], "row 2: dimension 1 is -inf; an action needs finite numbers"),
        ([[0.0, 1.0], [0.0, 1.0, 2.0]], "row 1: shape [3]; an action has 2 numbers"),
        ([[0.0, 1.0, 2.0]], "row 0: 3 numbers (actions of shape [1, 3]); an action has 2"),
        ([["a", "b"]], "actions that are not numbers"),
    ],
)
def test_a_bad_action_is_named_by_its_row(rows, message):
    with pytest.raises(DataError, match=r"^" + re.escape(message)):
        StatisticsAccumulator(2).add(rows, np.arange(len(rows), dtype=np.uint64))


def test_misuse_is_refused_in_words():
    with pytest.raises(DataError, match="no actions at all"):
        StatisticsAccumulator(2).finish()
    with pytest.raises(DataError, match="2 actions with 1 keys"):
        StatisticsAccumulator(1).add([[1.0], [2.0]], keys(0))
    with pytest.raises(DataError, match="2 dimensions with a sample of 65536 do not merge into 1 dimensions"):
        StatisticsAccumulator(1).merge(StatisticsAccumulator(2))
    with pytest.raises(DataError, match="both must be at least 1"):
        StatisticsAccumulator(0)
    with pytest.raises(DataError, match="expected"):
        ActionStatistics.from_json({"count": 1})
