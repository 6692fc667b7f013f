import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.actions import ActionVocabulary, codec_from_json, codec_report, fit_codec
from stoker_proto.actions.cosine import CosineTransform
from stoker_proto.actions.fast import FastCodec
from stoker_proto.actions.kmeans import uniform
from stoker_proto.errors import ConfigError, DataError

CHUNK = 10


@pytest.fixture(scope="module")
def chunks(smooth_actions):
    return smooth_actions(20_000, seed=1).reshape(-1, CHUNK, 7)


@pytest.fixture(scope="module")
def codec(chunks, summary):
    return fit_codec("fast", chunks, summary(chunks.reshape(-1, 7))[0], chunk=CHUNK)


def test_the_transform_is_the_orthonormal_dct():
    transform = CosineTransform(4)
    values = np.array([[1.0, 2.0, 3.0, 4.0]]).reshape(1, 4, 1)
    # scipy.fft.dct([1, 2, 3, 4], norm="ortho")
    assert transform.forward(values).ravel() == pytest.approx([5.0, -2.23044250, 0.0, -0.15851267], abs=1e-5)
    draws = (4 * uniform(70 * 9, seed=1) - 2).reshape(9, 10, 7)
    amplitudes = CosineTransform(10).forward(draws)
    assert (amplitudes**2).sum() == pytest.approx((draws**2).sum(), rel=1e-5)
    whole = np.rint(amplitudes * 1000).astype(np.int64)
    assert CosineTransform(10).backward(whole) / 1000 == pytest.approx(draws, abs=2e-3)


def test_sums_are_exact_so_their_order_does_not_matter():
    draws = (16 * uniform(512 * 3, seed=1) - 8).reshape(1, 512, 3)
    transform = CosineTransform(512)
    backwards = np.zeros((512, 3))
    rounded = np.rint(draws[0] * 2**20) / 2**20
    for t in reversed(range(512)):
        backwards += transform._matrix[:, t, None] * rounded[t]
    assert transform.forward(draws)[0].tolist() == backwards.tolist()


def test_a_chunk_worked_out_by_hand(summary):
    """One dimension, q01..q99 = about -1..1: amplitudes of [1, 1] are [sqrt 2, 0], times 10: [14, 0]."""
    chunks = np.array(
        [[[1.0], [1.0]], [[-1.0], [-1.0]]] * 200 + [[[0.1], [0.2]], [[0.3], [0.5]], [[-0.4], [0.9]]], np.float32
    )
    fitted = fit_codec("fast", chunks, summary(chunks.reshape(-1, 1))[0], chunk=2)
    assert (fitted.lowest, fitted.num_symbols) == (-14, 29)
    # Symbols are amplitudes + 14. (0, 14) and (28, 14) are equally frequent: the smaller one becomes token 29.
    assert fitted.merges[:2] == [(0, 14), (28, 14)]
    tokens = fitted.encode(np.array([[[1.0], [1.0]], [[-1.0], [-1.0]], [[0.0], [1.0]]], np.float32))
    assert [row.tolist() for row in tokens] == [[30], [29], [21, 7]]
    assert fitted.decode(tokens)[:, :, 0] == pytest.approx(
        np.array([[0.99, 0.99], [-0.99, -0.99], [0.0, 0.99]]), abs=1e-2
    )


@pytest.mark.long
def test_it_says_less_than_bins_and_is_more_exact(chunks, codec, smooth_actions, summary):
    others = smooth_actions(5_000, seed=2).reshape(-1, CHUNK, 7)
    bins = fit_codec("bins", chunks.reshape(-1, 7), codec.statistics, chunk=CHUNK)
    ours, theirs = codec_report(codec, others), codec_report(bins, others)
    assert ours.tokens_per_action < 0.5 * theirs.tokens_per_action
    assert ours.max_abs_error.max() < theirs.max_abs_error.max()
    assert ours.max_abs_error[6] == 0.0  # the gripper
    assert ours.most_tokens < ours.max_tokens == 70
    assert ours.clamped < 1e-3


def test_every_length_decodes_to_what_was_encoded(chunks, codec):
    tokens = codec.encode(chunks[:200])
    assert len({len(row) for row in tokens}) > 5
    assert all(row.dtype == np.int32 for row in tokens)
    decoded = codec.decode(tokens)
    assert np.abs(decoded - chunks[:200]).max() < 0.35 * float(codec.space.scale.max())
    one_by_one = np.concatenate([codec.decode(row[None]) for row in tokens])
    assert decoded.tobytes() == one_by_one.tobytes()
    assert [a.tolist() for a in codec.encode(decoded)] == [a.tolist() for a in tokens]
    assert codec.encode(chunks[:0]) == []
    assert codec.code_lengths[np.concatenate(tokens)].sum() == 200 * codec.max_tokens


def test_its_json_is_itself(codec, chunks):
    text = json.dumps(codec.to_json())
    again = codec_from_json(json.loads(text))
    assert again.fingerprint == codec.fingerprint
    assert json.dumps(again.to_json()) == text
    assert [a.tolist() for a in again.encode(chunks[:50])] == [a.tolist() for a in codec.encode(chunks[:50])]


def test_codes_that_are_no_whole_chunk_are_refused(codec, chunks):
    tokens = codec.encode(chunks[:1])[0]
    for wrong, message in (
        (tokens[:-1], "codes that stand for"),
        (np.append(tokens, 0), "stand for 71 amplitudes; a chunk has 70"),
        (np.append(tokens[:-1], codec.num_codes), f"code {codec.num_codes} is outside"),
        (np.append(tokens[:-1], -1), "code -1 is outside"),
        (tokens[:0], "0 codes that stand for 0 amplitudes"),
        (tokens.astype(np.float32), "codes are integers"),
    ):
        with pytest.raises(DataError, match=f"row 0: .*{message}"):
            codec.decode([wrong])


