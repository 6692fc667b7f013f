import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_proto.actions import StatisticsAccumulator, codec_from_json, fit_codec
from stoker_proto.actions.kmeans import uniform
from stoker_proto.actions.vq import VectorQuantizer
from stoker_proto.errors import ConfigError, DataError

PINNED = "d1877cd1cd44534e941dbfca6ccd49ad6caf22d5573ab01d2fae31e9516a68db"


@pytest.fixture(scope="module")
def codec(smooth_actions, summary):
    statistics, sample = summary(smooth_actions(2_000, seed=11))
    return fit_codec("vq", sample, statistics, chunk=2, levels=5)


def test_shapes_and_types(codec, smooth_actions):
    actions = smooth_actions(60, seed=12).reshape(30, 2, 7)
    codes = codec.encode(actions)
    assert (codes.dtype, codes.shape) == (np.int32, (30, 10))
    assert (codec.num_codes, codec.max_tokens, codec.levels, codec.dim, codec.chunk) == (256, 10, 5, 7, 2)
    decoded = codec.decode(codes)
    assert (decoded.dtype, decoded.shape) == (np.float32, (30, 2, 7))
    assert codec.encode(actions[:0]).shape == (0, 10)
    assert codec.decode(codes[:0]).shape == (0, 2, 7)


def test_each_timestep_is_coded_on_its_own(codec, smooth_actions):
    actions = smooth_actions(60, seed=12)
    alone = codec.with_levels(5, chunk=1).encode(actions[:, None])
    assert codec.encode(actions.reshape(30, 2, 7)).tolist() == alone.reshape(30, 10).tolist()


def test_the_fit_is_the_pinned_one(codec):
    assert codec.fingerprint == PINNED


@pytest.mark.process
def test_the_fit_is_the_pinned_one_without_vector_instructions(tmp_path, smooth_actions):
    """Another processor takes other loops in numpy: with all of them switched off the same bits must come out."""
    np.save(tmp_path / "actions.npy", smooth_actions(2_000, seed=11))
    program = (
        "import sys, numpy as np\n"
        "from stoker_proto.actions import StatisticsAccumulator, fit_codec\n"
        "rows = np.load(sys.argv[1])\n"
        "accumulator = StatisticsAccumulator(7)\n"
        "accumulator.add(rows, np.arange(len(rows), dtype=np.uint64))\n"
        "statistics, sample = accumulator.finish()\n"
        "print(fit_codec('vq', sample, statistics, chunk=2, levels=5).fingerprint)\n"
    )
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(found), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "actions.npy")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PINNED


def test_parts_merged_in_another_order_fit_the_same_codec(codec, smooth_actions):
    rows, names = smooth_actions(2_000, seed=11), np.arange(2_000, dtype=np.uint64)
    parts = [StatisticsAccumulator(7), StatisticsAccumulator(7)]
    parts[1].add(rows[:700], names[:700])
    parts[0].add(rows[700:], names[700:])
    parts[0].merge(parts[1])
    statistics, sample = parts[0].finish()
    assert fit_codec("vq", sample, statistics, chunk=2, levels=5).fingerprint == PINNED


def test_batching_does_not_change_a_code(codec, smooth_actions):
    actions = smooth_actions(1_000, seed=13).reshape(500, 2, 7)
    one_by_one = np.concatenate([codec.encode(actions[i : i + 1]) for i in range(500)])
    assert codec.encode(actions).tolist() == one_by_one.tolist()


def test_json_round_trip_gives_the_same_codec(codec, smooth_actions):
    again = codec_from_json(json.loads(json.dumps(codec.to_json())))
    actions = smooth_actions(100, seed=14).reshape(50, 2, 7)
    assert again.fingerprint == codec.fingerprint
    assert again.encode(actions).tolist() == codec.encode(actions).tolist()
    assert again.decode(codec.encode(actions)).tobytes() == codec.decode(codec.encode(actions)).tobytes()


def test_every_level_makes_the_error_smaller(codec, smooth_actions):
    actions = smooth_actions(1_000, seed=15)[:, None]
    errors = []
    for levels in range(1, 6):
        coarse = codec.with_levels(levels, chunk=1)
        errors.append(float(np.abs(coarse.decode(coarse.encode(actions)) - actions).mean()))
    assert all(later < 0.7 * earlier for earlier, later in pairwise(errors)), errors


