"""Preparing LeRobot data sets: the index in meta/ is part of what identifies a scan, and each split has its own episodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.prepare import entry, scan_pool
from loader_service.prepare.fit import train_actions
from loader_service.prepare.run import ScanOptions, prepare
from loader_service.sources.base import make_dataset
from loader_service.sources.lerobot import scan
from stoker_proto.config import Config
from stoker_proto.errors import DataError

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

from tests.loader_service.sources.lerobot.files import change_info, change_table, write_lerobot
from tests.loader_service.sources.lerobot.reference import reference

MakeConfig = Callable[..., Config]
LENGTHS = (4, 9, 1, 12, 6)


@pytest.fixture(params=["v2.1", "v3.0"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_lerobot(tmp_path / "set", LENGTHS, version=request.param, videos=())


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the data files that were looked through."""
    names: list[str] = []

    def spy(shard: Path, *arguments: Any) -> Any:
        names.append(shard.name)
        return scan.scan_shard(shard, *arguments)

    monkeypatch.setattr("loader_service.sources.lerobot.dataset.scan_shard", spy)
    return names


@pytest.mark.long
def test_records_are_episodes_and_the_fit_sees_their_actions(root: Path, make_config: MakeConfig) -> None:
    prepared = prepare(make_config(root, dataset_type="lerobot"))
    found = prepared.entries["train"][0]
    assert found.num_samples.tolist() == list(LENGTHS)
    assert found.statistics is not None
    actions = np.stack([row["action"] for row in reference(root)])
    np.testing.assert_allclose(found.statistics.mean, actions.mean(axis=0), atol=1e-6)
    assert found.statistics.count == sum(LENGTHS)
    assert (root / ".stoker").is_dir()


