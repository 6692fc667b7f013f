"""The claim of `vq`: no more tokens and less mean absolute error than 256 uniform bins, also on what it never saw."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.actions import codec_report, fit_codec
from stoker_proto.actions.kmeans import uniform

DEMONSTRATIONS = "maniskill_demos/demos.jsonl"


@pytest.fixture(scope="module")
def trajectories():
    default = Path(__file__).parents[4] / "shared" / "data"
    path = Path(os.environ.get("STOKER_SHARED_DATA", default)) / DEMONSTRATIONS
    if not path.is_file():
        pytest.skip(f"NOT TESTED on real demonstrations: no {DEMONSTRATIONS}; set STOKER_SHARED_DATA to its root")
    return [np.array(json.loads(line)["actions"], dtype=np.float32) for line in path.read_text().splitlines()]


def reports(fitted, actions, summary):
    statistics, sample = summary(fitted)
    return [codec_report(fit_codec(name, sample, statistics, chunk=1), actions) for name in ("vq", "bins")]


def test_on_the_demonstrations_that_it_was_fitted_to(trajectories, summary):
    actions = np.concatenate(trajectories)
    vq, bins = reports(actions, actions, summary)
    assert (vq.tokens_per_action, bins.tokens_per_action) == (4.0, 7.0)
    assert vq.mean_abs_error.mean() < 0.7 * bins.mean_abs_error.mean()
    assert vq.max_abs_error.max() < 0.02  # bins clip what lies outside q01..q99
    assert vq.max_abs_error[[3, 4, 6]].max() == 0.0  # the constant rotations and the gripper


@pytest.mark.parametrize("held_out", range(3))
def test_on_held_out_demonstrations(held_out, trajectories, summary):
    fitted = np.concatenate([t for i, t in enumerate(trajectories) if i % 3 != held_out])
    others = np.concatenate([t for i, t in enumerate(trajectories) if i % 3 == held_out])
    vq, bins = reports(fitted, others, summary)
    assert vq.tokens_per_action <= 5
    assert vq.mean_abs_error.mean() < bins.mean_abs_error.mean()
    assert vq.max_abs_error[6] == 0.0


@pytest.mark.long
def test_on_smooth_actions_of_other_trajectories(smooth_actions, summary):
    vq, bins = reports(smooth_actions(20_000, seed=1), smooth_actions(5_000, seed=2), summary)
    assert vq.tokens_per_action <= 6
    assert vq.mean_abs_error.mean() < bins.mean_abs_error.mean()
    assert vq.code_use.min() > 0.9
    assert vq.code_perplexity.min() > 150


@pytest.mark.long
def test_on_actions_without_any_structure(summary):
    """Uniform noise cannot be compressed: the same 7 tokens, and still not worse."""
    draws = (2 * uniform(70_000, seed=3) - 1).reshape(10_000, 7).astype(np.float32)
    vq, bins = reports(draws[:8_000], draws[8_000:], summary)
    assert vq.tokens_per_action <= 7
    assert vq.mean_abs_error.mean() < bins.mean_abs_error.mean()
