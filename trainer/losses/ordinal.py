"""`ordinal`: soft targets over neighbouring bins. A bin beside the right one is nearly right, which cross-entropy does not know.

The target of an action token is a Gaussian over the codes around it, `sigma_bins` wide, that sums to 1. Tokens that are no
actions (words, the end token) keep their cross-entropy. In a study on PushCube: success in 27 of 30 episodes, not 15 of 30.
"""

from __future__ import annotations

import torch

from stoker_proto.config import LossConfig
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from trainer.losses.interface import IGNORED


class Ordinal:
    """A `TokenLoss` for codecs whose codes are in order."""

    per_label = True

    def __init__(self, config: LossConfig, processor: Processor) -> None:
        """Raises ConfigError for actions whose codes have no order."""
        codec, vocabulary = processor.codec, processor.vocabulary
        if codec is None or vocabulary is None or codec.name != "bins":
            kind = "no action codec" if codec is None else f"data.action.codec: {codec.name}"
            raise ConfigError(
                f"trainer.loss.type is ordinal with {kind}: it needs codes that are in order; set data.action.codec to bins, or "
                "trainer.loss.type to cross_entropy"
            )
        self._first, self._end = vocabulary.first_id, vocabulary.end_id
        # Of ids, not of codes: both run through the bins in order, perhaps backwards, and a Gaussian is the same both ways.
        places = torch.arange(vocabulary.num_codes, dtype=torch.float64)
        gaussian = torch.exp(-0.5 * ((places[:, None] - places) / config.sigma_bins) ** 2)
        self._soft = (gaussian / gaussian.sum(dim=1, keepdim=True)).float()  # [codes, codes]

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-sum over all tokens of target(token) log p(token)."""
        if self._soft.device != logits.device:
            self._soft = self._soft.to(logits.device)
        log_p = logits.log_softmax(dim=-1)
        hard = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        is_action = (targets >= self._first) & (targets < self._end)
        soft_targets = self._soft[(targets - self._first).clamp(0, len(self._soft) - 1)]  # [B, P, codes]
        soft = -(soft_targets * log_p[..., self._first : self._end]).sum(dim=-1)
        return torch.where(is_action, soft, hard).masked_fill(targets == IGNORED, 0.0)
