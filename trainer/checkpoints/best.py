"""The best validation so far (`trainer.checkpoint.best`), whether to stop early, and which step's weights are exported.

A part of stoker.json, so that a resume continues to count:

    "best": {"metric": "val/perplexity", "value": 3.41, "step": 500, "waited": 2}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from stoker_proto.config import BestConfig
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best validation."""

    metric: str
    value: float
    step: int
    """Optimizer steps done then."""
    waited: int = 0
    """Validations since then."""

    def to_json(self) -> dict[str, Any]:
        """For stoker.json."""
        return asdict(self)


def read_best(state: Mapping[str, Any], config: BestConfig | None) -> Best | None:
    """What a checkpoint says; None where it says nothing, or the config names another metric now."""
    found = state.get("best")
    return Best(**found) if found and config is not None and found["metric"] == config.metric else None


def update(best: Best | None, config: BestConfig, figures: Mapping[str, float], step: int) -> Best:
    """The best after a validation at `step`; it was that one if `step` is its step. Raises ConfigError for an unknown metric."""
    if config.metric not in figures:
        raise ConfigError(
            f"trainer.checkpoint.best.metric is {config.metric!r}, which validation does not measure here: it measures "
            f"{', '.join(sorted(figures))}; an evaluation that runs beside the training, such as success, is too late"
        )
    value = figures[config.metric]
    larger = config.larger_is_better
    is_better = best is None or (value > best.value if larger else value < best.value)
    if math.isfinite(value) and is_better:
        return Best(metric=config.metric, value=value, step=step)
    if best is None:  # not a number: anything later is better
        return Best(metric=config.metric, value=-math.inf if larger else math.inf, step=-1, waited=1)
    return Best(metric=best.metric, value=best.value, step=best.step, waited=best.waited + 1)


def is_hopeless(best: Best | None, config: BestConfig | None) -> bool:
    """Whether training ends early."""
    return best is not None and config is not None and config.patience is not None and best.waited >= config.patience


def step_to_export(best: Best | None, config: BestConfig | None, last: int) -> int:
    """The step whose weights a run exports that ends after step `last`."""
    if best is None or config is None or not config.export or best.step < 0:
        return last
    return best.step


def reason_of_step(best: Best | None, config: BestConfig | None, last: int) -> str:
    """A sentence about the weights of `step_to_export`, for the log and the model card; "" where there was no choice."""
    if best is None or config is None:
        return ""
    if best.step < 0:
        return f"These are the weights after the last step, {last}: no validation measured a number as {best.metric}."
    figure = f"the best {best.metric} of all validations, {best.value:.6g}"
    step = step_to_export(best, config, last)
    if step != best.step:
        return (
            f"These are the weights after the last step, {last}; {figure}, was that after step {best.step} "
            "(trainer.checkpoint.best.export is false)."
        )
    where = f"the last step, {last}" if step == last else f"step {step} of {last}"
    return f"These are the weights after {where}, which had {figure}."
