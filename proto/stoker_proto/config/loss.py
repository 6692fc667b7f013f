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
    chunk_labels: int = field(default=1024, metadata=at_least(0))
    """A micro-batch with more labels than this never holds all of their logits: they are computed for so many labels at a time,
    and again for the gradient, which costs a third more in the head. A chunk takes about 12 bytes x labels x vocabulary (1.9 GB
    for 1024 and 152,000). Models whose logits are no plain product, `ordinal` with vq, and losses of your own that do not say
    `per_label = True` do without; the log says so. 0: never."""
    options: dict[str, Any] = field(default_factory=dict)
    """For a class of your own, which reads them from this section."""
