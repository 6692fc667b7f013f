"""`cross_entropy`: the negative log-likelihood of each label."""

from __future__ import annotations

import torch
from torch.nn import functional

from stoker_proto.config import LossConfig
from stoker_proto.processor import Processor
from trainer.losses.interface import IGNORED


class CrossEntropy:
    """A `TokenLoss`."""

    per_label = True

    def __init__(self, config: LossConfig, processor: Processor) -> None:
        """It has no settings."""

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-log p(target)."""
        flat = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.view_as(targets)
