"""One optimizer step: the loss of the global batch, its gradient, and whether the step is applied.

With `trainer.loss` something else is minimised (`objective`); what is reported stays the NLL.

Token-weighted over the global batch: loss = sum of NLL over all supervised tokens of all ranks and micro-batches, divided
by their number. DeepSpeed averages gradients over ranks, so a micro-batch's loss is its NLL sum x ranks / that number
(and DeepSpeed does not divide by the accumulation). The number is known to the device before the first forward: one small
all-reduce of counts. The host learns it, and all other figures, from one copy at the end (`BegunStep.result`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError
from stoker_proto.hashing import key64
from trainer.engine.ranks import Ranks, max_tensor, sum_tensor
from trainer.engine.zero import Engine
from trainer.feed.batch import IGNORED, MicroBatch
from trainer.losses.interface import TokenLoss
from trainer.models.families import takes_positions
from trainer.training.chunks import ChunkedHead, Part
from trainer.training.inputs import InputMaker, Inputs
from trainer.training.loss import nll_of_rows, row_sums
from trainer.training.objective import Objective
from trainer.training.source_table import SourceResult, SourceTable


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The outcome of a step, over all ranks."""

    loss: float
    """Mean NLL per supervised token; NaN where there was none."""
    accuracy: float
    """Share of supervised tokens that had the largest logit."""
    grad_norm: float
    """Before clipping; infinite if it was not finite; 0 if no token was supervised."""
    applied: bool
    """Whether weights changed."""
    num_supervised: int
    num_rows: int
    num_tokens: int
    """Tokens without padding."""
    num_images: int
    num_bad: int
    """Bad samples, which came without labels (`data.on_bad_sample: skip`)."""
    sources: tuple[SourceResult, ...]
    """Each source's part, in the order of the config."""
    worst: tuple[float, ...] = ()
    """The largest value over the ranks of each of `Stepper.begin`'s `worst`."""
    row_losses: tuple[tuple[float, ...], ...] = ()
    """Of this rank only: the mean NLL per label of each row of each micro-batch; 0 for a row without labels."""

    @property
    def was_not_applied(self) -> bool:
        """Whether there was something to learn, and weights did not change."""
        return self.num_supervised > 0 and not self.applied


