"""What a peer's script and the harness say to each other, and the loop in which every peer's batches are taken.

A script starts what it needs, says `ready`, pulls whole epochs, says `first` at the first batch, `epoch` at the end of each.
After each mark it waits for a line on its standard input: meanwhile the harness reads the CPU time of all its processes.
Needs numpy only: it runs in each peer's own environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a script is to do."""

    data: Path
    """The JSONL, the LeRobot folder, or Stoker's config."""
    samples: int
    """Of an epoch; a peer that would take minutes is asked for fewer."""
    workers: int
    epochs: int
    first_batch: int
    """0, or where a run that resumes continues."""

    @property
    def num_batches(self) -> int:
        """Of an epoch."""
        return -(-self.samples // BATCH)


Batches = Iterator[tuple[np.ndarray, int]]
"""Of each batch: int[B, 2], the trajectory and timestep of its samples, and the bytes of its images."""
Open = Callable[[Ask], AbstractContextManager[Callable[[int, int], Batches]]]
"""Starts servers; what it yields gives the batches of (epoch, first batch)."""


def run(opened: Open) -> None:
    """The main function of a script."""
    parser = argparse.ArgumentParser(description="One peer, started by tests/benchmarks/peers/bench.py.")
    parser.add_argument("data", type=Path)
    for name in ("samples", "workers", "epochs", "first_batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, required=True)
    ask = Ask(**vars(parser.parse_args()))
    marks = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    with opened(ask) as batches:
        mark(marks, "ready")
        for epoch in range(ask.epochs):
            taken = Taken(half=half(ask.num_batches))
            for number, (keys, image_bytes) in enumerate(batches(epoch, ask.first_batch), start=ask.first_batch):
                if number == ask.first_batch:
                    mark(marks, "first", epoch=epoch)
                taken.add(number, keys, image_bytes)
                if number + 1 == ask.num_batches:
                    break
            mark(marks, "epoch", epoch=epoch, **taken.figures())


def half(num_batches: int) -> int:
    """The batch at which a resume begins: about half an epoch, and not at the end of a trajectory of 50 frames."""
    return max(num_batches // 2 - 1, 0)


class Taken:
    """Counts an epoch's samples, and digests their order."""

    def __init__(self, half: int) -> None:
        self._half, self._keys, self._bytes = half, list[np.ndarray](), 0
        self._all, self._tail = hashlib.sha256(), hashlib.sha256()

    def add(self, number: int, keys: np.ndarray, image_bytes: int) -> None:
        """One batch."""
        data = np.ascontiguousarray(keys, np.int64).tobytes()
        self._all.update(data)
        if number >= self._half:
            self._tail.update(data)
        self._keys.append(np.array(keys))
        self._bytes += image_bytes

    def figures(self) -> Mapping[str, Any]:
        """Of the epoch."""
        keys = np.concatenate(self._keys) if self._keys else np.empty((0, 2), np.int64)
        return {
            "samples": len(keys), "distinct": len(np.unique(keys, axis=0)), "image_bytes": self._bytes,
            "order": self._all.hexdigest(), "order_of_second_half": self._tail.hexdigest(),
        }  # fmt: skip


def mark(marks: TextIO, name: str, **data: Any) -> None:
    """Say it, and wait until the harness has read the clocks. Ends the script if the harness is gone."""
    marks.write(json.dumps({"mark": name, **data}) + "\n")
    marks.flush()
    if not sys.stdin.readline():
        sys.exit("the harness ended")


def nothing_to_start(batches: Callable[[Ask, int, int], Batches]) -> Open:
    """For peers without servers."""
    return lambda ask: nullcontext(lambda epoch, first: batches(ask, epoch, first))


def skip(batches: Batches, count: int) -> Batches:
    """Without the first `count`: how a loader without a position of its own resumes. It makes them all again."""
    for number, batch in enumerate(batches):
        if number >= count:
            yield batch
