"""How many images the samples with actions have: what a policy must be given, too.

    one camera                           (1, 1)
    two cameras, image_history 3         (6, 6)
    one source with one, one with two    (1, 2)

A range, and not a setting: a dataset class may be anybody's, and only its samples say what it gives.
"""

from __future__ import annotations

import numpy as np

from trainer.engine.zero import Ranks
from trainer.feed.batch import StepBatch
from trainer.training.step import max_over_ranks

Range = tuple[int, int]
"""Fewest and most."""


def images_of_actions(batch: StepBatch, before: Range | None) -> Range | None:
    """`before`, widened to this rank's rows with an action; None where there was none yet."""
    for micro_batch in batch.micro_batches:
        actions = np.asarray(micro_batch.actions)  # [B, K, D]
        if not actions.size:
            continue
        counts = np.asarray(micro_batch.image_counts)[~np.isnan(actions).all(axis=(1, 2))]
        if counts.size:
            least, most = before or (int(counts[0]), int(counts[0]))
            before = min(least, int(counts.min())), max(most, int(counts.max()))
    return before


def range_over_ranks(found: Range | None, ranks: Ranks) -> Range | None:
    """The range of all ranks; every rank calls it."""
    least, most = found or (np.inf, -np.inf)
    lowest, highest = max_over_ranks([-least, most], ranks)
    return None if highest < 0 else (int(-lowest), int(highest))
