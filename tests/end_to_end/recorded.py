"""Runs with the record that a trainer keeps, from real loaders and feeds, without a model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from stoker_proto.config.reader import load_config
from stoker_proto.run_record import RunRecord
from trainer.feed.batch import StepBatch
from trainer.feed.digest_log import DigestLog
from trainer.feed.feed import Feed


def record_steps(
    config: Path, addresses: Sequence[str], output: Path, *overrides: str, ranks: int, first_step: int, stop_step: int
) -> None:
    """Train steps [first_step, stop_step), counted from 1, on so many ranks, as one start of a run does it."""
    loaded = load_config(config, [f"cluster.loader_addresses=[{','.join(addresses)}]", "trainer.epochs=2", *overrides])
    size = loaded.trainer.global_batch_size
    for rank in range(ranks):
        with Feed(loaded, "train", rank, ranks) as feed:
            info = feed.connect()
            record = RunRecord.of(loaded, ranks, info.fingerprints, info.pass_samples, info.processor_json)
            with closing(DigestLog(output, rank, record.write(output))) as log:
                steps = range(first_step, stop_step)
                for step, batch in zip(steps, _batches(feed, first_step - 1, info.num_samples, size), strict=False):
                    log.add(step, batch, 1.5)


def _batches(feed: Feed, step: int, num_samples: int, size: int) -> Iterator[StepBatch]:
    """From a step on, counted from 0, through epochs of the same length."""
    per_epoch = -(-num_samples // size)
    for epoch in itertools.count(step // per_epoch):
        yield from feed.steps(epoch, max(step - epoch * per_epoch, 0) * size)


def write_chats(path: Path, count: int) -> Path:
    """Conversations of two turns and different lengths."""
    rng = np.random.default_rng(3)
    with path.open("w") as file:
        for number in range(count):
            words = " ".join(f"word{n}" for n in rng.integers(0, 50, int(rng.integers(2, 20))))
            turns = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": words}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def change_pixel(npz: Path, step: int) -> None:
    """One pixel of one frame."""
    with np.load(npz) as arrays:
        rgb = arrays["rgb"].copy()
    rgb[step, 4, 4] = 255 - rgb[step, 4, 4]
    np.savez_compressed(npz, rgb=rgb)
