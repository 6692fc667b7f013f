"""The run: steps, figures, validations, checkpoints, and the export at the end.

feed.steps -> Stepper.begin -> (the next step begins) -> figures, cursor
                                                     -> every eval_interval: validate; other evaluations at their intervals
                                                     -> every checkpoint.interval: save
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from stoker_proto.config import Config
from stoker_proto.config.trainer import seconds_of
from stoker_proto.processor import Processor
from stoker_proto.run_record import RunRecord
from trainer.checkpoints.best import Best, is_hopeless, reason_of_step, step_to_export, update
from trainer.checkpoints.card import TrainingFacts
from trainer.checkpoints.export import export
from trainer.checkpoints.from_checkpoint import export_best
from trainer.checkpoints.save import Checkpoints
from trainer.checkpoints.state import Cursor
from trainer.checkpoints.write_errors import writing
from trainer.engine.optimizer import count_steps, learning_rate, shortfall
from trainer.engine.ranks import Ranks, max_over_ranks, range_over_ranks, text_of_first_rank
from trainer.engine.zero import leave_ranks, set_learning_rate
from trainer.evals.example_sheet import draw_first
from trainer.evals.interface import Moment, Outcome
from trainer.evals.schedule import EvalSchedule
from trainer.feed.batch import StepBatch
from trainer.feed.digest_log import DigestLog
from trainer.models.loading import count_parameters
from trainer.process.early_end import EarlyEnd
from trainer.report.budgets import Budgets
from trainer.report.data_wait import Interval, line_of, peak_memory_gb, verdict_of
from trainer.report.fleet import FleetReport
from trainer.report.loss_spikes import WorstSteps
from trainer.report.progress import ProgressBar, write_summary
from trainer.report.step_profile import StepProfiler
from trainer.report.trackers import Trackers
from trainer.training.flops import FlopCounter
from trainer.training.loss import perplexity
from trainer.training.split import Split
from trainer.training.step import BegunStep, Stepper, StepResult

log = logging.getLogger(__name__)

_LAST_CHANCE_S = 30.0
"""After an error: for a checkpoint that is being written to become whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A step that has begun, and what was read of the host then."""

    batch: StepBatch
    rate: float
    """Learning rate."""
    number: int
    """Optimizer steps before it."""
    step: BegunStep


@dataclass(kw_only=True)
class Trainer:
    """All objects of a run; `trainer.build` makes it."""

    config: Config
    ranks: Ranks
    stepper: Stepper
    processor: Processor
    train: Split
    val: Split | None
    evals: EvalSchedule
    fingerprints: dict[str, str]
    checkpoints: Checkpoints
    trackers: Trackers
    flops: FlopCounter
    peak_flops: float | None
    cursor: Cursor
    fleet: FleetReport | None = None
    """On the first rank."""
    best: Best | None = None
    """The best validation so far, where `trainer.checkpoint.best` names a figure."""
    stop_signal: Callable[[], int] = lambda: 0
    """Returns the number of a signal that asked this rank to save and end, or 0."""

    def __post_init__(self) -> None:
        trainer = self.config.trainer
        self.output_dir = Path(trainer.output_dir)
        # An estimate for later epochs: with packing or weights they may be a few rows longer or shorter.
        self.total_steps = count_steps(trainer, self.train.num_samples)
        self._budgets = Budgets(self.config, self.ranks)
        self._end = EarlyEnd(None if trainer.max_time is None else seconds_of(trainer.max_time))
        self._validated_at = self._saved_at = -1
        self._last: dict[str, float] = {}
        self._validation: dict[str, float] = {}
        self._measured: dict[str, float] = {}
        """Figures of all evaluations so far that were ready at once, for `trainer.checkpoint.best`."""
        self._wait_s = self._train_s = 0.0
        self._interval = Interval()
        self._profiler = StepProfiler(trainer.profile, self.output_dir, is_first=self.ranks.is_first)
        self._has_shown = False
        self._read_at = time.monotonic()
        self.reads_late = self.ranks.device.type != "cpu"
        """Read a step's figures when the next one has begun, so that a GPU never waits for the host."""

    @property
    def exit_code(self) -> int:
        """Of the process, when `run` has returned: not 0 where the run was stopped before its end."""
        return self._end.exit_code

    def run(self) -> dict[str, Any]:
        """Train to the end, validate, save and export. Returns the summary, which is also in `summary.json`."""
        try:
            return self._run()
        except Exception:
            self.checkpoints.wait_alone(_LAST_CHANCE_S)
            raise

    def _run(self) -> dict[str, Any]:
        trainer, first_step = self.config.trainer, self.cursor.step
        log.info(
            "training from step %d to %d: %d samples an epoch, %d ranks",
            first_step, self.total_steps, self.train.num_samples, self.ranks.world_size,
        )  # fmt: skip
        if note := shortfall(trainer, self.train.num_samples):
            log.warning("%s", note)
        if self.val is not None:
            self.val.feed.begin()  # its first ticket may follow hours later
        self._end.start()
        started = time.monotonic()
        bar = ProgressBar(total=self.total_steps, done=first_step, shown=self.ranks.is_first)
        record = self._keep_record()
        digests = DigestLog(self.output_dir, self.ranks.rank, record)
        keep = self.config.trainer.worst_steps
        self._worst = WorstSteps(self.output_dir, self.ranks.rank, record, keep=keep, done=first_step)
        with closing(bar), closing(digests), logging_redirect_tqdm():
            while not self._is_over:
                self._run_epoch(bar, digests)
        self._profiler.close(self.cursor.step)
        if self._end.is_decided:
            return self._end_early(first_step)
        self._keep(self.evals.at_last_step(self.cursor.step, self._moment))
        if self._end.is_decided:  # during a validation
            return self._end_early(first_step)
        if self._saved_at != self.cursor.step and self.cursor.step > first_step:
            self._save()
        folder = self._export() if trainer.export else None
        self.checkpoints.finish()
        skipped = self._budgets.say_skipped()
        if self.fleet is not None:
            self.fleet.say_summary()
        # From here on the ranks do nothing together: the first one may wait for an evaluation as long as that takes.
        self._keep(self.evals.wait())
        summary = self._summarise(time.monotonic() - started, folder, skipped)
        exported = f"{folder}, of step {summary['export_step']}" if folder else "none (trainer.export)"
        log.info(
            "training is over after %d steps; export: %s; newest checkpoint: %s",
            self.cursor.step, exported, self.checkpoints.newest or "none",
        )  # fmt: skip
        if folder and (reason := self._reason_of_export()):
            log.info("%s: %s", folder, reason)
        return summary

    def _end_early(self, first_step: int) -> dict[str, Any]:
        """Save and return an unfinished summary, which is not written: `summary.json` means success."""
        if self._saved_at != self.cursor.step and self.cursor.step > first_step:
            self._save()
        self.checkpoints.finish()
        log.info("stopped %s", self.describe_position())
        return {"steps": self.cursor.step, "stopped": True}

    def _export(self) -> Path:
        """Write the export of the last weights, or of the best checkpoint; every rank calls it. Returns its folder."""
        target = self.output_dir / "export"
        if self.best is not None and self._step_to_export != self.cursor.step:
            num_parameters = count_parameters(self.stepper.engine.module)
            export_best(self.checkpoints, self.best, num_parameters, target, self._reason_of_export())
            return target
        processor, facts = self._processor_to_keep(), replace(self._facts(), choice=self._reason_of_export())
        return export(self.stepper.engine, self.config, processor, self.ranks, facts)

    @property
    def _step_to_export(self) -> int:
        return step_to_export(self.best, self.config.trainer.checkpoint.best, self.cursor.step)

    def _reason_of_export(self) -> str:
        return reason_of_step(self.best, self.config.trainer.checkpoint.best, self.cursor.step)

    def _keep_record(self) -> str:
        """Write what decides the rows of this run's steps; every rank calls it. Returns the record's name."""
        name = ""
        if self.ranks.is_first:
            record = RunRecord.of(
                self.config,
                self.ranks.world_size,
                self.fingerprints,
                self.train.sources.pass_samples,
                self.processor.to_json(),
            )
            name = record.write(self.output_dir)
        return text_of_first_rank(name, self.ranks)

    def describe_position(self) -> str:
        """Text: the current step, and from where the same command resumes."""
        return f"at step {self.cursor.step} of {self.total_steps}: {self.checkpoints.resume_hint}"

    def close(self, *, failed: bool = False) -> None:
        """Close everything. After a failure the other ranks may be at any step, so this does not wait for them."""
        self.evals.close()
        if self.fleet is not None:
            self.fleet.close()
        for split in (self.train, self.val):
            if split is not None:
                split.feed.close()
        self.trackers.close()
        if not failed:
            leave_ranks()

    @property
    def _is_over(self) -> bool:
        trainer = self.config.trainer
        at_last_step = trainer.max_steps is not None and self.cursor.step >= trainer.max_steps
        if self._end.is_decided or is_hopeless(self.best, trainer.checkpoint.best):
            return True
        return at_last_step or self.cursor.epoch >= trainer.epochs

    def _run_epoch(self, bar: ProgressBar, digests: DigestLog) -> None:
        """Train the rest of the cursor's epoch."""
        epoch = self.cursor.epoch
        steps = self.train.feed.steps(epoch, self.cursor.sample)
        before: _Begun | None = None
        with closing(cast("Any", steps)):
            self._read_at = time.monotonic()
            for batch in steps:
                begun = self._begin(batch, self.cursor.step + (before is not None))
                if before is not None:
                    self._finish(before, bar, digests)
                before = begun
                if not self.reads_late or self._end.is_decided or self._is_settled_after(begun):
                    self._finish(begun, bar, digests)
                    before = None
                    self._read_at = time.monotonic()  # the next step's time includes its data wait, but no validation
                if self._is_over:
                    return
        if self.cursor.epoch == epoch:  # no step was left in it
            self.cursor = replace(self.cursor, epoch=epoch + 1, sample=0)

    def _begin(self, batch: StepBatch, number: int) -> _Begun:
        """Begin optimizer step `number`, counted from 0; its figures are read by `_finish`."""
        rate = learning_rate(self.config.trainer, number, self.total_steps)
        set_learning_rate(self.stepper.engine, rate)
        self._profiler.before_step(number + 1)
        step = self.stepper.begin(batch.micro_batches, number, lambda: self._worst_figures(batch))
        self._profiler.after_step(number + 1)
        return _Begun(batch=batch, rate=rate, number=number, step=step)

    def _worst_figures(self, batch: StepBatch) -> tuple[float, ...]:
        """Figures of this rank whose largest value over the ranks `_report` reads."""
        failed, memory_gb = float(self.checkpoints.has_failed), peak_memory_gb(self.ranks.device)
        return batch.wait_s, -self.train.feed.num_ready, self._end.reason(self.stop_signal), failed, memory_gb

    def _is_settled_after(self, begun: _Begun) -> bool:
        """Whether something needs the weights as this step leaves them, before another step changes them."""
        trainer, done = self.config.trainer, begun.number + 1
        interval = trainer.checkpoint.interval
        is_last = begun.batch.step + 1 == begun.batch.num_steps or done == trainer.max_steps
        return is_last or self.evals.is_due(done) or (interval > 0 and done % interval == 0)

    def _finish(self, begun: _Begun, bar: ProgressBar, digests: DigestLog) -> None:
        """Read a step's figures, and do what is due after it."""
        batch, result = begun.batch, begun.step.result()
        step_s, self._read_at = time.monotonic() - self._read_at, time.monotonic()
        self._advance(batch, result)
        if not self._has_shown:
            self._has_shown = True
            if self.trackers.is_active:
                media = draw_first(batch.micro_batches, self.processor, self.output_dir)
                self.trackers.show(media, self.cursor.step)
        self._budgets.add_bad(reason for micro_batch in batch.micro_batches for reason in micro_batch.skipped)
        self._report(batch, result, begun.rate, step_s, bar)
        digests.add(self.cursor.step, batch, result.loss)
        self._worst.add(self.cursor.step, result.loss, result.row_losses)
        self._budgets.check(self.cursor.step, result, self.cursor.bad_samples)
        self._keep(self.evals.after_step(self.cursor.step, self._moment))
        interval = self.config.trainer.checkpoint.interval
        if interval and self.cursor.step % interval == 0 and self._saved_at != self.cursor.step:
            self._save()

    def _advance(self, batch: StepBatch, result: StepResult) -> None:
        at_end = batch.step + 1 == batch.num_steps
        self.cursor = replace(
            self.cursor,
            step=self.cursor.step + 1,
            epoch=self.cursor.epoch + at_end,
            sample=0 if at_end else batch.next_sample,
            position=self.cursor.position + result.num_rows,
            skipped_steps=self.cursor.skipped_steps + result.was_not_applied,
            bad_samples=self.cursor.bad_samples + result.num_bad,
            num_images=images_of_actions(batch, self.cursor.num_images),
            source_samples=tuple(
                before + int(source.num_rows)
                for before, source in zip(self.cursor.source_samples, result.sources, strict=True)
            ),
        )

    def _report(self, batch: StepBatch, result: StepResult, rate: float, step_s: float, bar: ProgressBar) -> None:
        wait_s, none_ready, reason, has_failed, memory_gb = result.worst
        wait_share = min(1.0, wait_s / step_s)
        self._end.decide(int(reason), self.cursor.step)
        if has_failed:
            self.checkpoints.finish()  # raises
        self._wait_s, self._train_s = self._wait_s + wait_s, self._train_s + step_s
        self._interval.add(wait_s, step_s)
        if self.fleet is not None:
            self.fleet.step(num_rows=result.num_rows, step_s=step_s, wait_s=wait_s, queue_depth=int(-none_ready))
        figures = {
            "train/loss": result.loss,
            "train/perplexity": math.nan if math.isnan(result.loss) else perplexity(result.loss),
            "train/accuracy": result.accuracy,
            "train/lr": rate,
            "train/grad_norm": result.grad_norm,
            "train/step_s": step_s,
            "train/data_wait_s": wait_s,
            "train/data_wait_frac": wait_share,
            "train/queue_depth": -none_ready,
            "train/samples_per_s": result.num_rows / step_s,
            "train/tokens_per_s": result.num_tokens / step_s,
            "train/labels_per_s": result.num_supervised / step_s,
            "train/skipped_steps": float(self.cursor.skipped_steps),
            "train/bad_samples": float(self.cursor.bad_samples),
            "train/epoch": self.cursor.position / self.train.num_samples,
        }
        figures |= self.stepper.sources.figures(result.sources, self.cursor.source_samples)
        if self.peak_flops is not None:
            done = self.flops(result.num_tokens, result.num_supervised, result.num_images)
            figures["train/mfu"] = done / (step_s * self.peak_flops * self.ranks.world_size)
        if memory_gb:
            figures["train/gpu_memory_gb"] = memory_gb
        self._last = figures
        bar.advance(loss=result.loss, step_s=step_s, wait_s=wait_s)
        if self.cursor.step % self.config.trainer.logger.log_interval == 0 or self._is_over:
            figures["train/interval_data_wait_frac"], verdict = self._interval.end()
            self.trackers.log(figures, self.cursor.step)
            if self._interval.is_line_due(is_last=self._is_over):
                log.info("step %d: %s", self.cursor.step, line_of(figures, verdict))

    def _is_told_to_stop(self) -> bool:
        """Whether a signal reached a rank, asked between two steps; every rank calls it. The time limit waits for evaluations."""
        [number] = max_over_ranks([float(self.stop_signal())], self.ranks)
        self._end.decide(int(number), self.cursor.step)
        return self._end.is_decided

    def _moment(self) -> Moment:
        """The run as evaluations see it; every rank calls it."""
        processor, output_dir = self._processor_to_keep(), self.output_dir

        def export_to(folder: Path) -> Path:
            elsewhere = replace(self.config, trainer=replace(self.config.trainer, output_dir=str(folder)))
            return export(self.stepper.engine, elsewhere, processor, self.ranks, self._facts())

        return Moment(
            step=self.cursor.step,
            is_last=self._is_over,
            output_dir=output_dir,
            stepper=self.stepper,
            processor=processor,
            ranks=self.ranks,
            val=self.val,
            is_stopping=self._is_told_to_stop,
            export=export_to,
        )

    def _keep(self, outcomes: Sequence[Outcome]) -> None:
        """Log what evaluations found, at the step that it is of, and keep the newest figures for the summary."""
        for outcome in outcomes:
            self._validation |= outcome.figures
            self.trackers.log({f"val/{name}": value for name, value in outcome.figures.items()}, outcome.step)
            self.trackers.show({f"val/{name}": path for name, path in outcome.media.items()}, outcome.step)
            if outcome.line:
                log.info("step %d: %s", outcome.step, outcome.line)
        # Evaluations beside the training measured earlier weights, and only the first rank has their results.
        now = [outcome.figures for outcome in outcomes if outcome.step == self.cursor.step]
        if now:
            self._validated_at = self.cursor.step
            self._keep_best({f"val/{name}": value for figures in now for name, value in figures.items()})

    def _keep_best(self, figures: dict[str, float]) -> None:
        """Save after the best validation so far (`trainer.checkpoint.best`); the same decision on all ranks."""
        config = self.config.trainer.checkpoint.best
        if config is None:
            return
        self._measured |= figures
        if config.metric not in figures:
            if config.metric in self._measured or not self.evals.have_all_begun:
                return  # another evaluation's figure
            self._save()  # the error that follows costs no work
            figures = self._measured
        self.best = update(self.best, config, figures, self.cursor.step)
        if self.best.step == self.cursor.step:
            log.info("step %d: %s %.6g is the best so far", self.cursor.step, config.metric, self.best.value)
            self._save()
        elif is_hopeless(self.best, config):
            log.info(
                "training ends early: %d validations in a row had no better %s than %.6g at step %d, whose checkpoint is kept",
                self.best.waited, config.metric, self.best.value, self.best.step,
            )  # fmt: skip

    def _save(self) -> None:
        processor = self._processor_to_keep()
        extra: dict[str, Any] = {} if self.best is None else {"best": self.best.to_json()}
        if self._validated_at == self.cursor.step:
            extra["scores"] = self._facts().scores
        started = time.monotonic()
        folder = self.checkpoints.save(
            self.stepper.engine, self.cursor, self.fingerprints, processor, extra, background=not self._is_over
        )
        self._saved_at, stall_s = self.cursor.step, time.monotonic() - started
        log.info("step %d: checkpoint %s; training waited %.2f s", self.cursor.step, folder, stall_s)

    def _processor_to_keep(self) -> Processor:
        """The processor with the number of images over all ranks, which the cursor gets too; every rank calls it."""
        self.cursor = replace(self.cursor, num_images=range_over_ranks(self.cursor.num_images, self.ranks))
        return self.processor.with_num_images(self.cursor.num_images)

    def _facts(self) -> TrainingFacts:
        """What the model card says of the training: the last step's figures and the last validation's."""
        scores = {f"val/{name}": value for name, value in self._validation.items()}
        scores |= {name: self._last[name] for name in ("train/loss", "train/accuracy") if name in self._last}
        return TrainingFacts(steps=self.cursor.step, samples=self.cursor.position, scores=scores)

    def _summarise(self, seconds: float, exported: Path | None, skipped: dict[str, int]) -> dict[str, Any]:
        summary = {
            "steps": self.cursor.step,
            "samples": self.cursor.position,
            "skipped_steps": self.cursor.skipped_steps,
            "bad_samples": self.cursor.bad_samples,
            "sources": self.stepper.sources.summary(self.cursor.source_samples),
            "skipped": skipped,
            "seconds": seconds,
            "data_wait_frac": self._wait_s / self._train_s if self._train_s else 0.0,
            "verdict": verdict_of(self._wait_s, self._train_s),
            "train": {name.removeprefix("train/"): value for name, value in self._last.items()},
            "val": self._validation,
            "best": None if self.best is None else self.best.to_json(),
            "export": str(exported) if exported else None,
            "export_step": self._step_to_export if exported else None,
        }
        if self.ranks.is_first:
            with writing(self.output_dir):
                write_summary(self.output_dir / "summary.json", summary)
        return summary


def images_of_actions(batch: StepBatch, before: tuple[int, int] | None) -> tuple[int, int] | None:
    """(fewest, most) images of a sample with an action: `before`, widened to this rank's rows. None while there was none.

    A policy must be given as many images. Counted, not configured: only the samples show what a user's dataset class returns.

        one camera                           (1, 1)
        two cameras, image_history 3         (6, 6)
        one source with one, one with two    (1, 2)
    """
    for micro_batch in batch.micro_batches:
        actions = np.asarray(micro_batch.actions)  # [B, K, D]
        if not actions.size:
            continue
        counts = np.asarray(micro_batch.image_counts)[~np.isnan(actions).all(axis=(1, 2))]
        if counts.size:
            least, most = before or (int(counts[0]), int(counts[0]))
            before = min(least, int(counts.min())), max(most, int(counts.max()))
    return before
