"""One optimizer step: the loss of the global batch, its gradient, and whether the step is applied.

With `trainer.loss` something else is minimised (`objective`); what is reported stays the NLL.

Token-weighted over the global batch: loss = sum of NLL over all supervised tokens of all ranks and micro-batches, divided
by their number. DeepSpeed averages gradients over ranks, so a micro-batch's loss is its NLL sum x ranks / that number
(and DeepSpeed does not divide by the accumulation). The number is known before the first forward: one small
all-reduce of counts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stoker_proto.errors import ConfigError
from stoker_proto.hashing import key64
from trainer.engine.ranks import Ranks, sum_over_ranks
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
    row_losses: tuple[tuple[float, ...], ...] = ()
    """Of this rank only: the mean NLL per label of each row of each micro-batch; 0 for a row without labels."""


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
        if self._takes_positions:
            output = self.engine(**inputs.arguments, use_cache=False, logits_to_keep=inputs.positions)
            kept: torch.Tensor = output.logits
        else:
            output = self.engine(**inputs.arguments, use_cache=False)
            kept = output.logits[:, inputs.positions]
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
        width = inputs.targets.shape[1]
        length = width if self._takes_positions else inputs.arguments["input_ids"].shape[1]
        rows, places = inputs.labels // width, inputs.labels % width
        part = Part(
            columns=rows * length + (places if self._takes_positions else inputs.positions[places]),
            targets=inputs.targets.flatten()[inputs.labels],
            loss=self.loss,
        )
        options = {"logits_to_keep": inputs.positions} if self._takes_positions else {}
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
        """Train on this rank's part of global batch `index`. Every rank calls it with the same number of micro-batches."""
        counts = count_batch(micro_batches)
        counts = dict(zip(counts, map(int, sum_over_ranks(list(counts.values()), self.ranks)), strict=True))
        supervised = counts["num_supervised"]
        if supervised == 0:  # on every rank: no rank runs a forward, and not even weight decay changes a weight
            nothing = self._add_sources(torch.zeros(len(self.sources), 3), micro_batches)
            return StepResult(
                loss=math.nan, accuracy=math.nan, grad_norm=0.0, applied=False, sources=nothing, row_losses=(), **counts
            )
        seed_step(self.seed, index, self.ranks.rank)
        sums = torch.zeros(len(self.sources), 3, dtype=torch.float64, device=self.ranks.device)
        of_rows: list[torch.Tensor] = []
        for batch in micro_batches:
            minimised, rows = self.losses(self.make_inputs(batch))
            self.engine.backward(minimised.sum() * (self.ranks.world_size / supervised), scale_wrt_gas=False)
            self.engine.step()  # acts after the last micro-batch
            of_rows.append(rows)
            sums.index_add_(0, self._sources_of(batch), rows)
        sources = self._add_sources(sums, micro_batches)
        nll_total, correct = (sum(getattr(source, name) for source in sources) for name in ("nll", "correct"))
        norm = self.engine.get_global_grad_norm()
        return StepResult(
            loss=nll_total / supervised,
            accuracy=correct / supervised,
            grad_norm=float(norm if norm is not None else 0.0),
            applied=bool(self.engine.was_step_applied()),
            sources=sources,
            row_losses=tuple(tuple((rows[:, 0] / rows[:, 2].clamp(min=1)).tolist()) for rows in of_rows),
            **counts,
        )

    def _sources_of(self, batch: MicroBatch) -> torch.Tensor:
        return torch.as_tensor(self.sources.of_rows(batch.keys[:, 0]), device=self.ranks.device)

    def _add_sources(self, sums: torch.Tensor, micro_batches: Sequence[MicroBatch]) -> tuple[SourceResult, ...]:
        """Sums over the ranks of: float64[S, 3] NLL, correct and supervised tokens of each source, and its rows."""
        rows = np.zeros(len(self.sources), np.int64)
        for batch in micro_batches:
            rows += np.bincount(self.sources.of_rows(batch.keys[: batch.num_rows, 0]), minlength=len(rows))
        totals = sum_over_ranks([*sums.flatten().tolist(), *rows.tolist()], self.ranks)
        return tuple(
            SourceResult(
                nll=totals[3 * n],
                correct=totals[3 * n + 1],
                num_supervised=totals[3 * n + 2],
                num_rows=totals[n - len(rows)],
            )
            for n in range(len(rows))
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
    torch.manual_seed(key & ((1 << 63) - 1))
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
