"""The evaluation `perplexity`: one pass over the validation split, or over its first part, on all ranks together.

    trainer.evals: [{type: perplexity, interval: 100, samples: 512, free_running: 128, examples: 8}]

Without such an entry `trainer.eval_interval` and `trainer.eval_samples` are its interval and samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.processor import Processor
from trainer.engine.ranks import sum_over_ranks
from trainer.evals.action_figures import ActionFigures
from trainer.evals.example_sheet import ExampleSheet
from trainer.evals.interface import Eval, Moment, Outcome
from trainer.evals.registry import check_empty
from trainer.evals.scores import Sums, add_rows, add_scores
from trainer.feed.batch import StepBatch
from trainer.training.bad_samples import Skipped, gathered
from trainer.training.loss import nll_of_rows, row_sums
from trainer.training.source_table import SourceTable
from trainer.training.step import Stepper

log = logging.getLogger(__name__)

FREE_RUNNING = 256
"""Samples of a validation whose free-running error is measured."""
EXAMPLES = 4
"""Samples of a validation that are drawn, with their true and their predicted action."""


class Perplexity(Eval):
    """Perplexity, accuracy, and errors of actions, over the validation split."""

    def __init__(self, options: Mapping[str, Any], config: Config) -> None:
        """options: `samples`, default `trainer.eval_samples`; `free_running`: samples whose free-running error is measured (each
        costs a few forward passes more), default 256, 0 for none; `examples`: samples with an action that are drawn, default 4.
        Raises ConfigError."""
        rest = dict(options)
        examples = rest.pop("examples", EXAMPLES)
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < 0:
            raise ConfigError(
                f"trainer.evals, type perplexity: examples is {examples!r}: a number of samples, 0 for none"
            )
        self._num_examples = examples
        samples, free = rest.pop("samples", config.trainer.eval_samples), rest.pop("free_running", FREE_RUNNING)
        check_empty(rest, "perplexity")
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise ConfigError(f"trainer.evals, type perplexity: samples is {samples!r}: at least 1, or null for all")
        if isinstance(free, bool) or not isinstance(free, int) or free < 0:
            raise ConfigError(
                f"trainer.evals, type perplexity: free_running is {free!r}: a number of samples, 0 for none"
            )
        self._num_free = free
        if not config.data.paths("val"):
            raise ConfigError("trainer.evals, type perplexity: there are no validation data; set data.val_data_paths")
        size = config.trainer.global_batch_size
        self._size, self._num_steps = size, None if samples is None else -(-samples // size)
        self._budget, self._has_said_bad = config.data.bad_sample_budget, False

    def begin(self, moment: Moment) -> Outcome | None:
        """None if the run is told to end meanwhile. Raises DataError if not every sample was seen exactly once, or too many are
        bad."""
        assert moment.val is not None, "checked when it was made"
        num_samples = moment.val.num_samples
        if self._num_steps is not None:
            num_samples = min(num_samples, self._num_steps * self._size)
        sheet = ExampleSheet(moment.processor, self._num_examples if moment.ranks.is_first else 0)
        skipped = Skipped()
        try:
            with closing(cast("Any", moment.val.feed.steps(0, 0))) as steps:
                figures = validate(
                    moment.stepper,
                    moment.processor,
                    _until_stopped(islice(steps, self._num_steps), moment.is_stopping),
                    num_samples,
                    moment.val.sources,
                    self._num_free,
                    sheet,
                    skipped,
                )
        except _StoppedError:
            log.info("step %d: the validation is left out, as the run is to end", moment.step)
            return None
        bad = int(figures.get("bad_samples", 0))
        if bad:
            self._say_bad(bad, num_samples, skipped, moment)
        shown = (
            "perplexity",
            "action_perplexity",
            "accuracy",
            "action_mae/mean",
            "action_mae_free/mean",
            "action_mae_constant/mean",
        )
        line = ", ".join(f"{name} {figures[name]:.4f}" for name in shown if name in figures)
        return Outcome(
            step=moment.step,
            figures=figures,
            media=_draw(sheet, moment.output_dir / "evals" / "examples" / f"step-{moment.step:08d}.png"),
            line=f"validation over {figures['samples'] - bad:.0f} samples{f' ({bad} bad ones left out)' * bool(bad)}: {line}",
        )

    def _say_bad(self, number: int, num_samples: int, skipped: Skipped, moment: Moment) -> None:
        """Name the bad samples once; every rank calls it. Raises DataError for too many."""
        found = gathered(skipped, moment.ranks)
        if moment.ranks.is_first and not self._has_said_bad:
            log.warning("%d bad samples are left out of the validation:", number)
            for line in found.lines():
                log.warning("%s", line)
        self._has_said_bad = True
        if number > self._budget or number == num_samples:
            raise DataError(
                f"step {moment.step}: {number} of the {num_samples} samples of the validation are bad; at most "
                f"data.bad_sample_budget = {self._budget} may be, and never all: correct the data (the log names it)"
            )


class _StoppedError(Exception):
    """The run is to end, and what it has trained must be saved first: a validation may take longer than the grace time."""


def _until_stopped(steps: Iterator[StepBatch], is_stopping: Callable[[], bool]) -> Iterator[StepBatch]:
    """Raises _StoppedError in front of the first step at which the run is to end."""
    for step in steps:
        if is_stopping():
            raise _StoppedError
        yield step


def _draw(sheet: ExampleSheet, picture: Path) -> dict[str, Path]:
    """The media of the outcome. A picture that a full disk does not hold must not end a run."""
    try:
        return {"examples": picture} if sheet.write(picture) else {}
    except OSError as error:
        log.warning("%s cannot be written: %s", picture, error)
        return {}


def validate(
    stepper: Stepper,
    processor: Processor,
    steps: Iterator[StepBatch],
    num_samples: int,
    sources: SourceTable,
    num_free: int = 0,
    sheet: ExampleSheet | None = None,
    skipped: Skipped | None = None,
) -> dict[str, float]:
    """The metrics of `Sums`, and of `ActionFigures` where there are actions, the same on every rank; with several sources also
    each source's perplexity and accuracy.

    num_free: samples, rounded up to whole global batches, whose free-running error is measured. sheet: gets the first samples.
    skipped: gets this rank's bad samples.

    Raises DataError if not every sample was seen exactly once.
    """
    ranks = stepper.ranks
    dim = processor.codec.dim if processor.codec is not None else 0
    sums, by_source = Sums(dim), torch.zeros(len(sources), 3, dtype=torch.float64, device=ranks.device)
    figures = None if processor.codec is None else ActionFigures(processor)
    stepper.engine.eval()
    try:
        with torch.no_grad():
            for step in steps:
                free = step.first_sample < num_free
                for batch in step.micro_batches:
                    inputs = stepper.make_inputs(batch)
                    if figures is None:  # what fits in training fits here: the loss may be computed in chunks
                        rows = stepper.losses(inputs)[1]
                        add_rows(sums, rows)
                    else:
                        logits, actions = stepper.logits(inputs), np.asarray(batch.actions)
                        add_scores(sums, logits, inputs.targets, actions, processor)
                        figures.add(stepper, inputs, logits, actions, free=free)
                        if sheet is not None:
                            sheet.add(batch, inputs, logits)
                        rows = row_sums(logits, inputs.targets, nll_of_rows(logits, inputs.targets))
                    sums.samples += batch.num_rows
                    sums.bad += len(batch.skipped)
                    if skipped is not None:
                        skipped.add(batch.skipped)
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
    metrics = total.metrics()
    if figures is not None:
        metrics |= figures.metrics(metrics, ranks)
    return metrics | sources.perplexities(found[: by_source.numel()])
