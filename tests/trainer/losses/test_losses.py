"""Losses by hand: soft targets, the auxiliary loss, the registry, and what a step minimises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.config import LossConfig
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config, make_processor
from trainer.losses.auxiliary import auxiliary_of_rows
from trainer.losses.interface import IGNORED
from trainer.losses.ordinal import Ordinal
from trainer.losses.registry import make_loss
from trainer.training.inputs import Inputs
from trainer.training.objective import Objective


class Vocabulary:
    first_id, end_id, num_codes = 4, 8, 4


class Codec:
    name = "bins"


class Robot:
    """The part of a processor that losses use: ids 4 to 7 are actions."""

    codec, vocabulary = Codec(), Vocabulary()


ROBOT: Any = Robot()


class Counting:
    """A user's loss."""

    def __init__(self, config: LossConfig, processor: Processor) -> None:
        self.value = float(config.options["value"])

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.where(targets == IGNORED, 0.0, self.value)


def test_ordinal_by_hand() -> None:
    loss = make_loss(LossConfig(type="ordinal", sigma_bins=1.0), ROBOT)
    logits = torch.log(torch.tensor([0.05, 0.05, 0.05, 0.05, 0.1, 0.2, 0.4, 0.1]))[None, None].expand(1, 3, 8)
    found = loss(logits, torch.tensor([[5, 2, IGNORED]]))
    near, far = math.exp(-0.5), math.exp(-2.0)
    total = near + 1 + near + far
    expected = -(near * math.log(0.1) + math.log(0.2) + near * math.log(0.4) + far * math.log(0.1)) / total
    assert found.tolist() == [[pytest.approx(expected), pytest.approx(-math.log(0.05)), 0.0]]
    narrow = Ordinal(LossConfig(sigma_bins=0.01), ROBOT)(logits, torch.tensor([[5, 2, IGNORED]]))
    assert narrow.tolist() == [[pytest.approx(-math.log(0.2)), pytest.approx(-math.log(0.05)), 0.0]]


def test_ordinal_needs_codes_in_order(tiny_llava: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_llava, tmp_path))
    assert processor.codec is not None
    if processor.codec.name == "bins":
        make_loss(LossConfig(type="ordinal"), processor)
    with pytest.raises(ConfigError, match=r"trainer\.loss\.type is ordinal with data\.action\.codec: vq.*bins"):
        Ordinal(LossConfig(), type("Other", (), {"codec": type("C", (), {"name": "vq"}), "vocabulary": 1})())  # type: ignore[arg-type]


def test_auxiliary_by_hand() -> None:
    estimates = torch.tensor([[0.5, 1.0], [7.0, 7.0]], requires_grad=True)
    truths = torch.tensor([[0.5, 0.9], [math.nan, math.nan]])
    rows = auxiliary_of_rows(estimates, truths, scale=2.0)
    assert rows.tolist() == [pytest.approx((0.2 - 0.01) / 2, abs=1e-6), 0.0]  # |d| - beta / 2, mean over two
    rows.sum().backward()
    assert estimates.grad is not None
    assert estimates.grad.tolist() == [[0.0, pytest.approx(1.0)], [0.0, 0.0]]


def inputs_of(targets: list[list[int]], auxiliary: Any) -> Inputs:
    found = torch.tensor(targets)
    return Inputs(
        arguments={}, grid=None, positions=torch.arange(found.shape[1]), targets=found, num_rows=len(targets),
        labels=(found != -100).flatten().nonzero()[:, 0], num_labels=int((found != -100).sum()),
        auxiliary=torch.tensor(np.asarray(auxiliary, np.float32)),
    )  # fmt: skip


def test_a_users_loss_and_the_auxiliary_one_add_up_per_label() -> None:
    path = f"{Counting.__module__}:Counting"
    config = LossConfig(type=path, options={"value": 3}, auxiliary_weight=2.0, auxiliary_scale=1.0)
    objective = Objective.of(config, ROBOT)
    assert objective is not None
    inputs = inputs_of([[1, 2, IGNORED], [IGNORED] * 3], [[1.0], [math.nan]])
    rows = objective(torch.zeros(2, 3, 8), torch.tensor([[2.0], [9.0]]), inputs)
    assert rows.tolist() == [pytest.approx(2 * 3 + 2.0 * 2 * (1 - 0.01)), 0.0]
    assert Objective.of(LossConfig(), ROBOT) is None  # the NLL itself is minimised


@pytest.mark.parametrize(("estimates", "auxiliary", "message"), [
    (None, [[1.0]], "the model has no auxiliary head"),
    (torch.zeros(1, 1), np.zeros((1, 0)), r"samples have nothing to estimate.*auxiliary_keys"),
    (torch.zeros(1, 1), np.zeros((1, 2)), "estimates 1 numbers, and the data have 2.*--auxiliary-width 2"),
])  # fmt: skip
def test_an_auxiliary_loss_that_cannot_be_is_an_error(estimates: Any, auxiliary: Any, message: str) -> None:
    objective = Objective.of(LossConfig(auxiliary_weight=1.0), ROBOT)
    assert objective is not None
    with pytest.raises(ConfigError, match=message):
        objective(torch.zeros(1, 2, 8), estimates, inputs_of([[1, 2]], auxiliary))


@pytest.mark.parametrize(("config", "message"), [
    (LossConfig(type="focal"), r"known are cross_entropy, ordinal; a class of your own is package\.module:Class"),
    (LossConfig(type="absent.module:Loss"), r"cannot be made \(ModuleNotFoundError"),
    (LossConfig(type=f"{__name__}:Counting"), r"cannot be made \(KeyError: 'value'"),
    (LossConfig(type="ordinal", options={"a": 1}), r"trainer\.loss\.options are for a class of your own"),
])  # fmt: skip
def test_a_wrong_loss_is_named(config: LossConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_loss(config, ROBOT)