def test_what_lies_outside_is_clamped_counted_and_told(codec, chunks, caplog):
    wild = chunks[:3].copy()
    assert codec.num_clamped(wild) == 0
    wild[1, 4, 2] = 1e6
    wild[2, 0, 6] = 0.25  # a gripper is -1 or 1
    assert codec.num_clamped(wild) >= 2
    fresh = codec_from_json(codec.to_json())
    for _ in range(3):
        decoded = fresh.decode(fresh.encode(wild))
    assert np.isfinite(decoded).all()
    assert (decoded <= codec.space.upper + 1e-6).all()
    assert len(caplog.records) == 1
    assert "clamped so far" in caplog.text
    assert codec_report(codec, wild).clamped == codec.num_clamped(wild) / wild.size
    steady = np.broadcast_to(codec.space.upper, (1, CHUNK, 7))  # inside at every timestep, but never for so long
    assert not codec.space.outside(steady).any()
    assert codec.num_clamped(steady) > 0


def test_one_wild_value_does_not_use_up_the_tokens(chunks, summary):
    wild = chunks.copy()
    wild[5, 3, 1] = 1e9
    fitted = fit_codec("fast", wild, summary(wild.reshape(-1, 7))[0], chunk=CHUNK, vocab_size=256)
    assert fitted.num_symbols <= 129
    assert fitted.num_codes == 256
    assert 0 < fitted.num_clamped(wild) < 20
    assert np.abs(fitted.decode(fitted.encode(chunks[6:60])) - chunks[6:60]).max() < 0.35 * float(
        fitted.space.scale.max()
    )


def test_actions_that_never_move(summary):
    still = np.full((30, 4, 2), 0.5, np.float32)
    fitted = fit_codec("fast", still, summary(still.reshape(-1, 2))[0], chunk=4)
    tokens = fitted.encode(still[:2])
    assert [len(row) for row in tokens] == [1, 1]
    assert (fitted.decode(tokens) == 0.5).all()


def test_its_ids_are_those_of_every_vocabulary(codec, chunks):
    for vocabulary in (
        ActionVocabulary.reuse_last(vocab_size=32_000, num_codes=codec.num_codes),
        ActionVocabulary.added(first_id=32_064, num_codes=codec.num_codes),
    ):
        for row in codec.encode(chunks[:20]):
            assert vocabulary.to_codes(vocabulary.to_ids(row)).tolist() == row.tolist()


_PROGRAM = """
import sys
import numpy as np
from stoker_proto.actions import StatisticsAccumulator, fit_codec
from stoker_proto.actions.kmeans import uniform
rows = np.cumsum(uniform(600 * 8 * 3, 5).reshape(600, 8, 3) - 0.5, axis=1).astype(np.float32)
accumulator = StatisticsAccumulator(3)
accumulator.add(rows.reshape(-1, 3), np.arange(4800, dtype=np.uint64))
codec = fit_codec("fast", rows, accumulator.finish()[0], chunk=8)
print(codec.fingerprint, len(codec.merges), [row.tolist() for row in codec.encode(rows[:100])])
"""


@pytest.mark.process
def test_processes_with_other_numbers_of_threads_and_other_hash_seeds_agree():
    outputs = []
    for threads, seed, parallel in (("1", "0", "false"), ("4", "1", "true"), ("2", "77", "true")):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONHASHSEED": seed,
            "TOKENIZERS_PARALLELISM": parallel,
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), threads),
        }
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        outputs.append(done.stdout)
    assert outputs[0].startswith(PINNED)
    assert outputs == outputs[:1] * 3


PINNED = (
    "2efec537e967f46168b641f6a4c4f627dd47eb3672f0d2c497555e351a550e16 823 [[27, 120, 276, 67, 149, 113, 289, 174, 72]"
)
"""Another machine, another version of numpy or of `tokenizers`: the same codec."""


def test_options_out_of_range(chunks, summary):
    statistics, rows = summary(chunks[:20].reshape(-1, 7))
    for options, message in (
        ({"vocab_size": 8}, r"vocab_size 8: it must be in \[16, 4096\]"),
        ({"scale": 0}, "scale 0 and min_frequency 2"),
        ({"min_frequency": 0}, "min_frequency 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_codec("fast", chunks[:20], statistics, chunk=CHUNK, **options)
    with pytest.raises(DataError, match=r"chunks of shape \[200, 7\]: \[M, 10, 7\] are needed"):
        fit_codec("fast", rows, statistics, chunk=CHUNK)
    with pytest.raises(ConfigError, match="at most 512 timesteps"):
        FastCodec.fit(np.zeros((1, 600, 7), np.float32), statistics, chunk=600)


def test_damaged_json_is_refused(codec):
    document = codec.to_json()
    for change in ({"merges": [[0, 5000]]}, {"num_symbols": 0}, {"merges": [[1]]}, {"scale": "x"}, {"chunk": 9_999}):
        with pytest.raises((DataError, ConfigError)) as caught:
            codec_from_json({**document, **change})
        assert "damaged" in str(caught.value) or "at most" in str(caught.value)


def test_it_is_small_enough_to_travel_with_the_model(codec, tmp_path: Path):
    assert len(json.dumps(codec.to_json())) < 64_000
