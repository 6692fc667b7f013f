"""Runs tasks in processes, with a progress bar. The results are in the order of the tasks for any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tqdm import tqdm

from loader_service.sources.base import BaseSFTDataset, make_dataset
from stoker_proto.config import DataConfig
from stoker_proto.errors import StokerError
from stoker_proto.host.process import end_with_parent
from stoker_proto.host.trouble import host_errors

MIN_POOL_BYTES = 64 << 20
"""Less work than this is done in the calling process: starting others would take longer."""

Task = TypeVar("Task")
Result = TypeVar("Result")

_dataset: BaseSFTDataset | None = None  # of this worker process


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How many processes work, and what the user sees of it."""

    processes: int = 0
    """0: one per core that this process may use."""
    progress: str | None = None
    """Text of the progress bar; None: no bar."""
    unit: str = "B"
    """Of a task's weight."""
    min_weight: int | None = None
    """Tasks of less weight than this in all are run in the calling process; None: MIN_POOL_BYTES."""


def run_all(
    function: Callable[[BaseSFTDataset, Task], Result],
    tasks: Sequence[Task],
    weights: Sequence[int],
    dataset: BaseSFTDataset,
    pool: PoolOptions,
) -> list[Result]:
    """`function(dataset, task)` for every task, in order. Of several errors the first task's is raised.

    weights: bytes (or `pool.unit`s) of each task, for the bar.
    """
    processes = min(pool.processes or len(os.sched_getaffinity(0)), len(tasks))
    total = sum(weights)
    least = MIN_POOL_BYTES if pool.min_weight is None else pool.min_weight
    # A log file wants a line now and then where it takes long, not a moving bar.
    interval_s, delay_s = (0.1, 0.0) if sys.stderr.isatty() else (10.0, 10.0)
    with tqdm(
        total=total,
        desc=pool.progress,
        unit=pool.unit,
        unit_scale=True,
        disable=pool.progress is None,
        leave=False,
        mininterval=interval_s,
        delay=delay_s,
    ) as bar:
        if processes <= 1 or total < least:
            results = []
            for task, weight in zip(tasks, weights, strict=True):
                with host_errors(""):
                    results.append(function(dataset, task))
                bar.update(weight)
            return results
        return _run_in_pool(function, tasks, weights, dataset, processes, bar)


def _run_in_pool(
    function: Callable[[BaseSFTDataset, Task], Result],
    tasks: Sequence[Task],
    weights: Sequence[int],
    dataset: BaseSFTDataset,
    processes: int,
    bar: Any,
) -> list[Result]:
    executor = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(), dataset.config, {} if dataset.remote is None else dataset.remote.shards),
    )
    try:
        futures: list[Future[Result]] = []
        for task, weight in zip(tasks, weights, strict=True):
            future = executor.submit(_call, function, task)
            future.add_done_callback(partial(_advance, bar, weight))
            futures.append(future)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise StokerError(
            "a scanning process was killed (out of memory?): run loader-prepare again with fewer --processes; what was "
            "scanned is kept"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _advance(bar: Any, weight: int, _: Future[Any]) -> None:
    bar.update(weight)


def _start_worker(parent: int, config: DataConfig, remote_shards: dict[str, str]) -> None:
    global _dataset
    if not end_with_parent(parent):  # one that is killed (SIGTERM too) would leave this process waiting for ever
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each core has its process
    _dataset = make_dataset(config)
    if _dataset.remote is not None:
        _dataset.remote.expect(remote_shards)


def _call(function: Callable[[BaseSFTDataset, Task], Result], task: Task) -> Result:
    if _dataset is None:
        raise StokerError("this process was not started by run_all")
    with host_errors(""):
        return function(_dataset, task)
