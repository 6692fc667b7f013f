"""The steps whose loss rose most above the steps before, with the loss of each of their rows: `stoker-batch --worst-loss` names
the samples.

The measure is loss minus running mean, so that the high losses at the beginning of a run are no spikes. All ranks have the same
losses, so all keep the same steps; each writes its own rows. The file holds at most `trainer.worst_steps` steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from stoker_proto.run_record import WorstStep, read_worst, write_worst

log = logging.getLogger(__name__)

WARM_UP = 8
"""Steps after a start that only make the mean."""
_SHARE = 0.1
"""Weight of the newest loss in the mean."""


class WorstSteps:
    """Keeps the worst steps of a run, across its resumes."""

    def __init__(self, folder: Path, rank: int, record: str, *, keep: int, done: int) -> None:
        """keep: steps at most; 0: none. done: steps trained so far; what an earlier start trained after them is trained again."""
        self._folder, self._rank, self._record, self._keep = folder, rank, record, keep
        self._steps = [step for step in read_worst(folder, rank) if step.step <= done] if keep else []
        self._mean, self._seen = 0.0, 0

    def add(self, step: int, loss: float, rows: Sequence[Sequence[float]]) -> None:
        """Keep the step if it is one of the worst. rows: mean NLL per label of each row of each micro-batch of this rank."""
        excess = loss - self._mean if math.isfinite(loss) else math.inf
        if math.isfinite(loss):
            self._mean += excess * (_SHARE if self._seen else 1.0)
        self._seen += 1
        if not self._keep or self._seen <= WARM_UP or excess <= 0:
            return
        worst = WorstStep(
            step=step,
            record=self._record,
            loss=_finite(loss),
            excess=_finite(excess),
            rows=tuple(tuple(_finite(row) for row in batch) for batch in rows),
        )
        steps = sorted([*self._steps, worst], key=lambda one: one.rank_key)[: self._keep]
        if worst in steps:
            self._steps = steps
            try:
                write_worst(self._folder, self._rank, steps)
            except OSError as error:  # a full disk must not end a run
                log.warning("step %d: the worst steps cannot be written: %s", step, error)


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
