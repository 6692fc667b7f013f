"""The auxiliary loss: how far a model's estimates are from the true positions that a simulator knows. In training only."""

from __future__ import annotations

import torch
from torch.nn import functional

_BETA = 0.02
"""Scaled difference below which the loss is quadratic."""


def auxiliary_of_rows(estimates: torch.Tensor, truths: torch.Tensor, scale: float) -> torch.Tensor:
    """float32[B]: smooth L1 of each row, mean over its A numbers; 0 for a row whose truth is not known (NaN).

    estimates, truths: float32[B, A], in the units of the data; scale: what they are multiplied by.
    """
    known = ~torch.isnan(truths)
    # Both sides are filled before the difference: a NaN that is masked afterwards would still reach the gradient.
    wanted = torch.where(known, truths, estimates.detach())
    losses = functional.smooth_l1_loss(scale * estimates, scale * wanted, beta=_BETA, reduction="none")
    return losses.mean(dim=1)
