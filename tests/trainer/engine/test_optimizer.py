"""The learning rate at literal steps, and which parameters decay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stoker_proto.config import TrainerConfig
from trainer.engine.optimizer import learning_rate, parameter_groups

CONFIG = TrainerConfig(micro_batch_size=1, global_batch_size=1, lr=8.0, warmup_ratio=0.4, min_lr_ratio=0.25)


def test_cosine_rises_to_the_peak_and_ends_at_its_floor() -> None:
    rates = [learning_rate(CONFIG, step, 10) for step in range(10)]
    assert rates[:4] == [2.0, 4.0, 6.0, 8.0]
    assert rates[6] == pytest.approx(2.0 + 6.0 / 2)  # half way down
    assert rates[9] == pytest.approx(2.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_constant_stays_at_the_peak() -> None:
    config = replace(CONFIG, lr_schedule="constant")
    assert [learning_rate(config, step, 10) for step in range(10)] == [2.0, 4.0, 6.0, 8.0] + [8.0] * 6


def test_without_warm_up_the_first_step_is_already_on_the_way_down() -> None:
    config = replace(CONFIG, warmup_ratio=0.0, min_lr_ratio=0.0)
    assert [learning_rate(config, step, 2) for step in range(2)] == pytest.approx([4.0, 0.0])


def test_only_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
    decaying, others = parameter_groups(model, 0.1)
    assert [tuple(parameter.shape) for parameter in decaying["params"]] == [(3, 4), (5, 4)]
    assert [tuple(parameter.shape) for parameter in others["params"]] == [(5,), (5,), (5,)]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
