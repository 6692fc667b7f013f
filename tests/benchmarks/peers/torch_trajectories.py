"""torch's DataLoader, each worker inflates whole trajectories. It has no position: to resume, the first half is made again."""

from __future__ import annotations

from typing import Any

from contract import BATCH, Ask, Batches, nothing_to_start, run, skip
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from work import read_rows, shuffled, taken, trajectory_samples


class Trajectories(IterableDataset):
    """Worker w of n reads every n-th trajectory of the epoch."""

    def __init__(self, ask: Ask, epoch: int) -> None:
        self.rows = shuffled(read_rows(ask.data), epoch)

    def __iter__(self) -> Any:
        worker: Any = get_worker_info()
        for row in self.rows[worker.id :: worker.num_workers]:
            yield from trajectory_samples(row)


def batches(ask: Ask, epoch: int, first_batch: int) -> Batches:
    """The epoch from a batch on."""
    dataset = Trajectories(ask, epoch)
    loader = DataLoader(dataset, BATCH, num_workers=ask.workers, collate_fn=list, multiprocessing_context="fork")
    return skip(map(taken, loader), first_batch)


if __name__ == "__main__":
    run(nothing_to_start(batches))
