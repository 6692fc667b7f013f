"""One pass over the validation split: every sample once, on all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch

from stoker_proto.errors import DataError
from stoker_proto.processor import Processor
from trainer.engine.ranks import Ranks, sum_over_ranks
from trainer.evals.scores import Sums, add_scores
from trainer.feed.batch import StepBatch
from trainer.training.loss import nll_of_rows, row_sums
from trainer.training.source_table import SourceTable
from trainer.training.step import Stepper

log = logging.getLogger(__name__)


def validate(
    stepper: Stepper,
    steps: Iterator[StepBatch],
    processor: Processor,
    ranks: Ranks,
    num_samples: int,
    sources: SourceTable,
) -> dict[str, float]:
    """The metrics of `Sums`, the same on every rank; with several sources also each source's perplexity and accuracy.

    Raises DataError if not every sample was seen exactly once.
    """
    dim = processor.codec.dim if processor.codec is not None else 0
    sums, by_source = Sums(dim), torch.zeros(len(sources), 3, dtype=torch.float64, device=ranks.device)
    stepper.engine.eval()
    try:
        with torch.no_grad():
            for step in steps:
                for batch in step.micro_batches:
                    inputs = stepper.make_inputs(batch)
                    logits = stepper.logits(inputs)
                    add_scores(sums, logits, inputs.targets, np.asarray(batch.actions), processor)
                    sums.samples += batch.num_rows
                    rows = row_sums(logits, inputs.targets, nll_of_rows(logits, inputs.targets))
                    numbers = torch.as_tensor(sources.of_rows(batch.keys[:, 0]), device=ranks.device)
                    by_source.index_add_(0, numbers, rows)
    finally:
        stepper.engine.train()
    found = sum_over_ranks([*by_source.flatten().tolist(), *sums.to_vector()], ranks)
    total = Sums.from_vector(dim, found[by_source.numel() :])
    if total.samples != num_samples:
        raise DataError(
            f"validation saw {total.samples:.0f} samples where the split has {num_samples}: report this with your config"
        )
    return total.metrics() | sources.perplexities(found[: by_source.numel()])
