"""SPDL: threads of the consumer's process. To resume, its source begins at the trajectory, and the first frames are dropped."""

from __future__ import annotations

from contract import BATCH, Ask, Batches, nothing_to_start, run
from spdl.pipeline import PipelineBuilder
from work import read_rows, shuffled, taken, trajectory_samples


def batches(ask: Ask, epoch: int, first_batch: int) -> Batches:
    """The epoch from a batch on."""
    rows, drop = shuffled(read_rows(ask.data), epoch), first_batch * BATCH
    while drop and drop >= len(rows[0]["actions"]):
        drop -= len(rows.pop(0)["actions"])
    first = rows[0]["number"]
    pipeline = (
        PipelineBuilder()
        .add_source(rows)
        .pipe(
            lambda row: trajectory_samples(row)[drop if row["number"] == first else 0 :],
            concurrency=ask.workers, output_order="input",
        )
        .disaggregate()
        .aggregate(BATCH)
        .add_sink(4)
        .build(num_threads=ask.workers)
    )  # fmt: skip
    with pipeline.auto_stop():
        yield from map(taken, pipeline.get_iterator())


if __name__ == "__main__":
    run(nothing_to_start(batches))
