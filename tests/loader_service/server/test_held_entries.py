"""`--shards`: which entries a loader holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loader_service.server.command import held_entries
from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord
from stoker_proto.config import Config, DataConfig, ModelConfig, TrainerConfig
from stoker_proto.errors import ConfigError


class Nested(BaseSFTDataset):
    """Its shards lie two folders below what a config names, as LeRobot's do."""

    shard_patterns = ("data/*/*.txt",)

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        yield ScannedRecord(offset=0, size=1, num_samples=1)

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        yield Sample(instruction="a", answer="b")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two entries, one and two, of two shards each."""
    for name in ("one", "two"):
        for shard in ("a", "b"):
            path = tmp_path / name / "data" / "chunk" / f"{shard}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    paths = tuple(str(tmp_path / name) for name in ("one", "two"))
    data = DataConfig(
        dataset_type=f"{__name__}:Nested", train_data_paths=paths, val_data_paths=paths[1:], max_seq_len=8
    )
    trainer = TrainerConfig(micro_batch_size=1, global_batch_size=1, lr=1e-4)
    return Config(model=ModelConfig(base_model_path="unused"), data=data, trainer=trainer)


@pytest.mark.parametrize(
    ("globs", "train", "val"),
    [
        (["one"], [0], []),
        (["one/"], [0], []),
        (["two"], [1], [0]),
        (["one", "two"], [0, 1], [0]),
        (["two/data/*/*.txt"], [1], [0]),
        (["two/data/chunk"], [1], [0]),
        (["t*"], [1], [0]),
        (["*/data/chunk/a.txt", "*/data/chunk/b.txt"], [0, 1], [0]),
    ],
)
def test_an_entry_is_held_by_its_name_its_folder_or_its_shards(
    config: Config, tmp_path: Path, globs: list[str], train: list[int], val: list[int]
) -> None:
    assert held_entries(config, [f"{tmp_path}/{pattern}" for pattern in globs]) == {"train": train, "val": val}


def test_all_are_held_unasked(config: Config) -> None:
    assert held_entries(config, None) is None


def test_what_cuts_an_entry_or_names_nothing_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--shards matches 1 of the 2 shards of .*one: a lane stays within one entry"
    ):
        held_entries(config, [f"{tmp_path}/one/data/chunk/a.txt"])
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ConfigError, match="matches no shard of the data paths"):
        held_entries(config, [f"{tmp_path}/other.txt"])
    for file in (tmp_path / "one" / "data" / "chunk").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="one' names no shard"):
        held_entries(config, [f"{tmp_path}/one"])
