"""Losses by hand: soft targets, the auxiliary loss, the registry, and what a step minimises."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.actions import ActionCodec, ActionStatistics, ActionVocabulary, StatisticsAccumulator, fit_codec
from stoker_proto.actions.bins import UniformBins
from stoker_proto.actions.codebook import Codebook
from stoker_proto.actions.lattice import ResidualLattice
from stoker_proto.actions.space import ActionSpace
from stoker_proto.actions.vq import VectorQuantizer
from stoker_proto.config import LossConfig
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from trainer.losses.auxiliary import auxiliary_of_rows
from trainer.losses.interface import IGNORED
from trainer.losses.ordinal import Ordinal
from trainer.losses.registry import make_loss
from trainer.training.inputs import Inputs
from trainer.training.objective import Objective


def robot(codec: ActionCodec) -> Any:
    """The part of a processor that losses use: ids 4 to 7 are actions, the last id is code 0, as in OpenVLA."""
    return SimpleNamespace(codec=codec, vocabulary=ActionVocabulary.reuse_last(vocab_size=8, num_codes=4))


def statistics_of(actions: np.ndarray[Any, Any]) -> ActionStatistics:
    accumulator = StatisticsAccumulator(actions.shape[1])
    accumulator.add(actions, np.arange(len(actions), dtype=np.uint64))
    return accumulator.finish()[0]


STATISTICS = statistics_of(np.linspace(-1, 1, 101)[:, None])
ROBOT = robot(UniformBins(STATISTICS, chunk=1, num_bins=4))


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


def two_groups() -> VectorQuantizer:
    """Codewords at 0, 1 and 3 with an open gripper, at 1 with a closed one; one residual level of 4 codes."""
    codebook = Codebook(np.array([[0], [1], [3], [1]], np.float32), np.array([0, 0, 0, 1]), 2)
    space = ActionSpace(
        centre=np.zeros(2, np.float32),
        scale=np.ones(2, np.float32),
        lower=np.full(2, -4, np.float32),
        upper=np.full(2, 4, np.float32),
        values=(np.zeros(0, np.float32), np.array([-1, 1], np.float32)),
    )
    ends = np.array([0.0, 1.0])
    lattice = ResidualLattice(knots=(ends,), heights=(ends,), radices=np.array([[4]]))
    statistics = statistics_of(np.random.default_rng(0).uniform(-1, 1, (64, 2)))
    return VectorQuantizer(statistics, chunk=1, space=space, codebook=codebook, lattice=lattice)


def test_ordinal_of_vq_by_hand() -> None:
    """The neighbours of a codeword are those of its own gripper; tokens of the residual level are not softened."""
    loss = Ordinal(LossConfig(sigma_bins=1.0), robot(two_groups()))
    # Ids 7, 6, 5, 4 are the codes 0, 1, 2, 3. The median distance to the nearest codeword of the group is 1: a bin.
    logits = torch.log(torch.tensor([0.05, 0.05, 0.05, 0.05, 0.4, 0.1, 0.2, 0.1]))[None, None].expand(1, 7, 8)
    targets = torch.tensor([[IGNORED, 6, 6, 4, 5, 2, IGNORED]])
    found = loss(logits, targets)
    near, far = math.exp(-0.5), math.exp(-0.5 * 4)  # code 1 is 1 away from code 0 and 2 away from code 2
    soft = -(near * math.log(0.1) + math.log(0.2) + far * math.log(0.1)) / (near + 1 + far)
    expected = [0.0, soft, -math.log(0.2), -math.log(0.4), -math.log(0.1), -math.log(0.05), 0.0]
    assert found[0].tolist() == [pytest.approx(value) for value in expected]
    assert loss(logits[:, 2:], targets[:, 2:])[0, 0] == pytest.approx(soft), (
        "cut there, a residual looks like a codeword"
    )
    assert not loss.per_label, "so it must not be computed for some labels at a time"
    assert Ordinal(LossConfig(), ROBOT).per_label


def test_ordinal_needs_codes_that_have_neighbours() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (32, 8, 2))
    codec = fit_codec("fast", actions.astype(np.float32), statistics_of(actions.reshape(-1, 2)), chunk=8)
    with pytest.raises(ConfigError, match=r"trainer\.loss\.type is ordinal with data\.action\.codec: fast.*bins or vq"):
        Ordinal(LossConfig(), robot(codec))


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
