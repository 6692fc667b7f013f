"""The learning rate at literal steps, and which parameters decay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stoker_proto.config import ParameterGroupConfig, TrainerConfig
from stoker_proto.errors import ConfigError
from trainer.engine.optimizer import (
    EMA,
    AveragingAdamW,
    count_steps,
    learning_rate,
    make_optimizer,
    parameter_groups,
    shortfall,
)

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


def test_more_steps_than_the_epochs_have_are_said() -> None:
    config = replace(CONFIG, global_batch_size=8, epochs=2, max_steps=20)
    assert [count_steps(config, samples) for samples in (29, 80, 81)] == [8, 20, 20]
    assert shortfall(config, 80) == ""
    assert shortfall(replace(config, max_steps=None), 29) == ""
    assert shortfall(config, 29) == (
        "trainer.max_steps is 20, but trainer.epochs = 2 over 29 samples end after 8 steps; for more, set trainer.epochs to 5"
    )


def test_only_matrices_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
    decaying, others = parameter_groups(model, 0.1)
    assert [tuple(parameter.shape) for parameter in decaying["params"]] == [(3, 4), (5, 4)]
    assert [tuple(parameter.shape) for parameter in others["params"]] == [(5,), (5,), (5,)]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_a_group_has_its_own_peak_and_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
    own = (ParameterGroupConfig(match=("1.*",), lr=2.0, weight_decay=0.5), ParameterGroupConfig(match=("*",), lr=16.0))
    optimizer = make_optimizer(model, replace(CONFIG, weight_decay=0.1, parameter_groups=own))
    found = [(g["lr_scale"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in optimizer.param_groups]
    assert found == [(0.25, 0.5, [(5, 4)]), (0.25, 0.0, [(5,)]), (2.0, 0.1, [(3, 4)]), (2.0, 0.0, [(5,), (5,)])]
    again = ParameterGroupConfig(match=("1.weight",), lr=1.0)
    with pytest.raises(
        ConfigError, match=r"groups\[1\].match is \['1.weight'\]: an earlier group has all that it matches"
    ):
        make_optimizer(model, replace(CONFIG, parameter_groups=(own[0], again)))
    half = ParameterGroupConfig(match=("1.weight", "2.wieght"), lr=1.0)
    with pytest.raises(
        ConfigError, match=r"groups\[0\].*'2.wieght' matches no trained parameter; names begin with 0.w"
    ):
        make_optimizer(model, replace(CONFIG, parameter_groups=(half,)))


def test_the_fused_kernel_is_used_where_asked_for() -> None:
    model = torch.nn.Linear(2, 2)
    assert make_optimizer(model, CONFIG).defaults["fused"] is None
    assert make_optimizer(model, replace(CONFIG, optimizer="adamw_fused")).defaults["fused"] is True


def test_the_average_starts_at_the_first_weights_and_leaves_the_steps_alone() -> None:
    start = torch.tensor([1.0, -2.0])
    plain, averaged = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one = torch.optim.AdamW([plain], lr=0.5, weight_decay=0.0)
    other = AveragingAdamW([{"params": [averaged]}], ema_decay=0.9, lr=0.5, weight_decay=0.0)
    expected = start.clone()
    for number in range(3):
        for parameter, optimizer in ((plain, one), (averaged, other)):
            parameter.grad = torch.tensor([1.0, float(number)])
            optimizer.step()
        expected = 0.9 * expected + 0.1 * plain.detach()
    assert torch.equal(plain, averaged)
    torch.testing.assert_close(other.state[averaged][EMA], expected)
    assert not torch.equal(other.state[averaged][EMA], start)
