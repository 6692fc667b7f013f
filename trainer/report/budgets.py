"""What a run may leave out before it ends: bad samples, and steps that were not applied.

    data.bad_sample_budget       bad samples in all (`data.on_bad_sample: skip`)
    trainer.max_skipped_steps    steps in a row whose gradient norm was not finite

All ranks have the same numbers, so all end at the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError
from trainer.engine.ranks import Ranks
from trainer.training.bad_samples import Skipped, gathered
from trainer.training.step import StepResult

log = logging.getLogger(__name__)


class Budgets:
    """Counts both since this start of the run."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._skipped = Skipped()
        self._not_applied_in_a_row = 0

    def add_bad(self, reasons: Iterable[str]) -> None:
        """Bad samples of this rank, a reason for each, as in `MicroBatch.skipped`."""
        self._skipped.add(reasons)

    def check(self, step: int, result: StepResult, num_bad: int) -> None:
        """After a step; every rank calls it. num_bad: bad samples so far. Raises ConfigError, DataError."""
        trainer = self._config.trainer
        if result.was_not_applied:
            self._not_applied_in_a_row += 1
            log.warning("step %d is not applied: its gradient norm is not finite (loss %s)", step, result.loss)
            if self._not_applied_in_a_row > trainer.max_skipped_steps:
                raise ConfigError(
                    f"step {step}: {self._not_applied_in_a_row} steps in a row had a gradient norm that is not finite, more "
                    f"than trainer.max_skipped_steps = {trainer.max_skipped_steps}: lower trainer.lr ({trainer.lr}), lengthen "
                    "trainer.warmup_ratio, or look at the data"
                )
        elif result.applied:
            self._not_applied_in_a_row = 0
        budget = self._config.data.bad_sample_budget
        if num_bad > budget:
            self.say_skipped()
            raise DataError(
                f"step {step}: {num_bad} bad samples so far, more than data.bad_sample_budget = {budget}: correct the data "
                "(the lines above and the loaders' log name it), or raise the budget"
            )

    def say_skipped(self) -> dict[str, int]:
        """Log the bad samples of all ranks since this start; every rank calls it. Returns reason -> number of samples."""
        skipped = gathered(self._skipped, self._ranks)
        if skipped.num_samples and self._ranks.is_first:
            for line in (f"{skipped.num_samples} bad samples were skipped since this start:", *skipped.lines()):
                log.warning("%s", line)
        return skipped.named
