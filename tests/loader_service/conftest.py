"""Small demonstrations on disk, and configs that name them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker_proto.config import ActionConfig, Config, DataConfig, ModelConfig, TrainerConfig


def demo_lines(lengths: Iterable[int], seed: int = 0) -> str:
    """JSONL of trajectories with these numbers of random actions. Their NPZ need not exist: the scan opens none."""
    random = np.random.default_rng(seed)
    rows = [
        {
            "obs_path": f"traj_{i:06d}/obs.npz",
            "task": "PushCube-v1",
            "actions": random.uniform(-1, 1, (length, 7)).round(6).tolist(),
        }
        for i, length in enumerate(lengths)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[..., Path]:
    """`write_shard("demos/a.jsonl", [3, 5], seed=1)`: a shard below tmp_path."""

    def write(name: str, lengths: Iterable[int], seed: int = 0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(demo_lines(lengths, seed))
        return path

    return write


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """A config of these data paths, `action` keys and other `data` keys."""

    def make(
        *train: str | Path, val: Iterable[str | Path] = (), action: dict[str, Any] | None = None, **data: Any
    ) -> Config:
        return Config(
            model=ModelConfig(base_model_path="unused"),
            data=DataConfig(
                **{"dataset_type": "mani_openpi", "max_seq_len": 64, **data},
                train_data_paths=tuple(map(str, train)),
                val_data_paths=tuple(map(str, val)),
                action=ActionConfig(**{"codec": "bins", **(action or {})}),
            ),
            trainer=TrainerConfig(micro_batch_size=1, global_batch_size=1, lr=1e-4),
        )

    return make


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were really scanned, not found in the cache; to be cleared between calls."""
    from loader_service.sources.mani_openpi import ManiOpenPIDataset

    names: list[str] = []
    real = ManiOpenPIDataset.scan_part

    def counting(self: ManiOpenPIDataset, shard: Path, start: int, stop: int) -> Any:
        names.append(shard.name)
        return real(self, shard, start, stop)

    monkeypatch.setattr(ManiOpenPIDataset, "scan_part", counting)
    return names
