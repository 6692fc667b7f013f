"""What each source of a mixture contributed: to a step, and to the run so far."""

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
    """Of these, how many had the largest logit."""
    num_supervised: float
    num_rows: float


class SourceTable:
    """Entry of the data paths -> source, and what is logged of each."""

    def __init__(self, names: Sequence[str], entry_sources: Sequence[int], pass_samples: Sequence[int]) -> None:
        """names: of the sources; entry_sources: for each entry the number of its source; pass_samples: rows of one pass."""
        self.names, self._pass_samples = tuple(names), tuple(pass_samples)
        self._source_of = np.asarray(entry_sources, np.int64)  # [entries]

    def __len__(self) -> int:
        return len(self.names)

    def of_rows(self, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[B]: the source of each row from its entry; of padding rows (-1) the first, to which they add nothing."""
        return self._source_of[np.maximum(entries, 0)] if len(self) > 1 else np.zeros(len(entries), np.int64)

    def figures(self, results: Sequence[SourceResult], so_far: Sequence[float]) -> dict[str, float]:
        """Scalars by name, e.g. `train/loss/chat`; none for a single source. so_far: rows trained since the beginning.

        A source that a step had no label of has no loss and accuracy in it.
        """
        if len(self) == 1:
            return {}
        found: dict[str, float] = {}
        for name, result, rows, pass_rows in zip(self.names, results, so_far, self._pass_samples, strict=True):
            if result.num_supervised:
                found[f"train/loss/{name}"] = result.nll / result.num_supervised
                found[f"train/accuracy/{name}"] = result.correct / result.num_supervised
            found[f"train/samples/{name}"] = rows
            found[f"train/passes/{name}"] = rows / pass_rows if pass_rows else math.nan
        return found

    def perplexities(self, sums: Sequence[float]) -> dict[str, float]:
        """`perplexity/chat` and `accuracy/chat` from NLL, right and supervised tokens of each source; none for a single one."""
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
            for name, rows, pass_rows in zip(self.names, so_far, self._pass_samples, strict=True)
        }
