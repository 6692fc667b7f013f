"""torch's DataLoader over samples in random order: an NPZ is opened for each. To resume, the sampler begins in the middle."""

from __future__ import annotations

import random

from contract import BATCH, Ask, Batches, nothing_to_start, run
from torch.utils.data import DataLoader, Dataset
from work import Sample, one_sample, read_rows, taken


class Samples(Dataset):
    """Sample i is a trajectory and a timestep."""

    def __init__(self, ask: Ask) -> None:
        self.rows = read_rows(ask.data)
        self.index = [(n, t) for n, row in enumerate(self.rows) for t in range(len(row["actions"]))]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        n, t = self.index[i]
        return one_sample(self.rows[n], t)


def batches(ask: Ask, epoch: int, first_batch: int) -> Batches:
    """The epoch from a batch on."""
    dataset = Samples(ask)
    order = random.Random(epoch).sample(range(len(dataset)), min(ask.samples, len(dataset)))
    loader = DataLoader(
        dataset, BATCH, sampler=order[first_batch * BATCH :], num_workers=ask.workers, collate_fn=list,
        multiprocessing_context="fork",
    )  # fmt: skip
    return map(taken, loader)


if __name__ == "__main__":
    run(nothing_to_start(batches))
