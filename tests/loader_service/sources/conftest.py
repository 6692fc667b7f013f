"""Small demonstrations on disk: a JSONL file with NPZ files beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto.config import ActionConfig, DataConfig, ImageConfig


def rgb_frames(count: int, height: int = 8, width: int = 6, seed: int = 0) -> np.ndarray:
    """uint8[count, height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture
def write_demo(tmp_path: Path) -> Callable[..., Path]:
    """Write one trajectory; returns the JSONL. `row` changes or (None) removes keys, `arrays` are what the NPZ holds."""

    def write(
        *,
        num_actions: int = 4,
        arrays: Mapping[str, np.ndarray] | None = None,
        row: Mapping[str, Any] | None = None,
        stored: bool = False,
        name: str = "train.jsonl",
    ) -> Path:
        folder = tmp_path / "demos"
        (folder / "traj_000000").mkdir(parents=True, exist_ok=True)
        save = np.savez if stored else np.savez_compressed
        save(folder / "traj_000000" / "obs.npz", **(arrays or {"rgb": rgb_frames(num_actions)}))
        actions = [[t / 8, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0] for t in range(num_actions)]
        full = {"obs_path": "traj_000000/obs.npz", "task": "PushCube-v1", "actions": actions, **(row or {})}
        shard = folder / name
        with shard.open("a") as file:
            file.write(json.dumps({key: value for key, value in full.items() if value is not None}) + "\n")
        return shard

    return write


@pytest.fixture
def make_mani() -> Callable[..., ManiOpenPIDataset]:
    """The dataset of a config with these `data` keys."""

    def make(*, chunk: int = 1, drop_noops: bool = False, depth: bool = False, **keys: Any) -> ManiOpenPIDataset:
        config = DataConfig(
            dataset_type="mani_openpi",
            train_data_paths=("unused",),
            max_seq_len=64,
            action=ActionConfig(chunk=chunk, drop_noops=drop_noops),
            image=ImageConfig(depth=depth),
            **keys,
        )
        return ManiOpenPIDataset(config)

    return make
