"""What a micro-batch minimises: the loss of its labels (`trainer.losses`), and the auxiliary loss beside it."""

from __future__ import annotations

import torch

from stoker_proto.config import LossConfig
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from trainer.losses.auxiliary import auxiliary_of_rows
from trainer.losses.interface import IGNORED, TokenLoss
from trainer.losses.registry import make_loss
from trainer.training.inputs import Inputs


class Objective:
    """Logits, estimates and targets -> what to minimise."""

    def __init__(self, loss: TokenLoss, *, auxiliary_weight: float = 0.0, auxiliary_scale: float = 1.0) -> None:
        self._loss, self._weight, self._scale = loss, auxiliary_weight, auxiliary_scale

    @classmethod
    def of(cls, config: LossConfig, processor: Processor) -> Objective | None:
        """From `trainer.loss`; None where it is the plain NLL. Raises ConfigError."""
        loss = make_loss(config, processor)
        if config.type == "cross_entropy" and not config.auxiliary_weight:
            return None
        return cls(loss, auxiliary_weight=config.auxiliary_weight, auxiliary_scale=config.auxiliary_scale)

    @property
    def loss(self) -> TokenLoss:
        """Of each label."""
        return self._loss

    def __call__(self, logits: torch.Tensor, estimates: torch.Tensor | None, inputs: Inputs) -> torch.Tensor:
        """float32[B]: the sum of each row; the auxiliary loss counts once for each of its labels.

        Raises ConfigError where model or data have nothing for an auxiliary loss that is asked for.
        """
        return self.with_auxiliary(self._loss(logits, inputs.targets).sum(dim=1), estimates, inputs)

    def with_auxiliary(self, rows: torch.Tensor, estimates: torch.Tensor | None, inputs: Inputs) -> torch.Tensor:
        """The same from the sum of each row's labels: rows float32[B]."""
        if not self._weight:
            return rows
        if estimates is None:
            raise ConfigError(
                "trainer.loss.auxiliary_weight is set, but the model has no auxiliary head: set it to 0, or take a model whose "
                "output has `auxiliary` (trainer.models.tiny --family robot)"
            )
        if not inputs.auxiliary.shape[1]:
            if inputs.num_labels:
                raise ConfigError(
                    "trainer.loss.auxiliary_weight is set, but samples have nothing to estimate: set it to 0, or name the array "
                    "of true positions in data.options.auxiliary_keys"
                )
            return rows + 0.0 * estimates.sum()
        if estimates.shape != inputs.auxiliary.shape:
            raise ConfigError(
                f"the model estimates {estimates.shape[1]} numbers, and the data have {inputs.auxiliary.shape[1]}: build the "
                f"model with --auxiliary-width {inputs.auxiliary.shape[1]}"
            )
        num_labels = (inputs.targets != IGNORED).sum(dim=1)
        return rows + self._weight * num_labels * auxiliary_of_rows(estimates, inputs.auxiliary, self._scale)
