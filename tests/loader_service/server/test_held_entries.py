"""`--shards`: which entries a loader holds, and which shards of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loader_service.prepare.run import prepare
from loader_service.server.handshake import missing_shards
from loader_service.server.shard_selection import check_parts, held_shards
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
    ],
)
def test_an_entry_is_held_by_its_name(
    config: Config, tmp_path: Path, globs: list[str], train: list[int], val: list[int]
) -> None:
    held = held_shards(config, [f"{tmp_path}/{pattern}" for pattern in globs])
    assert held == {"train": dict.fromkeys(train), "val": dict.fromkeys(val)}


@pytest.mark.parametrize(
    ("globs", "train", "val"),
    [
        (["two/data/*/*.txt"], [1], [0]),
        (["two/data/chunk"], [1], [0]),
        (["t*"], [1], [0]),
        (["*/data/chunk/a.txt", "*/data/chunk/b.txt"], [0, 1], [0]),
    ],
)
def test_an_entry_is_held_whole_by_its_folder_or_all_its_shards(
    config: Config, tmp_path: Path, globs: list[str], train: list[int], val: list[int]
) -> None:
    held = held_shards(config, [f"{tmp_path}/{pattern}" for pattern in globs])
    assert held is not None
    assert {split: list(entries) for split, entries in held.items()} == {"train": train, "val": val}
    assert held["val"] == {0: {str(tmp_path / "two" / "data" / "chunk" / f"{name}.txt") for name in "ab"}}
    given = replace(config, data=replace(config.data, cache_dir=str(tmp_path / "cache")))
    entries = prepare(given, held=held).entries
    assert [manifest.held for of_split in entries.values() for manifest in of_split.values()] == [None] * (
        len(train) + len(val)
    )


def test_all_are_held_unasked(config: Config) -> None:
    assert held_shards(config, None) is None


def test_a_part_of_an_entry_is_held_by_its_shards(config: Config, tmp_path: Path) -> None:
    shards = [str(tmp_path / "two" / "data" / "chunk" / f"{name}.txt") for name in "ab"]
    assert held_shards(config, shards[:1]) == {"train": {1: {shards[0]}}, "val": {0: {shards[0]}}}
    assert held_shards(config, [f"{tmp_path}/one", shards[1]]) == {
        "train": {0: None, 1: {shards[1]}},
        "val": {0: {shards[1]}},
    }
    given = replace(config, data=replace(config.data, cache_dir=str(tmp_path / "cache")))
    held = held_shards(given, shards[1:])
    entries = prepare(given, held=held).entries
    check_parts(entries, given.data)
    whole = prepare(given).entries["train"][1]
    part = entries["train"][1]
    assert (part.held, part.fingerprint, part.num_records) == ({1}, whole.fingerprint, 2)
    assert missing_shards([part, whole]) == [[1, 0, 1, 2, "a.txt", "a.txt"]]
    assert part.first_records(2) == [1]
    assert part.held_shards() == [shards[1]]
    assert copy.copy(part).held == {1}


def test_parts_that_cannot_be_served_are_refused(config: Config, tmp_path: Path) -> None:
    held = {"train": {0: frozenset({str(tmp_path / "one" / "data" / "chunk" / "a.txt")})}, "val": {}}
    data = replace(config.data, cache_dir=str(tmp_path / "cache"), weigh_by="tokens")
    manifest = prepare(replace(config, data=data), held=held).entries["train"][0]
    assert manifest.held == {0}
    with pytest.raises(
        ConfigError, match=r"a part of data.train_data_paths\[0\] .*estimate its tokens by its first record"
    ):
        check_parts({"train": {0: manifest}, "val": {}}, data)
    counted = replace(manifest, num_tokens=np.ones(2, np.uint32))
    check_parts({"train": {0: counted}}, data)
    with pytest.raises(ConfigError, match=r"with data\.packing a row is made of texts from any of its shards"):
        check_parts({"train": {0: counted}}, replace(data, packing=True))


def test_what_names_nothing_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ConfigError, match="matches no shard of the data paths"):
        held_shards(config, [f"{tmp_path}/other.txt"])
    for file in (tmp_path / "one" / "data" / "chunk").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="one' names no shard"):
        held_shards(config, [f"{tmp_path}/one"])
