"""Ray Data on one node. It has no position: to resume, the first half is made again, in preserved order."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
from contract import BATCH, Ask, Batches, run, skip
from work import read_rows, shuffled, trajectory_samples

HERE = str(Path(__file__).resolve().parent)


@contextmanager
def opened(ask: Ask) -> Iterator[Callable[[int, int], Batches]]:
    """A local Ray with as many CPUs as there are workers."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # its sockets' paths must be short
        ray.init(
            num_cpus=ask.workers, include_dashboard=False, _temp_dir=folder, log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": HERE}}, object_store_memory=1 << 30, _node_ip_address="127.0.0.1",
        )  # fmt: skip
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        try:
            yield lambda epoch, first: batches(ask, epoch, first)
        finally:
            ray.shutdown()


def batches(ask: Ask, epoch: int, first_batch: int) -> Batches:
    """The epoch from a batch on."""
    rows = shuffled(read_rows(ask.data), epoch)
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 16)).flat_map(trajectory_samples)
    taken = (
        (np.stack(batch["key"]), sum(map(len, batch["image"])))
        for batch in dataset.iter_batches(batch_size=BATCH, prefetch_batches=2)
    )
    return skip(taken, first_batch)


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    run(opened)
