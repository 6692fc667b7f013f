"""The loss's parts by hand, on small literal numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.training.inputs import next_token_targets
from trainer.training.loss import nll_of_rows, row_sums

LN = math.log


def test_positions_are_one_before_the_labels_and_shared_by_the_rows() -> None:
    labels = np.array([[-100, -100, 7, 8, -100], [-100, 5, -100, -100, -100]])
    positions, targets = next_token_targets(labels)
    assert positions.tolist() == [0, 1, 2]
    assert targets.tolist() == [[-100, 7, 8], [5, -100, -100]]


def test_a_micro_batch_without_labels_keeps_one_position() -> None:
    positions, targets = next_token_targets(np.full((2, 4), -100))
    assert positions.tolist() == [0]
    assert targets.tolist() == [[-100], [-100]]


def test_loss_accuracy_and_perplexity_equal_a_computation_by_hand() -> None:
    # softmax of [ln 2, ln 1, ln 1] is [1/2, 1/4, 1/4], of [ln 1, ln 6, ln 1] it is [1/8, 3/4, 1/8]
    first, second = [LN(2), 0.0, 0.0], [0.0, LN(6), 0.0]
    logits = torch.tensor([[first, second], [second, first]])
    targets = torch.tensor([[0, 1], [2, -100]])
    rows = nll_of_rows(logits, targets)
    assert rows.tolist() == pytest.approx([LN(2) + LN(4 / 3), LN(8)])
    assert math.exp(rows.sum().item() / 3) == pytest.approx((2 * 4 / 3 * 8) ** (1 / 3))
    assert row_sums(logits, targets, rows)[:, 1:].tolist() == [[2, 2], [0, 1]]  # right, and labels


def test_nothing_to_predict_gives_zero_and_a_gradient_of_zeros() -> None:
    logits = torch.randn(2, 1, 5, requires_grad=True)
    nll = nll_of_rows(logits, torch.full((2, 1), -100)).sum()
    torch.autograd.backward(nll)
    assert nll.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(2, 1, 5))
