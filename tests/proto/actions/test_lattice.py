import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.actions.kmeans import uniform
from stoker_proto.actions.lattice import ResidualLattice, allocate, product_grid
from stoker_proto.errors import DataError

STRAIGHT = (np.array([0.0, 8.0]), np.array([0.0, 1.0]))


def test_the_example_of_the_docstring():
    lattice = ResidualLattice(
        knots=(STRAIGHT[0], STRAIGHT[0]), heights=(STRAIGHT[1], STRAIGHT[1]), radices=np.array([[4, 2], [2, 4]])
    )
    assert lattice.encode(np.array([[5.2, 3.9]], dtype=np.float32)).tolist() == [[4, 7]]
    assert lattice.decode(np.array([[4, 7]])).tolist() == [[5.5, 3.5]]
    assert lattice.first(1).decode(np.array([[4]])).tolist() == [[5.0, 2.0]]


def test_outside_values_take_the_outermost_steps_and_unused_codes_the_last():
    lattice = ResidualLattice(knots=STRAIGHT[:1], heights=STRAIGHT[1:], radices=np.array([[3]]))
    assert lattice.encode(np.array([[-9.0], [99.0]], dtype=np.float32)).tolist() == [[0], [2]]
    assert lattice.decode(np.array([[2], [7]])).tolist() == [[pytest.approx(20 / 3)], [pytest.approx(20 / 3)]]


@settings(deadline=None, database=None, max_examples=60)
@given(st.integers(1, 6), st.integers(2, 300), st.integers(1, 5), st.integers(1, 300), st.integers(0, 99))
def test_codes_of_middles_are_the_codes_that_gave_them(dim, num_codes, num_levels, num_rows, seed):
    draws = uniform(2 * num_rows * dim, seed).reshape(2, num_rows, dim).astype(np.float32)
    lattice = ResidualLattice.fit(draws[0] ** 3, draws[1], num_levels=num_levels, num_codes=num_codes)
    codes = lattice.encode(draws[1])
    assert ((codes >= 0) & (codes < num_codes)).all()
    assert lattice.radices.prod(axis=1).max() <= num_codes
    middles = lattice.decode(codes)
    assert lattice.encode(middles.astype(np.float32)).tolist() == codes.tolist() or num_levels > 2  # float32 limits


def test_steps_are_small_where_residuals_are_dense():
    dense = uniform(4_000, seed=1)[:, None].astype(np.float32) * np.float32(0.1)  # all in [0, 0.1]
    lattice = ResidualLattice.fit(dense, np.array([[-1.0], [1.0]], dtype=np.float32), num_levels=1, num_codes=256)
    error = np.abs(lattice.decode(lattice.encode(dense)) - dense)
    uniform_step_error = 2.0 / 256 / 4
    assert error.mean() < 0.1 * uniform_step_error
    far = np.array([[-0.9], [0.7]], dtype=np.float32)
    assert np.abs(lattice.decode(lattice.encode(far)) - far).max() < 0.2


@pytest.mark.parametrize(
    ("spread", "steps", "num_codes", "radices"),
    [
        ([1.0, 1.0], [1, 1], 256, [16, 16]),
        ([8.0, 1.0], [1, 1], 256, [64, 4]),
        ([1.0, 1.0], [8, 1], 8, [1, 8]),
        ([1.0, 0.0], [1, 1], 256, [256, 1]),
        ([1.0] * 6, [1] * 6, 256, [4, 4, 2, 2, 2, 2]),
        ([], [], 256, []),
    ],
)
def test_digits_go_where_the_error_is_largest(spread, steps, num_codes, radices):
    assert allocate(np.array(spread), np.array(steps, dtype=np.int64), num_codes).tolist() == radices


def test_a_product_grid_covers_its_box():
    grid = product_grid(np.array([0.0, 0.0], dtype=np.float32), np.array([4.0, 1.0], dtype=np.float32), 4)
    assert grid.tolist() == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [3.5, 0.5]]


def test_damaged_json_is_refused():
    lattice = ResidualLattice(knots=STRAIGHT[:1], heights=STRAIGHT[1:], radices=np.array([[3]]))
    document = lattice.to_json()
    with pytest.raises(DataError, match="a radix below 1"):
        ResidualLattice.from_json({**document, "radices": [[0]]})
    with pytest.raises(DataError, match="knots and heights do not match"):
        ResidualLattice.from_json({**document, "heights": [{**document["heights"][0], "shape": [2, 1]}]})