@pytest.mark.long
@settings(deadline=None, database=None, max_examples=60)
@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=7, max_size=7), min_size=1, max_size=8))
def test_any_finite_action_encodes_and_decodes_inside_the_range_of_the_data(codec, rows):
    actions = np.array(rows, dtype=np.float32)[:, None].repeat(2, axis=1)
    codes = codec.encode(actions)
    assert ((codes >= 0) & (codes < codec.num_codes)).all()
    decoded = codec.decode(codes)
    assert (decoded >= codec.statistics.min.astype(np.float32)).all()
    assert (decoded <= codec.statistics.max.astype(np.float32)).all()


@settings(deadline=None, database=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 255), min_size=10, max_size=10), min_size=1, max_size=8))
def test_any_codes_in_range_decode_to_finite_actions(codec, rows):
    assert np.isfinite(codec.decode(np.array(rows, dtype=np.int32))).all()


def test_all_of_the_box_is_within_reach(codec):
    """Also where no action of the sample was: the lattice stretches over the whole range of the data."""
    low, high = codec.space.lower[:6], codec.space.upper[:6]
    corners = np.where((np.arange(64)[:, None] >> np.arange(6)) & 1, high, low)
    inside = low + uniform(6_000, seed=9).reshape(1_000, 6) * (high - low)
    continuous = np.concatenate([corners, inside])
    actions = np.concatenate([continuous, np.ones((len(continuous), 1))], axis=1)[:, None].astype(np.float32)
    fine = codec.with_levels(5, chunk=1)
    error = np.abs(fine.decode(fine.encode(actions)) - actions)[:, 0, :6] / (high - low)
    assert error.max() < 0.1
    assert error.mean() < 0.02


def test_gripper_and_constant_dimensions_are_exact(summary):
    rows = uniform(3_000, seed=5).reshape(1_000, 3).astype(np.float32)
    rows = np.concatenate(
        [rows, np.full((1_000, 1), 0.1), np.zeros((1_000, 1)), np.where(rows[:, :1] > 0.9, 1, -1)], axis=1
    )
    statistics, sample = summary(rows.astype(np.float32))
    for levels in (1, 4):
        codec = fit_codec("vq", sample, statistics, chunk=1, levels=levels)
        decoded = codec.decode(codec.encode(sample[:, None]))[:, 0]
        assert (decoded[:, 3:] == sample[:, 3:]).all()
        assert codec.space.continuous == [0, 1, 2]
    open_gripper = np.array([[[0.5, 0.5, 0.5, 0.1, 0.0, 0.7]]], dtype=np.float32)  # between the two values: the nearer
    assert codec.decode(codec.encode(open_gripper))[0, 0, 5] == 1.0


def test_a_dimension_that_rarely_moves_is_kept_although_its_quantiles_are_equal(summary):
    rows = uniform(4_000, seed=4).reshape(2_000, 2).astype(np.float32)
    rows[:, 1] = np.where(np.arange(2_000) % 250 == 7, rows[:, 1], 0.0)  # 8 of 2,000; bins turn them into 0
    statistics, sample = summary(rows)
    assert statistics.q01[1] == statistics.q99[1] == 0.0
    codec = fit_codec("vq", sample, statistics, chunk=1, levels=4)
    moved = rows[rows[:, 1] != 0.0]
    assert np.abs(codec.decode(codec.encode(moved[:, None]))[:, 0] - moved).max() < 0.01


