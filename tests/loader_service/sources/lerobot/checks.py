"""What the tests of LeRobot data sets share: reading all of one, and being refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.sources.base import Sample, ScannedRecord
from loader_service.sources.lerobot.dataset import LeRobotDataset
from stoker_proto.config import ActionConfig, DataConfig
from stoker_proto.errors import DataError, StokerError
from tests.loader_service.sources.lerobot.reference import reference

LENGTHS = (4, 9, 1, 12, 6)
"""Frames of the episodes of most data sets here."""
SHORT = (4, 9, 6)
"""Of the ones that are damaged."""
VERSIONS = ("v2.1", "v3.0")
FRONT, WRIST, TOP = "observation.images.front", "observation.images.wrist", "observation.images.top"


def data_config(
    *paths: Path,
    chunk: int = 1,
    drop_noops: bool = False,
    on_bad_sample: str = "fail",
    val: Sequence[Path] = (),
    state: str = "text",
    **options: Any,
) -> DataConfig:
    return DataConfig(
        dataset_type="lerobot",
        train_data_paths=tuple(map(str, paths)),
        val_data_paths=tuple(map(str, val)),
        max_seq_len=64,
        on_bad_sample=on_bad_sample,  # type: ignore[arg-type]
        action=ActionConfig(chunk=chunk, drop_noops=drop_noops),
        state=state,  # type: ignore[arg-type]
        options=options,
    )


def records(dataset: LeRobotDataset, path: Path) -> list[tuple[int, list[Sample]]]:
    """Of every record of the entry, in order: number of samples that the scan said, and what read gives."""
    found = []
    for shard in dataset.locate(str(path)).paths:
        for record in dataset.scan(shard):
            assert record.error is None
            found.append((record.num_samples, list(dataset.read(shard, record.offset, record.size))))
            if dataset.options.action_delta_timestamps is None:
                first = [sample.action[0] for sample in found[-1][1] if sample.action is not None]
                np.testing.assert_array_equal(record.actions, first)
    return found


def samples(path: Path, **keys: Any) -> list[Sample]:
    dataset = LeRobotDataset(data_config(path, **keys))
    return [sample for _, of_record in records(dataset, path) for sample in of_record]


def assert_equal(found: Sequence[Sample], root: Path, keys: Sequence[str]) -> int:
    count = 0
    for sample, expected in itertools.zip_longest(found, reference(root)):
        assert sample.instruction == expected["task"]
        assert sample.timestep == expected["timestep"]
        assert sample.state.dtype == sample.action.dtype == np.float32
        np.testing.assert_array_equal(sample.state, expected["state"])
        np.testing.assert_array_equal(sample.action, expected["action"][None])
        assert len(sample.images) == len(keys)
        for image, key in zip(sample.images, keys, strict=True):
            assert image.dtype == np.uint8
            assert image.flags["C_CONTIGUOUS"]
            np.testing.assert_array_equal(image, expected["images"][key])
        count += 1
    return count


def read_all(root: Path, **keys: Any) -> int:
    dataset = LeRobotDataset(data_config(root, **keys))
    places = [(shard, r.offset, r.size) for shard in dataset.locate(str(root)).paths for r in dataset.scan(shard)]
    return sum(1 for place in places for _ in dataset.read(*place))


def refusal(root: Path, kind: type[StokerError] = DataError, **keys: Any) -> str:
    with pytest.raises(kind) as caught:
        read_all(root, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def scanned(root: Path, **options: Any) -> list[ScannedRecord]:
    dataset = LeRobotDataset(data_config(root, on_bad_sample="skip", **options))
    return [record for shard in dataset.locate(str(root)).paths for record in dataset.scan(shard)]


def data_file(root: Path) -> Path:
    """The data file of episode 1."""
    return sorted(root.glob("data/*/*"))[1 if (root / "meta/episodes.jsonl").exists() else 0]


def video(root: Path) -> Path:
    return sorted(root.glob("videos/**/*.mp4"))[0]
