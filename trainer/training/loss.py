"""The loss of a micro-batch: negative log-likelihood (NLL) of the labels, per token and per row.

Letters of shapes: B rows, P positions with a label in some row, V vocabulary. Another loss is another function beside these.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional

from trainer.feed.batch import IGNORED


def nll_of_tokens(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32[B, P]: -log p(target); 0 where the target is ignored.

    logits: float32[B, P, V]; targets: int64[B, P], IGNORED where a row has no label.
    """
    flat = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view_as(targets)


def nll_of_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32[B]: sum of `nll_of_tokens` over each row."""
    return nll_of_tokens(logits, targets).sum(dim=1)


def row_sums(logits: torch.Tensor, targets: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    """float64[B, 3]: each row's NLL, number of targets with the largest logit, and number of targets. nll: float32[B]."""
    labelled = targets != IGNORED
    correct = (logits.argmax(dim=-1) == targets) & labelled
    return torch.stack([nll.double(), correct.sum(dim=1).double(), labelled.sum(dim=1).double()], dim=1)


def perplexity(mean_nll: float) -> float:
    """e**mean_nll; infinite where a float cannot hold it."""
    return math.exp(mean_nll) if mean_nll < 700 else math.inf
