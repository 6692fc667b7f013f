"""What a loss is: a class that is made from the config's section and the processor, and called with logits and targets."""

from __future__ import annotations

from typing import Protocol

import torch

IGNORED = -100
"""Target of a position that is not trained."""


class TokenLoss(Protocol):
    """The loss of each label. Its constructor takes (LossConfig, Processor) and raises ConfigError where they do not fit.

    A class whose loss of a label depends on that label's logits alone sets `per_label = True`: it may then be called with some
    labels at a time, as [1, n, V] (`trainer.loss.chunk_labels`).
    """

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """float32[B, P]: the loss of each label, 0 where the target is IGNORED.

        logits: float32[B, P, V]; targets: int64[B, P]. The step sums all labels of the global batch and divides by their number.
        """
        ...
