"""Free-running errors are those of decoding one by one; the best constant action and varying tokens by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.actions import StatisticsAccumulator
from stoker_proto.config import Config
from tests.trainer.support.memory import DIM, make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import NUM_VAL, build_run
from trainer.evals.action_figures import BestConstant, VaryingTokens, free_running_ids
from trainer.evals.scores import action_positions, best_actions
from trainer.evals.validation import validate
from trainer.models.families import family_of
from trainer.policy import Policy
from trainer.policy_io import PolicyInput


def free_and_one_by_one(rank: int, config: Config) -> dict[str, Any]:
    trainer = build_run(config)
    processor, stepper = trainer.processor, trainer.stepper
    assert processor.vocabulary is not None
    assert processor.codec is not None
    assert trainer.val is not None
    feed: Any = trainer.val.feed
    with torch.no_grad():  # larger weights, so that a token decides the next one
        for parameter in stepper.engine.module.parameters():
            parameter.mul_(3)
    policy = Policy(stepper.engine.module, processor, family_of(stepper.engine.module.config))
    found: dict[str, Any] = {"free": [], "forced": [], "alone": [], "errors": [], "outside": []}
    with torch.no_grad():
        for step in feed.steps(0, 0):
            for batch in step.micro_batches:
                inputs = stepper.make_inputs(batch)
                logits = stepper.logits(inputs)
                mask = action_positions(inputs.targets, batch.actions, processor.vocabulary)
                vocabulary = processor.vocabulary
                ids = free_running_ids(stepper, inputs, mask, logits, vocabulary, DIM - 1)
                forced = best_actions(logits, vocabulary.first_id, vocabulary.end_id)
                inside = logits.softmax(-1)[..., vocabulary.first_id : vocabulary.end_id].sum(-1)
                found["outside"] += (1 - inside)[mask].tolist()
                for row in np.flatnonzero(mask.any(dim=1).numpy()):
                    example = feed.examples[int(batch.keys[row, 1])]
                    one = PolicyInput(images=[example.frame], instruction=example.instruction)
                    [alone] = policy.predict([one])
                    found["free"].append(ids[row][mask[row]].tolist())
                    found["forced"].append(forced[row][mask[row]].tolist())
                    found["alone"].append(alone.ids.tolist())
                    found["errors"].append(np.abs(alone.actions - example.action).astype(np.float64)[0].tolist())
    steps = feed.steps(0, 0)
    found["metrics"] = validate(stepper, processor, steps, NUM_VAL, trainer.val.sources, num_free=NUM_VAL)
    return found


@pytest.mark.process
def test_the_free_running_error_is_that_of_the_policy(tiny_llava: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llava, tmp_path, zero_stage=1)
    [found] = run_ranks(1, lambda rank: free_and_one_by_one(rank, config))
    assert len(found["free"]) == 9
    assert found["free"] == found["alone"]
    assert found["forced"] != found["alone"], "or the test shows nothing"
    errors = np.mean(found["errors"], axis=0)
    metrics = found["metrics"]
    assert metrics["action_outside_mass"] == pytest.approx(np.mean(found["outside"]), rel=1e-4)
    for number in range(DIM):
        assert metrics[f"action_mae_free/dim_{number}"] == pytest.approx(errors[number], rel=1e-5)
    assert metrics["action_mae_free/mean"] != pytest.approx(metrics["action_mae/mean"], rel=1e-3)
    ratio = metrics["action_mae_free/mean"] / metrics["action_mae_constant/mean"]
    assert metrics["action_mae_free_vs_constant"] == pytest.approx(ratio)


def test_the_best_constant_action_is_the_median_of_each_dimension() -> None:
    accumulator = StatisticsAccumulator(2)
    accumulator.add(np.array([[-1, -1], [1, 1]], np.float32), np.arange(2, dtype=np.uint64))
    constant = BestConstant(accumulator.finish()[0])
    for first, second in ((-1.0, 0.5), (-1.0, 0.5), (-1.0, 0.5), (1.0, 0.0), (1.0, 5.0)):
        constant.add(np.array([[first, second]], np.float32))
    # Medians -1 and 0.5: errors (0 + 0 + 0 + 2 + 2) / 5 and (0 + 0 + 0 + 0.5 + 4.5) / 5; 5.0 lies outside the statistics.
    assert constant.errors().tolist() == pytest.approx([0.8, 1.0])
    doubled = constant.from_vector([2 * value for value in constant.to_vector()])
    assert (doubled.number, doubled.errors().tolist()) == (10, pytest.approx([0.8, 1.0]))


def test_a_median_within_a_bins_width() -> None:
    values = np.random.default_rng(4).normal(0.2, 0.3, (4001, 1)).astype(np.float32)
    accumulator = StatisticsAccumulator(1)
    accumulator.add(values, np.arange(4001, dtype=np.uint64))
    constant = BestConstant(accumulator.finish()[0])
    for value in values:
        constant.add(value[None])
    expected = float(np.abs(values - np.median(values)).mean())
    assert constant.errors()[0] == pytest.approx(expected, abs=float(np.ptp(values)) / 512)


def test_perplexity_over_the_tokens_that_vary() -> None:
    varying = VaryingTokens(3)
    for last, nll in ((7, math.log(4)), (8, math.log(9))):  # the second token is always 5, the third is one of two
        varying.add(np.array([3, 5, last]), np.array([math.log(2), 0.0, nll]))
    assert varying.metrics("bins") == {
        "varying_tokens/bins": 1,
        "varying_perplexity/bins": pytest.approx(6),
    }
    assert VaryingTokens(3).metrics("vq") == {}
