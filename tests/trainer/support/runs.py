"""A whole run of the trainer on examples in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stoker_proto.config import Config
from tests.trainer.support.memory import MemoryFeed, make_examples, make_processor
from trainer.build import Connected, assemble
from trainer.checkpoints.save import Checkpoints
from trainer.engine.zero import join_ranks
from trainer.loop import Split, Trainer
from trainer.training.source_table import SourceTable

NUM_TRAIN, NUM_VAL = 29, 13  # 4 steps an epoch, the last with padding rows
FINGERPRINTS = {"codec": "c" * 64, "manifest/train/0": "t" * 64}


def build_run(config: Config, *, images: bool = True, fingerprints: dict[str, str] | None = None) -> Trainer:
    """On the rank that this process is."""
    ranks = join_ranks()
    processor = make_processor(config)
    splits = []
    for count, seed in ((NUM_TRAIN, 1), (NUM_VAL, 2)):
        examples = make_examples(count, seed=seed, images=images)
        feed = MemoryFeed(examples, config, processor, ranks.rank, ranks.world_size)
        names = config.data.source_names()
        sources = SourceTable(names, config.data.entry_sources("train"), (count,) * len(names))
        splits.append(Split(feed=feed, num_samples=count, sources=sources))
    checkpoints = Checkpoints(config, ranks)
    checkpoint = checkpoints.find()
    found = fingerprints or FINGERPRINTS
    if checkpoint is not None:
        checkpoints.check(checkpoint, found)
    connected = Connected(train=splits[0], val=splits[1], processor=processor, fingerprints=dict(found))
    return assemble(config, ranks, connected, checkpoints, checkpoint)


def run(config: Config, *, fail_at: tuple[int, int] | None = None, images: bool = True, dropout: float = 0.0) -> Any:
    """The summary; with fail_at, where it stood when the loaders were gone there (nothing is saved then, as after a kill)."""
    trainer = build_run(config, images=images)
    for module in trainer.stepper.engine.module.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    feed = trainer.train.feed
    assert isinstance(feed, MemoryFeed)
    feed.fail_at = fail_at
    try:
        return trainer.run()
    except ConnectionError:
        return trainer.describe_position()


def digests(output_dir: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Lines of digests-rank{r}.jsonl."""
    return [json.loads(line) for line in (output_dir / f"digests-rank{rank}.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of an exported model."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
