"""`trainer.loss`: what training minimises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stoker_proto.config.rules import above, at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """What training minimises. Reported losses and perplexities stay those of the labels, so that runs compare."""

    type: str = "cross_entropy"
    """`cross_entropy`; `ordinal`: soft targets over neighbouring codes, for `data.action.codec` bins and vq; or
    `package.module:Class` (see `trainer/losses/interface.py`)."""
    sigma_bins: float = field(default=3.0, metadata=above(0))
    """With `ordinal`: standard deviation of the targets, in bins; with vq a bin is the median distance between codewords."""
    auxiliary_weight: float = field(default=0.0, metadata=at_least(0))
    """Weight of the auxiliary loss beside that of a token: for a model that estimates positions (`trainer.models.tiny --family
    robot`) and data that have them (`data.options.auxiliary_keys`). 0: none."""
    auxiliary_scale: float = field(default=8.0, metadata=above(0))
    """The data's numbers are multiplied by it: 8 for positions in metres that lie within a table's reach."""
    options: dict[str, Any] = field(default_factory=dict)
    """For a class of your own, which reads them from this section."""
