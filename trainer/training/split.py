"""One split of the data as the run uses it: its feed, its size, and its sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.feed.batch import MicroBatch, StepBatch
from trainer.training.source_table import SourceTable


class BatchFeed(Protocol):
    """The part of `trainer.feed.feed.Feed` that a run uses."""

    @property
    def num_ready(self) -> int:
        """Micro-batches that are decoded or being decoded."""

    def copy_ahead(self, copy: Callable[[MicroBatch], Any]) -> None:
        """Call this with each micro-batch ahead of its step; what it returns is `MicroBatch.on_device`."""

    def begin(self) -> None:
        """Training has begun, perhaps with the other split."""

    def steps(self, epoch: int, first_sample: int) -> Iterator[StepBatch]:
        """This rank's part of the epoch's global batches, from `first_sample` on."""

    def close(self) -> None:
        """Close connections and threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A feed and its size."""

    feed: BatchFeed
    num_samples: int
    """In one epoch."""
    sources: SourceTable