@pytest.mark.process
@pytest.mark.parametrize("root", ["v2.1"], indirect=True)
def test_other_processes_scan_the_same(root: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(root, val=[root], dataset_type="lerobot", options={"episodes": "0-2", "val_episodes": "3-4"})
    here = prepare(config)
    monkeypatch.setattr(scan_pool, "MIN_POOL_BYTES", 0)
    monkeypatch.setattr(entry, "FORMAT_VERSION", -1)  # nothing of the cache counts
    there = prepare(config, scan=ScanOptions(processes=2))
    for split in ("train", "val"):
        a, b = here.entries[split][0], there.entries[split][0]
        assert (a.num_samples.tolist(), a.offsets.tolist()) == (b.num_samples.tolist(), b.offsets.tolist())


@pytest.mark.long
def test_splits_share_a_folder_and_no_episode(root: Path, make_config: MakeConfig) -> None:
    options = {"episodes": ["0-1", 4], "val_episodes": [2, 3]}
    prepared = prepare(make_config(root, val=[root], dataset_type="lerobot", options=options))
    assert prepared.entries["train"][0].num_samples.tolist() == [4, 9, 6]
    assert prepared.entries["val"][0].num_samples.tolist() == [1, 12]
    actions = np.stack([row["action"] for row in reference(root) if row["episode"] in (0, 1, 4)])
    assert prepared.statistics is not None
    np.testing.assert_allclose(prepared.statistics.mean, actions.mean(axis=0), atol=1e-6)


def test_published_statistics_are_those_of_the_action_key(root: Path, make_config: MakeConfig) -> None:
    key = "observation.state"
    dim = json.loads((root / "meta/info.json").read_text())["features"][key]["shape"][0]
    numbers = {name: [value] * dim for name, value in {"mean": 0, "std": 1, "min": -9, "max": 9, "q01": -8}.items()}
    stats = {"action": {**numbers, "q99": [4] * dim}, key: {**numbers, "q99": [8] * dim}}
    path = root.parent / "stats.json"
    path.write_text(json.dumps(stats))
    action = {"statistics_path": str(path)}
    codec = prepare(make_config(root, dataset_type="lerobot", options={"action_key": key}, action=action)).codec
    assert codec is not None
    assert codec.statistics.q99.tolist() == [8] * dim


@pytest.mark.long
def test_a_codec_of_chunks_is_fitted_on_those_that_are_read(root: Path, make_config: MakeConfig) -> None:
    for deltas in (None, [-0.2, -0.1, 0, 0.2], [0.1, 0.2, 0.3, 0.4]):
        options: dict[str, Any] = {"image_keys": []} | ({} if deltas is None else {"action_delta_timestamps": deltas})
        config = make_config(
            root, dataset_type="lerobot", options=options, action={"codec": "fast", "chunk": 4}, max_seq_len=999
        )
        [manifest] = prepare(config).entries["train"].values()
        _, fitted = train_actions([manifest], config.data.action)
        dataset = make_dataset(config.data)
        read = [
            sample.action
            for shard in dataset.locate(str(root)).paths
            for record in dataset.scan(shard)
            for sample in dataset.read(shard, record.offset, record.size)
        ]
        assert len(fitted) == len(read) == sum(LENGTHS)
        assert {chunk.tobytes() for chunk in fitted} == {chunk.tobytes() for chunk in read if chunk is not None}


def change_tasks(root: Path) -> None:
    if (root / "meta/tasks.jsonl").exists():
        file = root / "meta/tasks.jsonl"
        file.write_text(file.read_text().replace("carrot", "potato"))
    else:
        new = ["put potato on plate", "flip pot upright", "turn lever"]
        change_table(root / "meta/tasks.parquet", __index_level_0__=lambda rows: new)


def change_fps(root: Path) -> None:
    change_info(root, fps=10.1)


def swap_video_places(root: Path) -> None:
    """What only `read` uses: the scan must be another one all the same."""
    change_info(root, video_path="elsewhere/{video_key}.mp4")


@pytest.mark.long
@pytest.mark.parametrize("change", [change_tasks, change_fps, swap_video_places])
def test_a_change_of_the_index_makes_another_scan(
    root: Path, make_config: MakeConfig, scans: list[str], change: Callable[[Path], None]
) -> None:
    config = make_config(root, dataset_type="lerobot")
    first = prepare(config).entries["train"][0]
    before = len(scans)
    assert before == len(first.shards)
    assert prepare(config).entries["train"][0].fingerprint == first.fingerprint
    assert len(scans) == before
    change(root)
    second = prepare(config).entries["train"][0]
    assert len(scans) == 2 * before
    assert second.fingerprint != first.fingerprint


def test_a_copy_elsewhere_has_the_same_fingerprint(tmp_path: Path, make_config: MakeConfig) -> None:
    roots = [write_lerobot(tmp_path / name, LENGTHS, videos=()) for name in ("a", "b")]
    a, b = (prepare(make_config(root, dataset_type="lerobot")).entries["train"][0] for root in roots)
    assert a.fingerprint == b.fingerprint


def test_an_episode_that_was_added_is_found(tmp_path: Path, make_config: MakeConfig) -> None:
    root = write_lerobot(tmp_path / "set", [3, 4], version="v2.1", videos=())
    more = write_lerobot(tmp_path / "more", [3, 4, 5], version="v2.1", videos=())
    config = make_config(root, dataset_type="lerobot")
    assert prepare(config).entries["train"][0].num_samples.tolist() == [3, 4]
    name = "data/chunk-001/episode_000002.parquet"
    (root / name).parent.mkdir()
    (more / name).rename(root / name)
    with (root / "meta/episodes.jsonl").open("a") as file:
        file.write(json.dumps({"episode_index": 2, "tasks": [], "length": 5}) + "\n")
    assert prepare(config).entries["train"][0].num_samples.tolist() == [3, 4, 5]


def test_bad_episodes_are_counted_under_policy_skip(root: Path, make_config: MakeConfig) -> None:
    file = sorted(root.glob("data/*/*"))[0]
    change_table(file, action=lambda rows: [[float("nan")] * 7, *rows[1:]])
    with pytest.raises(DataError, match=r"record episode 0, field action\[0\]\[0\]: nan"):
        prepare(make_config(root, dataset_type="lerobot"))
    found = prepare(make_config(root, dataset_type="lerobot", on_bad_sample="skip")).entries["train"][0]
    assert (found.num_bad, found.num_samples.tolist()) == (1, list(LENGTHS))
    assert found.statistics is not None
    assert found.statistics.count == sum(LENGTHS) - 4