class Stepper:
    """Runs optimizer steps of one engine."""

    def __init__(
        self,
        engine: Engine,
        make_inputs: InputMaker,
        ranks: Ranks,
        seed: int,
        sources: SourceTable,
        objective: Objective | None = None,
    ) -> None:
        """objective: what is minimised; None: the NLL of the labels."""
        self.engine, self.make_inputs, self.ranks, self.seed, self.sources = engine, make_inputs, ranks, seed, sources
        self._objective = objective
        self._takes_positions = takes_positions(engine.module)
        self.chunks: ChunkedHead | None = None
        """Set where logits may be made in chunks (`prove_chunks`)."""

    @property
    def loss(self) -> TokenLoss | None:
        """What is minimised of each label; None: its NLL."""
        return None if self._objective is None else self._objective.loss

    def logits(self, inputs: Inputs) -> torch.Tensor:
        """float32[B, P, V]: only at the P positions where some row has a label."""
        return self._forward(inputs)[0]

    def _forward(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(logits float32[B, P, V], estimates float32[B, A] of a model that has an auxiliary head)."""
        places = inputs.positions if inputs.grid is None else inputs.grid
        if self._takes_positions:
            output = self.engine(**inputs.arguments, use_cache=False, logits_to_keep=places)
            kept: torch.Tensor = output.logits
        else:
            output = self.engine(**inputs.arguments, use_cache=False)
            kept = output.logits[:, places]
        if inputs.grid is not None:
            kept = kept.view(*inputs.targets.shape, -1)
        estimates: torch.Tensor | None = getattr(output, "auxiliary", None)
        return kept[: inputs.num_rows].float(), None if estimates is None else estimates[: inputs.num_rows].float()

    def losses(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """(what is minimised float32[B], `row_sums` float64[B, 3] without gradient) of a micro-batch.

        The logits are gone when this returns, but for what the gradient needs of them.
        """
        if self.chunks is not None and inputs.num_labels > self.chunks.size:
            return self._losses_of_chunks(self.chunks, inputs)
        logits, estimates = self._forward(inputs)
        with torch.set_grad_enabled(self._objective is None and torch.is_grad_enabled()):
            nll = nll_of_rows(logits, inputs.targets)
        minimised = nll if self._objective is None else self._objective(logits, estimates, inputs)
        return minimised, row_sums(logits.detach(), inputs.targets, nll.detach())

    def _losses_of_chunks(self, chunks: ChunkedHead, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, without the matrix of logits."""
        options: dict[str, Any] = {}
        if self._takes_positions:
            columns = inputs.labels
            options["logits_to_keep"] = inputs.positions if inputs.grid is None else inputs.grid
        elif inputs.grid is None:
            width, length = inputs.targets.shape[1], inputs.arguments["input_ids"].shape[1]
            columns = inputs.labels // width * length + inputs.positions[inputs.labels % width]
        else:
            columns = inputs.grid[inputs.labels]
        part = Part(
            columns=columns,
            targets=inputs.targets.flatten()[inputs.labels],
            loss=self.loss,
        )
        with chunks.returning_losses(part):
            output = self.engine(**inputs.arguments, **options, use_cache=False)
        if len(part.losses) != 1:
            raise ConfigError(
                f"{type(self.engine.module).__name__} calls its head {len(part.losses)} times in a forward, which the loss in "
                "chunks does not expect: set trainer.loss.chunk_labels to 0"
            )
        # DeepSpeed waits for a gradient at what forward returns.
        losses = part.losses[0] + 0.0 * output.logits.float().sum()

        def by_row(values: torch.Tensor) -> torch.Tensor:
            every = torch.zeros(inputs.targets.numel(), dtype=values.dtype, device=values.device)
            return every.index_copy(0, inputs.labels, values).view_as(inputs.targets).sum(dim=1)

        minimised, nll = by_row(losses), by_row(part.nll)
        if self._objective is not None:
            estimates: torch.Tensor | None = getattr(output, "auxiliary", None)
            estimates = None if estimates is None else estimates[: inputs.num_rows].float()
            minimised = self._objective.with_auxiliary(minimised, estimates, inputs)
        labelled = (inputs.targets != IGNORED).sum(dim=1)
        return minimised, torch.stack([nll.double(), by_row(part.correct.double()), labelled.double()], dim=1)

    def step(self, micro_batches: Sequence[MicroBatch], index: int) -> StepResult:
        """`begin`, and its result at once."""
        return self.begin(micro_batches, index).result()

    def begin(
        self, micro_batches: Sequence[MicroBatch], index: int, worst: Callable[[], Sequence[float]] = tuple
    ) -> BegunStep:
        """Train on this rank's part of global batch `index`. Every rank calls it with the same number of micro-batches.

        A GPU may still be computing when this returns: of ours, nothing in here waits for it. (DeepSpeed does, at the norm of the
        gradient, and so do some of transformers' models in their forward.) worst: called at the end; returns figures whose
        largest value over the ranks is wanted, as `StepResult.worst`.
        """
        counts = count_batch(micro_batches)
        rows = self._rows_of_sources(micro_batches)
        numbers = [self.sources.of_rows(batch.keys[:, 0]) for batch in micro_batches]
        sent = self._send([*counts.values(), *rows, *np.concatenate(numbers)])
        summed, source_of_row = sent[: len(counts) + len(rows)], sent[len(counts) + len(rows) :].long()
        sum_tensor(summed)
        begun = BegunStep(names=tuple(counts), num_sources=len(rows))
        # Where this rank has a label, all have one together. Only a rank without any has to look.
        if not counts["num_supervised"] and not bool(summed[0]):
            # No rank runs a forward, and not even weight decay changes a weight.
            begun.read_later([summed, summed.new_zeros(3 * len(rows))], self._largest(worst()))
            return begun
        seed_step(self.seed, index, self.ranks.rank)
        sums = torch.zeros(len(self.sources), 3, dtype=torch.float64, device=self.ranks.device)
        sizes = [len(part) for part in numbers]
        share = (self.ranks.world_size / summed[0]).float()
        of_rows: list[torch.Tensor] = []
        for batch, sources in zip(micro_batches, source_of_row.split_with_sizes(sizes), strict=True):
            minimised, row_figures = self.losses(self.make_inputs(batch))
            self.engine.backward(minimised.sum() * share, scale_wrt_gas=False)
            self.engine.step()  # acts after the last micro-batch
            of_rows.append(row_figures[:, 0] / row_figures[:, 2].clamp(min=1))
            sums.index_add_(0, sources, row_figures)
        sum_tensor(sums)
        begun.applied, begun.rows = bool(self.engine.was_step_applied()), tuple(map(len, of_rows))
        norm = self.engine.get_global_grad_norm()
        norms = []
        if isinstance(norm, torch.Tensor) and norm.device == sums.device:
            norms = [norm.detach().double().view(1)]
        else:
            begun.norm = float(norm or 0.0)
        begun.read_later([summed, sums.flatten()], self._largest(worst()), [*of_rows, *norms])
        return begun

    def _largest(self, values: Sequence[float]) -> torch.Tensor:
        """float64: the largest of each over the ranks."""
        tensor = self._send(values)
        if len(values):
            max_tensor(tensor)
        return tensor

    def _send(self, values: Sequence[float]) -> torch.Tensor:
        """float64 on the device, in one copy that nobody waits for."""
        tensor = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if self.ranks.device.type != "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.ranks.device, non_blocking=True)

    def _rows_of_sources(self, micro_batches: Sequence[MicroBatch]) -> NDArray[np.int64]:
        """int64[S]: this rank's rows of each source."""
        rows = np.zeros(len(self.sources), np.int64)
        for batch in micro_batches:
            rows += np.bincount(self.sources.of_rows(batch.keys[: batch.num_rows, 0]), minlength=len(rows))
        return rows


@dataclass(slots=True, kw_only=True)
class BegunStep:
    """A step whose figures may not be known yet."""

    names: tuple[str, ...]
    """Of the counts."""
    num_sources: int
    num_worst: int = 0
    applied: bool = False
    norm: float | None = None
    """Of the gradient, where the engine has it on the host; otherwise it is the last figure, or 0."""
    rows: tuple[int, ...] = ()
    """Rows of each of this rank's micro-batches; () where no rank had a label."""
    figures: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """float64: counts, rows of sources, sums of sources [S, 3], `worst`, this rank's loss of each row, and perhaps the norm."""
    _copied: torch.cuda.Event | None = None

    def read_later(
        self, sums: Sequence[torch.Tensor], worst: torch.Tensor, others: Sequence[torch.Tensor] = ()
    ) -> None:
        """Have the device copy them to the host when it comes to it."""
        self.num_worst = len(worst)
        figures = torch.cat([*sums, worst, *others])
        if figures.device.type == "cpu":
            self.figures = figures
            return
        self.figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        self.figures.copy_(figures, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def result(self) -> StepResult:
        """The outcome; waits until the device has computed the step."""
        if self._copied is not None:
            self._copied.synchronize()
        values = iter(self.figures.tolist())  # the one read of a step
        counts = {name: int(next(values)) for name in self.names}
        rows = list(islice(values, self.num_sources))
        sums = [list(islice(values, 3)) for _ in range(self.num_sources)]
        sources = tuple(
            SourceResult(nll=nll, correct=correct, num_supervised=labels, num_rows=num_rows)
            for (nll, correct, labels), num_rows in zip(sums, rows, strict=True)
        )
        worst = tuple(islice(values, self.num_worst))
        row_losses = tuple(tuple(islice(values, count)) for count in self.rows)
        supervised = counts["num_supervised"]
        return StepResult(
            loss=sum(source.nll for source in sources) / supervised if supervised else math.nan,
            accuracy=sum(source.correct for source in sources) / supervised if supervised else math.nan,
            grad_norm=next(values, 0.0) if self.norm is None else self.norm,
            applied=self.applied,
            sources=sources,
            worst=worst,
            row_losses=row_losses,
            **counts,
        )


def count_batch(micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
    """Counts of this rank's part of a global batch, named as in StepResult."""
    return {
        "num_supervised": sum(batch.num_supervised for batch in micro_batches),
        "num_rows": sum(batch.num_rows for batch in micro_batches),
        "num_tokens": sum(int(np.asarray(batch.attention_mask)[: batch.num_rows].sum()) for batch in micro_batches),
        "num_images": sum(0 if batch.pixels is None else len(batch.pixels) for batch in micro_batches),
        "num_bad": sum(len(batch.skipped) for batch in micro_batches),
    }


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed all generators, so that the randomness of a step (dropout) is a function of its number.

    So the cursor determines the generators' state: a resumed run draws the same numbers as an uninterrupted one.
    """
    key = key64("step", seed, step, rank)
    # Not torch.manual_seed: it formats a stack trace for each kind of device that is not there, up to 5 ms of CPU time.
    torch.default_generator.manual_seed(key & ((1 << 63) - 1))
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(key & ((1 << 63) - 1))
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
