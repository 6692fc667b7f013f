import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.actions import ActionStatistics, ActionVocabulary, codec_from_json, fit_codec
from stoker_proto.actions.bins import UniformBins
from stoker_proto.errors import ConfigError, DataError


def statistics_of(q01, q99, mask=None):
    """Statistics whose range is wider than the quantiles, so that no dimension counts as constant."""
    q01, q99 = np.array(q01, dtype=np.float64), np.array(q99, dtype=np.float64)
    mask = np.ones(len(q01), dtype=bool) if mask is None else np.array(mask)
    return ActionStatistics(
        count=100, min=q01 - 1, max=q99 + 1, mean=q01, std=np.ones(len(q01)), q01=q01, q99=q99, mask=mask
    )


# Worked out by hand from openvla's action_tokenizer.py: digitize(clip(x, -1, 1), linspace(-1, 1, 256)),
# id = 32000 - digitize, value = bin_centers[clip(digitize - 1, 0, 254)].
OPENVLA = [
    (-1.0, 31999, -0.99607843),
    (-0.3, 31910, -0.29803922),
    (0.0, 31872, 0.0),
    (0.5, 31808, 0.50196078),
    (0.999, 31745, 0.99607843),
    (1.0, 31744, 0.99607843),
    (-7.0, 31999, -0.99607843),
    (7.0, 31744, 0.99607843),
]


@pytest.mark.parametrize(("value", "token_id", "decoded"), OPENVLA)
@pytest.mark.parametrize("mask", [True, False])
def test_ids_and_centres_are_those_of_openvla(value, token_id, decoded, mask):
    codec = UniformBins(statistics_of([-1.0], [1.0], [mask]), chunk=1)
    vocabulary = ActionVocabulary.reuse_last(vocab_size=32_000, num_codes=codec.num_codes)
    codes = codec.encode(np.array([[[value]]], dtype=np.float32))
    assert vocabulary.to_ids(codes).tolist() == [[token_id]]
    assert codec.decode(codes)[0, 0, 0] == pytest.approx(decoded, abs=1e-6)


def test_quantiles_scale_the_masked_dimensions_only():
    codec = UniformBins(statistics_of([-0.5, 0.0], [1.5, 0.2], [True, False]), chunk=2)
    actions = np.array([[[1.0, 0.5], [9.0, 1.0]]], dtype=np.float32)  # [1, 2, 2]
    codes = codec.encode(actions)
    assert (codes.dtype, codes.tolist()) == (np.int32, [[191, 191, 255, 255]])
    expected = [[[1.00196078, 0.50196078], [1.49607843, 0.99607843]]]
    assert codec.decode(codes) == pytest.approx(np.array(expected), abs=1e-6)
    assert (codec.num_codes, codec.max_tokens, codec.dim, codec.chunk) == (256, 4, 2, 2)


def test_a_constant_dimension_is_exact(summary):
    statistics, sample = summary([[0.25, 1.0], [0.25, 2.0], [0.25, 3.0]])
    codec = fit_codec("bins", sample, statistics, chunk=1)
    assert codec.decode(codec.encode(sample[:, None]))[:, 0, 0].tolist() == [0.25, 0.25, 0.25]


@settings(deadline=None, database=None, max_examples=100)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20), st.integers(2, 1_000))
def test_the_error_is_at_most_half_a_bin(values, num_bins):
    codec = UniformBins(statistics_of([-1.0], [1.0]), chunk=1, num_bins=num_bins)
    actions = np.array(values, dtype=np.float32)[:, None, None]
    codes = codec.encode(actions)
    assert ((codes >= 0) & (codes < num_bins)).all()
    assert np.abs(codec.decode(codes) - actions).max() <= 1 / (num_bins - 1) + 1e-6


def test_json_is_pinned_and_fingerprint_follows_it():
    codec = UniformBins(statistics_of([-1.0], [1.0]), chunk=3, num_bins=16)
    expected = (
        '{"version": 1, "name": "bins", "chunk": 3, "num_bins": 16, "statistics": {"count": 100, "min": [-2.0], '
        '"max": [2.0], "mean": [-1.0], "std": [1.0], "q01": [-1.0], "q99": [1.0], "mask": [true]}}'
    )
    assert json.dumps(codec.to_json()) == expected
    assert codec.fingerprint == "cae86d0bec6de0315dc02e3a31489c8748042b15f3cc0af992ff52a59feae2f7"
    assert codec_from_json(json.loads(expected)).fingerprint == codec.fingerprint
    assert UniformBins(statistics_of([-1.0], [1.0]), chunk=2, num_bins=16).fingerprint != codec.fingerprint


def test_bad_codes_and_actions_are_named():
    codec = UniformBins(statistics_of([-1.0, -1.0], [1.0, 1.0]), chunk=2)
    with pytest.raises(DataError, match=r"row 1: code 256 at position 3 is outside \[0, 256\)"):
        codec.decode([[0, 0, 0, 0], [0, 0, 0, 256]])
    with pytest.raises(DataError, match=r"row 0: code -1 at position 0"):
        codec.decode([[-1, 0, 0, 0]])
    with pytest.raises(DataError, match=r"codes of shape \[1, 3\]; a chunk has 4 codes"):
        codec.decode([[0, 0, 0]])
    with pytest.raises(DataError, match="codes are integers"):
        codec.decode([[0.0, 0.0, 0.0, 0.0]])
    with pytest.raises(DataError, match="row 1, timestep 0: dimension 1 is nan"):
        codec.encode([[[0, 0], [0, 0]], [[0, np.nan], [0, 0]]])
    with pytest.raises(DataError, match=r"shape \[1, 2, 3\]; this codec takes \[N, 2, 2\]"):
        codec.encode(np.zeros((1, 2, 3)))
    with pytest.raises(ConfigError, match="num_bins 1: it must be in"):
        UniformBins(statistics_of([0.0], [1.0]), chunk=1, num_bins=1)
    with pytest.raises(ConfigError, match="an action chunk of 0 timesteps"):
        UniformBins(statistics_of([0.0], [1.0]), chunk=0)


def test_what_is_clamped_is_counted_also_where_a_dimension_never_or_hardly_ever_moved():
    statistics = ActionStatistics(
        count=1000,
        min=np.array([-3.0, 0.1, 0.0, -1.0]),
        max=np.array([3.0, 0.1, 0.8, 1.0]),
        mean=np.zeros(4),
        std=np.ones(4),
        q01=np.array([-2.0, 0.1, 0.0, 0.0]),
        q99=np.array([2.0, 0.1, 0.0, 1.0]),
        mask=np.array([True, True, True, False]),
    )
    codec = UniformBins(statistics, chunk=1)
    good = np.array([2.0, 0.1, 0.0, -1.0], np.float32)
    assert codec.num_clamped([[good]]) == 0
    for dimension, value in ((0, 2.1), (0, -2.1), (1, 0.2), (2, 0.8), (3, 1.5)):
        wild = good.copy()
        wild[dimension] = value
        assert codec.num_clamped([[wild], [good]]) == 1
        assert (
            abs(codec.decode(codec.encode([[wild]]))[0, 0, dimension] - value) > 0.09
        )  # indeed, it does not come back
