"""Figures of each source of a mixture: in a step, and in the run so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.training.loss import perplexity


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceResult:
    """One source in one step, over all ranks."""

    nll: float
    """Sum over its supervised tokens."""
    correct: float
    """Of these, those that had the largest logit."""
    num_supervised: float
    num_rows: float


class SourceTable:
    """Maps entries of the data paths to sources, and computes the figures logged for each source."""

    def __init__(self, names: Sequence[str], entry_sources: Sequence[int], pass_samples: Sequence[int]) -> None:
        """names: of the sources; entry_sources: source number of each entry; pass_samples: rows of one pass over each source."""
        self.names, self.pass_samples = tuple(names), tuple(pass_samples)
        self._source_of = np.asarray(entry_sources, np.int64)  # [entries]

    def __len__(self) -> int:
        return len(self.names)

    def of_rows(self, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[B]: source of each row, from its entry. Padding rows (-1) get source 0; they add nothing to it."""
        return self._source_of[np.maximum(entries, 0)] if len(self) > 1 else np.zeros(len(entries), np.int64)

    def figures(self, results: Sequence[SourceResult], so_far: Sequence[float]) -> dict[str, float]:
        """Scalars by name, e.g. `train/loss/chat`; none for a single source. so_far: rows trained since the beginning.

        A source without a label in the step has no loss and no accuracy.
        """
        if len(self) == 1:
            return {}
        found: dict[str, float] = {}
        for name, result, rows, pass_rows in zip(self.names, results, so_far, self.pass_samples, strict=True):
            if result.num_supervised:
                found[f"train/loss/{name}"] = result.nll / result.num_supervised
                found[f"train/accuracy/{name}"] = result.correct / result.num_supervised
            found[f"train/samples/{name}"] = rows
            found[f"train/passes/{name}"] = rows / pass_rows if pass_rows else math.nan
        return found

    def perplexities(self, sums: Sequence[float]) -> dict[str, float]:
        """`perplexity/chat` and `accuracy/chat`, from each source's NLL, correct and supervised tokens; none for one source."""
        found: dict[str, float] = {}
        for number, name in enumerate(self.names if len(self) > 1 else ()):
            nll, correct, supervised = sums[3 * number : 3 * number + 3]
            if supervised:
                found[f"perplexity/{name}"] = perplexity(nll / supervised)
                found[f"accuracy/{name}"] = correct / supervised
        return found

    def summary(self, so_far: Sequence[float]) -> dict[str, Mapping[str, float]]:
        """For the end of the run: name -> samples trained and passes over it."""
        return {
            name: {"samples": rows, "passes": rows / pass_rows if pass_rows else math.nan}
            for name, rows, pass_rows in zip(self.names, so_far, self.pass_samples, strict=True)
        }
