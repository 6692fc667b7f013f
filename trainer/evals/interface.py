"""What an evaluation is, and what it is given.

    # my_evals.py, used as: trainer.evals: [{type: "my_evals:Norms", interval: 100, largest: 3}]
    class Norms(Eval):
        def __init__(self, options, config): self.largest = int(options["largest"])
        def begin(self, moment):
            engine = moment.stepper.engine      # every rank calls it, so collectives are allowed
            return Outcome(step=moment.step, figures={"norms": ...})

An evaluation that takes long starts a process of its own in `begin`, returns None, and returns its result from `finished`.
Figures are logged at the step of the outcome, however many steps the run is further.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker_proto.config import Config
from stoker_proto.processor import Processor
from trainer.engine.ranks import Ranks
from trainer.training.split import Split
from trainer.training.step import Stepper


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one evaluation found, of the weights after `step`."""

    step: int
    figures: Mapping[str, float]
    """By name; logged as `val/NAME`."""
    media: Mapping[str, Path] = field(default_factory=dict)
    """Pictures (.png) and videos (.mp4) by name, to be shown beside the figures."""
    line: str = ""
    """For the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The run after an optimizer step, the same on all ranks."""

    step: int
    is_last: bool
    """Whether no step follows: an evaluation must not be left out now."""
    output_dir: Path
    """Of the run; evaluations write below `evals/` in it."""
    stepper: Stepper
    processor: Processor
    ranks: Ranks
    val: Split | None
    is_stopping: Callable[[], bool]
    """Whether a signal asked the run to save and end: an evaluation that takes long then returns None. Every rank calls it, at
    the same place."""
    export: Callable[[Path], Path]
    """Writes the model of this moment to FOLDER/export, as the end of the run does, and returns it; every rank calls it."""


class Eval(ABC):
    """One entry of `trainer.evals`. Made on every rank before the ranks meet, so that wrong options end the run at once."""

    @abstractmethod
    def __init__(self, options: Mapping[str, Any], config: Config) -> None:
        """options: the entry without `type` and `interval`. Raises ConfigError."""

    @abstractmethod
    def begin(self, moment: Moment) -> Outcome | None:
        """Evaluate now, or start it and return None. Every rank calls it, at the same step."""

    def finished(self) -> list[Outcome]:
        """What was started earlier and is ready; asked after each step, on every rank. Returns at once."""
        return []

    def wait(self) -> list[Outcome]:
        """All that was started; waits for it, at most for the evaluation's own deadline. Called once, at the end of the run."""
        return []

    def close(self) -> None:  # noqa: B027 - most evaluations hold nothing
        """End what still runs."""
