"""Small demonstrations on disk: a JSONL file with NPZ files beside it."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from loader_service.sources.base import BaseSFTDataset, Sample, make_dataset
from loader_service.sources.mani_openpi import ManiOpenPIDataset
from loader_service.sources.tables.dataset import TableDataset
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


@pytest.fixture
def make_tables() -> Callable[..., TableDataset]:
    """`make_tables("chat", learn="last", on_bad_sample="skip")`: a dataset; what is no key of `data` is one of its options."""

    def make(dataset_type: str, **keys: Any) -> TableDataset:
        named = {field.name for field in fields(DataConfig)}
        data = {"max_seq_len": 64, **{key: value for key, value in keys.items() if key in named}}
        options = {key: value for key, value in keys.items() if key not in named}
        dataset = make_dataset(
            DataConfig(dataset_type=dataset_type, train_data_paths=("unused",), options=options, **data)
        )
        assert isinstance(dataset, TableDataset)
        return dataset

    return make


def read_all(dataset: BaseSFTDataset, shard: Path) -> list[Sample]:
    """What a loader gets of a shard, its parts cut small; records with an error are left out."""
    cuts = dataset.cut(shard, 200)
    records = [record for start, stop in itertools.pairwise(cuts) for record in dataset.scan_part(shard, start, stop)]
    samples = []
    for record in records:
        if record.error is None:
            found = list(dataset.read(shard, record.offset, record.size))
            assert len(found) == record.num_samples
            samples += found
    return samples


@pytest.fixture
def read_shard() -> Callable[[BaseSFTDataset, Path], list[Sample]]:
    """`read_all`, for the tests."""
    return read_all


@pytest.fixture
def write_table(tmp_path: Path) -> Callable[..., Path]:
    """`write_table("a.jsonl.gz", rows)`: the rows in the container that the name says."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = Path(name).with_suffix("") if path.suffix in (".gz", ".zst") else Path(name)
        if plain.suffix == ".parquet":
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
            content = sink.getvalue()
        elif plain.suffix == ".json":
            content = json.dumps(rows, indent=1, ensure_ascii=False).encode()
        else:
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        packers: dict[str, Callable[[bytes], bytes]] = {
            ".gz": gzip.compress,
            ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
        }
        path.write_bytes(packers.get(path.suffix, bytes)(content))
        return path

    return write


@pytest.fixture(scope="session")
def written_lerobot(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LeRobot data set of each version, with a video camera and an image camera; copy before you change it."""
    from tests.loader_service.sources.lerobot.checks import FRONT, SHORT, TOP  # they need libraries that may be missing
    from tests.loader_service.sources.lerobot.files import write_lerobot

    folder = tmp_path_factory.mktemp("lerobot")
    return {
        version: write_lerobot(
            folder / version, SHORT, version=version, videos=[FRONT], images=[TOP], rows_per_data_file=1000
        )
        for version in ("v2.1", "v3.0")
    }


@pytest.fixture
def old(written_lerobot: dict[str, Path], tmp_path: Path) -> Path:
    """One of v2.1, to be damaged."""
    return Path(shutil.copytree(written_lerobot["v2.1"], tmp_path / "old"))


@pytest.fixture
def new(written_lerobot: dict[str, Path], tmp_path: Path) -> Path:
    """The same of v3.0."""
    return Path(shutil.copytree(written_lerobot["v3.0"], tmp_path / "new"))
