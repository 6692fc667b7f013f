"""Stoker: a `loader-serve` and one rank's `Feed`. The consumer also decodes the JPEGs into a uint8 batch, which no peer does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from contract import Ask, Batches, run


@contextmanager
def opened(ask: Ask) -> Iterator[Callable[[int, int], Batches]]:
    """Start a loader with as many cores as the peers have workers; connect while the epoch begins."""
    command = [sys.executable, "-m", "loader_service.cli", "serve", "--config", str(ask.data), "--bind"]
    command += ["tcp://127.0.0.1:*", "--set", f"loader.cores={ask.workers}"]
    loader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert loader.stdout
    try:
        from stoker_proto.config.reader import load_config
        from trainer.feed.feed import Feed

        line = loader.stdout.readline()
        if not line.startswith("loader-serve ready"):
            raise SystemExit("loader-serve did not start")
        settings = [f"cluster.loader_addresses=[{line.split()[2]}]", f"trainer.epochs={ask.epochs}"]
        with Feed(load_config(ask.data, settings), "train", 0, 1) as feed:
            yield lambda epoch, first: batches(feed, epoch, first)
    finally:
        loader.terminate()
        try:
            loader.wait(30)
        except subprocess.TimeoutExpired:
            loader.kill()


def batches(feed, epoch: int, first_batch: int) -> Batches:
    """The epoch from a batch on; the bytes are those of all messages, tokens included."""
    if epoch == 0:
        feed.connect(0)
    received = 0
    for step in feed.steps(epoch, first_batch * feed.global_batch_size):
        micro = step.micro_batches[0]
        grown, received = feed.bytes_received - received, feed.bytes_received
        yield micro.sample_keys[:, 1:], grown


if __name__ == "__main__":
    run(opened)
