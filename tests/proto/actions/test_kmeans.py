import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.actions.kmeans import half_squared_norms, kmeans, nearest, squared_distances, uniform


def labels_of(points, codebook):
    return nearest(points, np.ascontiguousarray(codebook.T), half_squared_norms(codebook))


def test_uniform_numbers_are_pinned_and_fill_the_interval():
    # 0xe220a8397b1dcdaf and 0x6e789e6aa1b965f4 are the first outputs of the reference splitmix64 seeded with 0.
    expected = [0.0, (0xE220A8397B1DCDAF >> 11) / 2**53, (0x6E789E6AA1B965F4 >> 11) / 2**53]
    assert uniform(3, seed=0).tolist() == expected
    draws = uniform(10_000, seed=7)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert abs(draws.mean() - 0.5) < 0.01


def test_of_equally_near_codewords_the_first_is_taken():
    codebook = np.array([[1.0], [-1.0], [1.0]], dtype=np.float32)
    assert labels_of(np.array([[0.0], [2.0], [-2.0]], dtype=np.float32), codebook).tolist() == [0, 0, 1]


def test_forbidden_codewords_are_never_taken():
    codebook = np.array([[0.0], [10.0]], dtype=np.float32)
    offsets = np.where([[True, False], [False, True]], half_squared_norms(codebook), np.float32(np.inf))
    found = nearest(np.zeros((2, 1), dtype=np.float32), np.ascontiguousarray(codebook.T), offsets, np.array([1, 0]))
    assert found.tolist() == [1, 0]


@settings(deadline=None, database=None, max_examples=40)
@given(st.integers(1, 600), st.integers(1, 300), st.integers(1, 8), st.integers(0, 1_000))
def test_nearest_is_the_brute_force_answer(num_points, num_codes, dim, seed):
    draws = uniform((num_points + num_codes) * dim, seed).astype(np.float32).reshape(-1, dim)
    points, codebook = draws[:num_points], draws[num_points:]
    found = squared_distances(points, codebook[labels_of(points, codebook)])
    exact = ((points[:, None].astype(np.float64) - codebook) ** 2).sum(axis=2).min(axis=1)
    assert np.abs(found - exact).max() < 1e-5


def test_three_clumps_are_found():
    centres = np.array([[0.0, 0.0], [5.0, 5.0], [-5.0, 5.0]], dtype=np.float32)
    points = np.repeat(centres, 40, axis=0) + (uniform(240, seed=3).reshape(120, 2).astype(np.float32) - 0.5) * 0.1
    found = kmeans(points, 3, seed=1)
    assert sorted(found.round().tolist()) == sorted(centres.tolist())


def test_more_codes_than_points_repeats_them_and_stays_finite():
    points = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    found = kmeans(points, 5, seed=1)
    assert {tuple(word) for word in found.tolist()} == {(1.0, 2.0), (3.0, 4.0)}
    assert np.isfinite(kmeans(np.zeros((10, 3), dtype=np.float32), 4, seed=1)).all()


def test_an_empty_cluster_takes_the_farthest_point():
    # With the seeds 0, 0 the second cluster stays empty; it takes 9, the point farthest from its codeword.
    from stoker_proto.actions.kmeans import _means

    points = np.array([[0.0], [1.0], [9.0]], dtype=np.float32)
    means = _means(points, np.array([0, 0, 0]), np.zeros((2, 1), dtype=np.float32))
    assert means[:, 0].tolist() == [np.float32(10 / 3), 9.0]
