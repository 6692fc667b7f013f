"""Samples in memory, and a feed of them with the interface and the slices of `trainer.feed.Feed`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stoker_proto.actions import StatisticsAccumulator, fit_codec
from stoker_proto.config import (
    ActionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DialogueConfig,
    ImageConfig,
    LoggerConfig,
    ModelConfig,
    TrainerConfig,
)
from stoker_proto.processor import Processor
from stoker_proto.wire.messages import Piece
from trainer.feed.batch import BatchBuilder, MicroBatch, StepBatch

DIM = 3


def make_config(model: Path, output_dir: Path, *, data: dict[str, Any] | None = None, **trainer: Any) -> Config:
    """Micro-batches of 2 and global batches of 8; `trainer` also takes keys of `model`."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    model_keys = {key: trainer.pop(key) for key in names if key in trainer}
    checkpoint = CheckpointConfig(**trainer.pop("checkpoint", {}))
    keys: dict[str, Any] = {"lr": 1e-3, "eval_interval": 0, "logger": LoggerConfig(tensorboard=False), **trainer}
    data_keys: dict[str, Any] = {
        "image": ImageConfig(transport="pixels"),
        "action": ActionConfig(codec="bins"),
        "dialogue": DialogueConfig(template="stoker"),
        **(data or {}),
    }
    if "sources" not in data_keys:
        paths = {"train_data_paths": ("memory",), "val_data_paths": ("memory",)}
        data_keys = {"dataset_type": "mani_openpi", **paths, **data_keys}
    return Config(
        model=ModelConfig(base_model_path=str(model), **{"precision": "fp32", **model_keys}),
        data=DataConfig(max_seq_len=96, **data_keys),
        trainer=TrainerConfig(
            micro_batch_size=2, global_batch_size=8, output_dir=str(output_dir), checkpoint=checkpoint, **keys
        ),
    )


def make_processor(config: Config) -> Processor:
    """With 16 bins, or what `data.action.codec_options` say, for actions of DIM dimensions in [-1, 1]."""
    accumulator = StatisticsAccumulator(DIM)
    rows = np.random.default_rng(0).uniform(-1, 1, (512, DIM)).astype(np.float32)
    accumulator.add(rows, np.arange(512, dtype=np.uint64))
    statistics, sample = accumulator.finish()
    action, options = config.data.action, config.data.action.codec_options or {"num_bins": 16}
    codec = fit_codec(action.codec, sample, statistics, chunk=action.chunk, **options)
    return Processor.build(config, codec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sample, before it is encoded."""

    instruction: str
    frame: NDArray[np.uint8] | None = None
    action: NDArray[np.float32] | None = None
    answer: str | None = None


def make_examples(count: int, *, seed: int, images: bool = True) -> list[Example]:
    """Actions with an image, and answers in words of 1 to 12 words without one: tokens fall unevenly on rows."""
    generator = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        if images and number % 3 != 2:
            frame = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            action = generator.uniform(-1, 1, (1, DIM)).astype(np.float32)
            examples.append(Example(instruction=f"push cube {number % 5}", frame=frame, action=action))
        else:
            words = " ".join(f"word{w}" for w in generator.integers(0, 9, int(generator.integers(1, 13))))
            examples.append(Example(instruction=f"say {number % 4}", answer=words))
    return examples


def make_piece(
    examples: Sequence[Example], numbers: Sequence[int], processor: Processor, *, text_entry: int = 0
) -> Piece:
    """What a loader would send; samples without an action are of entry `text_entry`."""
    rows, images, actions = [], [], np.full((len(examples), 1, DIM), np.nan, np.float32)
    for row, example in enumerate(examples):
        codes = None
        if example.action is not None and processor.codec is not None:
            actions[row] = example.action
            codes = np.asarray(processor.codec.encode(example.action[None])[0], np.int32)
        rows.append(
            processor.encode(example.instruction, int(example.frame is not None), codes=codes, answer=example.answer)
        )
        if example.frame is not None:
            images.append(processor.encode_image(example.frame, None))
    return Piece(
        ticket=0,
        loader="memory",
        keys=np.array(
            [
                [0 if example.action is not None else text_entry, number, 0]
                for number, example in zip(numbers, examples, strict=True)
            ],
            np.int64,
        ).reshape(-1, 3),
        lengths=np.array([len(row.input_ids) for row in rows], np.int32),
        input_ids=np.concatenate([row.input_ids for row in rows]).astype(np.int32),
        supervised=np.concatenate([row.supervised for row in rows]).astype(np.uint8),
        image_counts=np.array([int(example.frame is not None) for example in examples], np.uint8),
        images=images,
        actions=actions
        if any(example.action is not None for example in examples)
        else np.zeros((len(examples), 0, 0), np.float32),
    )


class MemoryFeed:
    """A rank's steps over examples in memory; the order differs from epoch to epoch."""

    def __init__(
        self, examples: Sequence[Example], config: Config, processor: Processor, rank: int, world_size: int
    ) -> None:
        self.examples, self.config, self.processor = list(examples), config, processor
        self.rank, self.world_size = rank, world_size
        self.fail_at: tuple[int, int] | None = None
        """(epoch, first sample) of the step at which the loaders are gone."""
        self.copy: Callable[[MicroBatch], Any] | None = None
        self.begun = False
        """Was told that training begins."""

    @property
    def num_ready(self) -> int:
        """Nothing is made ahead."""
        return 0

    def copy_ahead(self, copy: Callable[[MicroBatch], Any]) -> None:
        """For batches from now on."""
        self.copy = copy

    def begin(self) -> None:
        """Nobody joins here."""
        self.begun = True

    def batch(self, epoch: int, start: int, stop: int) -> MicroBatch:
        """Stream positions [start, stop) of an epoch."""
        order = np.random.default_rng(epoch).permutation(len(self.examples))
        numbers = order[start:stop].tolist()
        build = BatchBuilder(
            decoder=self.processor,
            num_rows=self.config.trainer.micro_batch_size,
            max_tokens=self.config.data.max_seq_len,
        )
        if not numbers:
            return build([])
        text_entry = len(self.config.data.paths("train")) - 1
        return build([make_piece([self.examples[n] for n in numbers], numbers, self.processor, text_entry=text_entry)])

    def steps(self, epoch: int, first_sample: int) -> Iterator[StepBatch]:
        """See `trainer.feed.client.schedule`."""
        total, size, rows = (
            len(self.examples),
            self.config.trainer.global_batch_size,
            self.config.trainer.micro_batch_size,
        )
        num_steps = -(-max(total - first_sample, 0) // size)
        for step in range(num_steps):
            first = first_sample + step * size
            if self.fail_at == (epoch, first):
                raise ConnectionError("the loaders are gone")
            starts = [first + (a * self.world_size + self.rank) * rows for a in range(size // (rows * self.world_size))]
            last = min(first + size, total)
            batches = [self.batch(epoch, min(start, last), min(start + rows, last)) for start in starts]
            for batch in batches:
                batch.on_device = None if self.copy is None else self.copy(batch)
            yield StepBatch(
                micro_batches=batches,
                wait_s=0.0,
                epoch=epoch,
                step=step,
                num_steps=num_steps,
                first_sample=first,
                next_sample=last,
            )

    def close(self) -> None:
        """Nothing is held."""
