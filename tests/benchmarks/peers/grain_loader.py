"""Grain with worker processes. Its iterator has a state: to resume, the state of the first half's end is set in a new process."""

from __future__ import annotations

import json

import grain
from contract import BATCH, Ask, Batches, half, nothing_to_start, run
from work import Row, Sample, read_rows, taken, trajectory_samples


class Samples(grain.experimental.FlatMapTransform):
    """A trajectory becomes its samples."""

    max_fan_out = 1000

    def flat_map(self, element: Row) -> list[Sample]:
        return trajectory_samples(element)


def batches(ask: Ask, epoch: int, first_batch: int) -> Batches:
    """The epoch from a batch on. A run from the beginning leaves the state of its middle for the run that resumes."""
    rows = grain.MapDataset.source(read_rows(ask.data)).shuffle(seed=epoch).to_iter_dataset()
    dataset = grain.experimental.FlatMapIterDataset(rows, Samples()).batch(BATCH, batch_fn=list)
    iterator = iter(dataset.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=ask.workers)))
    saved = ask.data.with_name(f"grain-{ask.samples}-{ask.workers}-{epoch}.json")
    if first_batch:
        iterator.set_state(json.loads(saved.read_text()))
    for number, batch in enumerate(iterator, start=first_batch):
        if number + 1 == half(ask.num_batches):
            saved.write_text(json.dumps(iterator.get_state()))
        yield taken(batch)


if __name__ == "__main__":
    run(nothing_to_start(batches))
