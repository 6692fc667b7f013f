"""Validation metrics by hand: literal logits over a vocabulary whose last ids are action bins."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stoker_proto.config import ActionConfig
from tests.trainer.support.memory import make_config, make_processor
from trainer.evals.scores import Sums, add_scores
from trainer.training.loss import perplexity


def test_perplexities_accuracy_violations_and_action_error(tiny_causal: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_causal, tmp_path))
    assert processor.codec is not None
    assert processor.vocabulary is not None
    truth = np.array([[0.5, -0.5, 0.0]], np.float32)  # [K=1, D=3]
    ids = processor.vocabulary.to_ids(processor.codec.encode(truth[None])[0])
    size = processor.vocab_size_needed
    targets = torch.tensor([[*ids.tolist(), processor.end_id]])
    logits = torch.full((1, 4, size), -1e9)
    word = 5
    # Position 0: a word is likeliest (a violation), the true action next. 1: certain. 2: a wrong action. 3: the end, certain.
    wrong = processor.vocabulary.to_ids(processor.codec.encode(np.array([[[0.5, -0.5, 0.9]]], np.float32))[0])[2]
    logits[0, 0, word], logits[0, 0, ids[0]] = math.log(3), 0.0
    logits[0, 1, ids[1]] = 0.0
    logits[0, 2, wrong], logits[0, 2, ids[2]] = 0.0, 0.0
    logits[0, 2, wrong] += math.log(7)
    logits[0, 3, processor.end_id] = 0.0
    sums = Sums(3)
    add_scores(sums, logits, targets, truth[None], processor)
    metrics = sums.metrics()
    assert metrics["perplexity"] == pytest.approx((4 * 1 * 8 * 1) ** (1 / 4), rel=1e-6)
    assert metrics["action_perplexity"] == pytest.approx((4 * 1 * 8) ** (1 / 3), rel=1e-6)
    assert metrics["accuracy"] == 0.5
    assert metrics["action_violations"] == 1
    decoded = processor.actions_from_ids(np.array([ids[0], ids[1], wrong]))
    for dim, error in enumerate(np.abs(decoded - truth)[0]):
        assert metrics[f"action_mae/dim_{dim}"] == pytest.approx(error, abs=1e-7)
    assert metrics["action_mae/dim_2"] > 0.8


def test_words_of_a_chat_are_no_actions_though_the_codec_uses_the_same_ids(tiny_causal: Path, tmp_path: Path) -> None:
    """A micro-batch of a robot's row and a chat's, whose words are among the ids that the actions took over."""
    config = make_config(tiny_causal, tmp_path, data={"action": ActionConfig(codec="bins", vocabulary="reuse_last")})
    processor = make_processor(config)
    assert processor.codec is not None
    assert processor.vocabulary is not None
    truth = np.array([[0.5, -0.5, 0.0]], np.float32)  # [K=1, D=3]
    ids = processor.vocabulary.to_ids(processor.codec.encode(truth[None])[0])
    targets = torch.tensor([ids.tolist(), ids[::-1].tolist()])
    logits = torch.zeros((2, 3, processor.vocab_size_needed))
    logits[..., 5] = 1.0
    logits[0, range(3), ids] = 2.0
    sums, robot = Sums(3), Sums(3)
    actions = np.concatenate([truth[None], np.full_like(truth[None], np.nan)])
    add_scores(sums, logits, targets, actions, processor)
    add_scores(robot, logits[:1], targets[:1], truth[None], processor)
    figures = {name: value for name, value in sums.metrics().items() if name.startswith("action")}
    assert figures == {name: value for name, value in robot.metrics().items() if name.startswith("action")}
    assert figures["action_violations"] == 0
    assert (sums.chunks, sums.tokens) == (1, 6)


def test_sums_add_up_as_vectors() -> None:
    first = Sums(2, samples=1, tokens=2, nll=3, correct=1, timesteps=1, error=np.array([0.5, 1.5]))
    added = [2 * value for value in first.to_vector()]
    total = Sums.from_vector(2, added)
    assert total.to_vector() == added
    assert total.metrics() == {
        "samples": 2,
        "perplexity": pytest.approx(math.exp(1.5)),
        "accuracy": 0.5,
        "action_mae/dim_0": 0.5,
        "action_mae/dim_1": 1.5,
        "action_mae/mean": 1.0,
    }


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    assert perplexity(1e6) == math.inf