def test_a_combination_of_discrete_values_never_seen_still_has_codewords(summary):
    rows = uniform(800, seed=6).reshape(400, 2).astype(np.float32)
    flags = np.array([[-1.0, 0.0], [1.0, 0.0], [-1.0, 5.0]])[np.arange(400) % 3]  # (1, 5) does not occur
    statistics, sample = summary(np.concatenate([rows, flags], axis=1).astype(np.float32))
    codec = fit_codec("vq", sample, statistics, chunk=1, levels=4)
    action = np.array([[[0.3, 0.6, 1.0, 5.0]]], dtype=np.float32)
    assert codec.decode(codec.encode(action))[0, 0] == pytest.approx([0.3, 0.6, 1.0, 5.0], abs=0.02)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_samples_smaller_than_the_codebook(count, smooth_actions, summary):
    statistics, sample = summary(smooth_actions(count, seed=20))
    codec = fit_codec("vq", sample, statistics, chunk=1, levels=6)
    error = np.abs(codec.decode(codec.encode(sample[:, None]))[:, 0] - sample)
    assert error.max() <= 0.01 * max(1e-6, float((sample.max(axis=0) - sample.min(axis=0)).max()))
    assert codec_from_json(codec.to_json()).fingerprint == codec.fingerprint


def test_only_discrete_dimensions_need_one_level(summary):
    statistics, sample = summary(np.where(uniform(200, seed=8).reshape(100, 2) > 0.5, 1.0, -1.0))
    codec = fit_codec("vq", sample, statistics, chunk=1)
    assert codec.levels == 1
    assert (codec.decode(codec.encode(sample[:, None]))[:, 0] == sample).all()
    assert codec_from_json(codec.to_json()).fingerprint == codec.fingerprint


def test_one_wild_value_does_not_coarsen_the_rest(smooth_actions, summary):
    rows = smooth_actions(2_000, seed=21)
    wild = rows.copy()
    wild[7, 0] = 1e6
    errors = []
    for source in (rows, wild):
        statistics, sample = summary(source)
        codec = fit_codec("vq", sample, statistics, chunk=1, levels=6)
        errors.append(float(np.abs(codec.decode(codec.encode(rows[100:, None]))[:, 0] - rows[100:]).mean()))
    assert errors[1] < 2 * errors[0]


def test_fewer_codes_and_fixed_levels(smooth_actions, summary):
    statistics, sample = summary(smooth_actions(2_000, seed=11))
    codec = fit_codec("vq", sample, statistics, chunk=1, codebook_size=16, levels=3)
    assert (codec.num_codes, codec.max_tokens) == (16, 3)
    assert codec.encode(sample[:, None]).max() < 16


def test_bad_input_is_named(codec, smooth_actions, summary):
    statistics, sample = summary(smooth_actions(50, seed=1))
    broken = sample.copy()
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="row 3: dimension 2 is nan"):
        VectorQuantizer.fit(broken, statistics, chunk=1)
    with pytest.raises(DataError, match=r"row 0: 6 numbers \(actions of shape \[50, 6\]\); an action has 7"):
        VectorQuantizer.fit(sample[:, :6], statistics, chunk=1)
    with pytest.raises(DataError, match="no actions to fit a codec to"):
        VectorQuantizer.fit(sample[:0], statistics, chunk=1)
    with pytest.raises(DataError, match=r"row 0: code 256 at position 9 is outside \[0, 256\)"):
        codec.decode([[0] * 9 + [256]])
    with pytest.raises(DataError, match=r"codes of shape \[1, 9\]; a chunk has 10 codes"):
        codec.decode([[0] * 9])
    actions = np.zeros((2, 2, 7))
    actions[1, 1, 6] = np.inf
    with pytest.raises(DataError, match="row 1, timestep 1: dimension 6 is inf"):
        codec.encode(actions)
    with pytest.raises(ConfigError, match="codebook_size 1: it must be in"):
        VectorQuantizer.fit(sample, statistics, chunk=1, codebook_size=1)
    with pytest.raises(ConfigError, match="levels 0: it must be in"):
        VectorQuantizer.fit(sample, statistics, chunk=1, levels=0)


def test_damaged_json_is_refused(codec):
    document = codec.to_json()
    with pytest.raises(DataError, match="a damaged array in an action codec"):
        codec_from_json(
            {
                **document,
                "codebook": {**document["codebook"], "words": {"dtype": "<f4", "shape": [9], "base64": "AAAA"}},
            }
        )
    with pytest.raises(DataError, match="a damaged action codec 'vq'"):
        codec_from_json({k: v for k, v in document.items() if k != "lattice"})
    with pytest.raises(DataError, match=r"a damaged action codec: .* groups"):
        codec_from_json({**document, "codebook": {**document["codebook"], "groups": [0] * 256}})
