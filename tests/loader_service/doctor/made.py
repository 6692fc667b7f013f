"""Configs, statistics and manifests made of a few numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from loader_service.manifest import EntryManifest
from stoker_proto.actions import ActionStatistics
from stoker_proto.config import ActionConfig, Config, DataConfig, ModelConfig, TrainerConfig


def a_config(**data: Any) -> Config:
    return Config(
        model=ModelConfig(base_model_path="unused"),
        data=DataConfig(
            **{"dataset_type": "mani_openpi", "max_seq_len": 64, "action": ActionConfig(codec="bins"), **data}
        ),
        trainer=TrainerConfig(micro_batch_size=1, global_batch_size=1, lr=1e-4),
    )


def statistics(actions: Any, mask: list[bool] | None = None) -> ActionStatistics:
    rows = np.asarray(actions, np.float64)
    q01, q99 = np.quantile(rows, [0.01, 0.99], axis=0)
    return ActionStatistics(
        count=len(rows), min=rows.min(0), max=rows.max(0), mean=rows.mean(0), std=rows.std(0), q01=q01, q99=q99,
        mask=np.array(mask or [True] * rows.shape[1]),
    )  # fmt: skip


def a_manifest(lengths: list[int], actions: Any = None, content: str = "a") -> EntryManifest:
    count = len(lengths)
    return EntryManifest(
        split="train", entry=0, path="demos", shards=("demos",), shard_index=np.zeros(count, np.uint32),
        offsets=np.arange(count), sizes=np.ones(count, np.uint32), num_samples=np.array(lengths, np.uint32),
        num_tokens=np.zeros(count, np.uint32), files=np.zeros(count, np.int64), file_times=np.zeros(count, np.int64),
        files_fingerprint=content, content=content, fingerprint=content, total_samples=sum(lengths),
        statistics=None if actions is None else statistics(actions), states=None, num_bad=0, num_bad_samples=0,
        errors=(), notes={}, folder=Path("unused"), stamps=((1, 1),),
    )  # fmt: skip
