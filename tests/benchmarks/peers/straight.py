"""The same libraries put together by hand in a thread pool: no loader, but the bound for those that are measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from contract import BATCH, Ask, Batches, nothing_to_start, run, skip
from work import Sample, read_rows, shuffled, taken, trajectory_samples


def batches(ask: Ask, epoch: int, first_batch: int) -> Batches:
    """The epoch from a batch on."""
    return skip(map(taken, full_batches(ask, epoch)), first_batch)


def full_batches(ask: Ask, epoch: int) -> Iterator[list[Sample]]:
    """At most two trajectories per thread are made ahead."""
    rows = deque(shuffled(read_rows(ask.data), epoch))
    with ThreadPoolExecutor(ask.workers) as pool:
        made = deque(pool.submit(trajectory_samples, rows.popleft()) for _ in range(min(2 * ask.workers, len(rows))))
        batch: list[Sample] = []
        while made:
            samples = made.popleft().result()
            if rows:
                made.append(pool.submit(trajectory_samples, rows.popleft()))
            for sample in samples:
                batch.append(sample)
                if len(batch) == BATCH:
                    yield batch
                    batch = []
        if batch:
            yield batch


if __name__ == "__main__":
    run(nothing_to_start(batches))
