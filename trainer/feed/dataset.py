"""`StokerDataset`: the batches of a Stoker fleet for any torch training loop, without Stoker's own trainer.

    dataset = StokerDataset(load_config("my.yaml"))
    for batch in DataLoader(dataset, batch_size=None):     # each item is a micro-batch already
        loss = model(**batch).loss

An item is one micro-batch of this rank; `dataset.passes` of them are one optimizer step. `trainer/examples/` has complete
programs: a plain loop, the Trainer of transformers, and TRL's SFTTrainer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from stoker_proto.config import Config, check_batch_arithmetic
from stoker_proto.errors import ConfigError, RefusedError
from stoker_proto.run_record import RunRecord
from trainer.feed.batch import MicroBatch
from trainer.feed.digest_log import DigestLog
from trainer.feed.feed import Feed

FORMAT = 1

Batch = dict[str, torch.Tensor]


def text_tensors(batch: MicroBatch) -> Batch:
    """`input_ids`, `labels` and `attention_mask` (packed rows: `position_ids`), each int64[B, T], as transformers' models take
    them. Labels are not shifted, and -100 where nothing is trained. Raises ConfigError for a batch with images."""
    if batch.pixels is not None:
        raise ConfigError(
            "the batch has images, which each model family takes in its own form: pass StokerDataset a `transform`, which gets "
            "them as MicroBatch.pixels, uint8[I, H, W, 3]"
        )
    tensors = {"input_ids": torch.as_tensor(batch.input_ids), "labels": torch.as_tensor(batch.labels)}
    if batch.positions is None:
        tensors["attention_mask"] = torch.as_tensor(batch.attention_mask)
    else:
        tensors["position_ids"] = torch.as_tensor(batch.positions)
    return tensors


class StokerDataset(IterableDataset[Batch]):
    """This rank's micro-batches, epoch after epoch: one `iter` is one epoch, or the rest of it after `load_state_dict`.

    An iterator that is left before its end begins again at the same place, as with any dataset: only the end of an epoch, and
    `load_state_dict`, move it. Connects to the loaders at the first `iter`. `close` ends its threads.
    """

    def __init__(
        self,
        config: Config,
        *,
        transform: Callable[[MicroBatch], Batch] = text_tensors,
        output_dir: Path | None = None,
    ) -> None:
        """transform: MicroBatch -> what the loop gets. output_dir: keep a record of the run and its digests there, so that
        `stoker-batch` shows the rows of each step."""
        self._config, self._transform, self._output_dir = config, transform, output_dir
        self._start = (0, 0)  # epoch and sample at which the next `iter` begins
        self._steps_before = 0  # trained before that
        self._at = (0, 0, 0)  # epoch, sample and number of steps after the last complete step
        self._pins: dict[str, str] = {}
        self._feed: Feed | None = None
        self._log: DigestLog | None = None

    @property
    def passes(self) -> int:
        """Micro-batches of this rank in one optimizer step: the gradient accumulation of the loop. Raises ConfigError."""
        trainer = self._config.trainer
        return check_batch_arithmetic(trainer.global_batch_size, trainer.micro_batch_size, _rank_and_world()[1])

    def __iter__(self) -> Iterator[Batch]:
        """The micro-batches from here to the end of the epoch. Raises DataError, DeadlineError, RefusedError."""
        if get_worker_info() is not None:
            raise ConfigError(
                "StokerDataset was given to a DataLoader with workers: set num_workers=0; its batches are fetched and decoded "
                "ahead in threads, on the loaders' CPUs"
            )
        feed = self._connect()
        epoch, sample = self._start
        steps = feed.steps(epoch, sample)
        done = self._steps_before
        self._at = (epoch, sample, done)
        with closing(cast("Any", steps)):
            for batch in steps:
                done += 1
                after = (epoch, batch.next_sample) if batch.step + 1 < batch.num_steps else (epoch + 1, 0)
                for number, micro_batch in enumerate(batch.micro_batches, start=1):
                    tensors = self._transform(micro_batch)
                    if number == len(batch.micro_batches):  # the loop may ask for the state before it asks for more
                        self._at = (*after, done)
                        if self._log is not None:
                            self._log.add(done, batch, math.nan)
                    yield tensors
        self._start, self._steps_before = (epoch + 1, 0), done

    def state_dict(self) -> dict[str, Any]:
        """The position after the last optimizer step whose micro-batches were all handed out: plain values, the same on every
        rank. Save it with the model of that step."""
        epoch, sample, steps = self._at
        return {
            "format": FORMAT,
            "epoch": epoch,
            "sample": sample,
            "steps": steps,
            "global_batch_size": self._config.trainer.global_batch_size,
            "fingerprints": dict(self._pins),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, also on another number of ranks. Raises ConfigError, RefusedError."""
        size = self._config.trainer.global_batch_size
        if state.get("format") != FORMAT:
            raise ConfigError(f"the state has format {state.get('format')!r}: this version reads {FORMAT}")
        if state["global_batch_size"] != size:
            raise ConfigError(
                f"trainer.global_batch_size is {size}, and the state was saved with {state['global_batch_size']}: set it back, "
                "or its steps would be others"
            )
        pins = dict(state["fingerprints"])
        if self._feed is not None and pins and pins != self._pins:
            raise RefusedError("the state was saved with other data or another meaning of it than the loaders have")
        self._pins = pins
        self._start, self._steps_before = (state["epoch"], state["sample"]), state["steps"]
        self._at = (*self._start, self._steps_before)

    def close(self) -> None:
        """Close connections and threads. The next `iter` connects anew."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> Feed:
        if self._feed is None:
            rank, world_size = _rank_and_world()
            feed = Feed(self._config, "train", rank, world_size, pins=self._pins)
            try:
                info = feed.connect()
                if self._output_dir is not None:
                    record = RunRecord.of(
                        self._config, world_size, info.fingerprints, info.pass_samples, info.processor_json
                    )
                    self._log = DigestLog(self._output_dir, rank, record.write(self._output_dir))
            except BaseException:
                feed.close()
                raise
            self._feed, self._pins = feed, dict(info.fingerprints)
        return self._feed


def _rank_and_world() -> tuple[int, int]:
    """Of torch.distributed; (0, 1) in a process of its own. Raises ConfigError where ranks were started and have not met yet."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "WORLD_SIZE is above 1 and torch.distributed is not initialised: every rank would train all rows; call "
            "torch.distributed.init_process_group before the dataset is read"
        )
    return 0, 1
