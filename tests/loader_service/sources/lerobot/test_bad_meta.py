"""`lerobot`: an index or options that cannot be are one line that names file, field and the way out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loader_service.sources.lerobot.dataset import LeRobotDataset
from stoker_proto.config import ActionConfig, ImageConfig
from stoker_proto.errors import ConfigError, DataError

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

import pyarrow as pa
import pyarrow.parquet as pq

from tests.loader_service.sources.lerobot.checks import (
    FRONT,
    SHORT,
    TOP,
    WRIST,
    data_config,
    read_all,
    refusal,
)
from tests.loader_service.sources.lerobot.files import change_info, change_table, write_lerobot


def feature(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Change one feature of info.json: `feature(key=..., dtype=...)`."""
    key = changes.pop("key")
    return lambda features: {**features, key: {**features.get(key, {}), **changes}}


def test_the_data_sets_are_good(old: Path, new: Path) -> None:
    assert read_all(old) == read_all(new) == sum(SHORT)


@pytest.mark.parametrize(("version", "named"), [("v3.0", "old"), ("v2.1", "new")])
def test_a_half_converted_data_set(version: str, named: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(named)
    change_info(root, codebase_version=version)
    text = refusal(root)
    assert f"meta/info.json: field codebase_version: '{version}'" in text
    assert "half converted" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"codebase_version": "v1.6"}, "field codebase_version: 'v1.6'"),
        ({"fps": 0}, "field fps: 0"),
        ({"fps": None}, "field fps: None"),
        ({"features": {}}, "field features"),
        ({"features": feature(key=FRONT, dtype="hologram")}, f"features[{FRONT}].dtype: unknown dtype 'hologram'"),
        ({"features": feature(key="action", dtype="float99")}, "features[action].dtype: unknown dtype 'float99'"),
        ({"features": feature(key=FRONT, shape=[64, 96, 1])}, f"features[{FRONT}].shape: shape [64, 96, 1]"),
        ({"features": feature(key="action", shape=[7, 2])}, "features[action]: dtype float32 of shape [7, 2]"),
        ({"features": feature(key="action", shape=[6])}, "field action[0]: 7 numbers, and info.json says 6"),
        ({"data_path": "../{chunk_index}/{file_index}.parquet"}, "field data_path: '../"),
        ({"data_path": "/data/{chunk_index}/{file_index}.parquet"}, "leads out of the data set's folder"),
        ({"data_path": "data/{chunk_index.__class__}/{file_index}"}, "field data_path"),
        ({"data_path": "data/{chunk_index:999999999d}/{file_index}"}, "field data_path"),
        ({"data_path": "data/{chunk_index!r}/{file_index}"}, "field data_path"),
        ({"data_path": "data/{root}/{file_index}"}, "unknown field {root}"),
        ({"data_path": 3}, "field data_path: 3"),
        ({"video_path": "videos/{video_key}/../../../../{file_index}.mp4"}, "field video_path"),
        ({"video_path": "videos/{video_key[0]}/{file_index}.mp4"}, "field video_path"),
        ({"video_path": None}, "field video_path: null"),
        ({"video_path": "nowhere/{video_key}/{file_index}.mp4"}, "is missing"),
        (
            {"data_path": "nowhere/{file_index}.parquet"},
            "nowhere/0.parquet: record 0: meta/ names it, and it is missing",
        ),
    ],
)
def test_info_that_cannot_be(new: Path, changes: dict[str, Any], expected: str) -> None:
    change_info(new, **changes)
    assert expected in refusal(new)


def test_a_camera_named_like_a_way_out(new: Path) -> None:
    (new.parent / "secret.mp4").write_bytes(b"")
    camera = {"dtype": "video", "shape": [64, 96, 3]}
    change_info(new, video_path="videos/{video_key}.mp4", features=lambda old: {**old, "../../secret": camera})
    file = next(new.glob("meta/episodes/*/*"))
    table = pq.read_table(file, partitioning=None)
    for name in ("chunk_index", "file_index", "from_timestamp"):
        table = table.append_column(f"videos/../../secret/{name}", pa.array([0] * len(SHORT)))
    pq.write_table(table, file)
    assert "leads outside" in refusal(new, image_keys=["../../secret"])


@pytest.mark.parametrize("name", ["meta/info.json", "data/*/*", "videos/**/*.mp4", "meta/tasks.*", "meta/episodes*"])
@pytest.mark.parametrize("named", ["old", "new"])
def test_git_lfs_pointers(named: str, name: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(named)
    file = next(path for found in sorted(root.glob(name)) for path in [found, *found.rglob("*")] if path.is_file())
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    text = refusal(root)
    assert str(file) in text
    assert "a Git LFS pointer, not the file itself: run `git lfs pull`" in text


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_info_that_is_no_json_object(new: Path, content: bytes) -> None:
    (new / "meta/info.json").write_bytes(content)
    assert "meta/info.json: " in refusal(new)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: [{**row, "length": 0} for row in rows], "record 0, field length: 0"),
        (lambda rows: [{**row, "length": row["length"] + 1} for row in rows], "record episode 0"),
        (lambda rows: [rows[0], rows[0], rows[2]], "record 0: it stands there twice"),
        (lambda rows: [{**row, f"videos/{FRONT}/from_timestamp": float("nan")} for row in rows], "from_timestamp: nan"),
        (lambda rows: [{**row, "data/file_index": None} for row in rows], "field data/file_index"),
        (
            lambda rows: [{k: v for k, v in row.items() if k != "length"} for row in rows],
            "length: the column is missing",
        ),
        (lambda rows: [{**row, "data/file_index": i} for i, row in enumerate(rows)], "it is missing"),
    ],
)
def test_a_table_of_episodes_that_cannot_be(new: Path, change: Any, expected: str) -> None:
    file = next(new.glob("meta/episodes/*/*"))
    pq.write_table(pa.Table.from_pylist(change(pq.read_table(file, partitioning=None).to_pylist())), file)
    assert expected in refusal(new)


def test_lines_of_the_old_index_that_cannot_be(old: Path) -> None:
    for name, content, expected in (
        ("episodes.jsonl", '{"episode_index": 0, "length": "4"}\n', "episodes.jsonl:1: field length: '4'"),
        ("episodes.jsonl", "nonsense\n", "episodes.jsonl:1: unreadable JSON"),
        ("tasks.jsonl", '{"task_index": "0", "task": "x"}\n', "tasks.jsonl: record 0, field task_index: '0'"),
        (
            "tasks.jsonl",
            '{"task_index": 0, "task": "push \\ud800"}\n',
            "tasks.jsonl:1: unreadable JSON (no low surrogate in string",
        ),
    ):
        file = old / "meta" / name
        before = file.read_text()
        file.write_text(content)
        assert expected in refusal(old)
        file.write_text(before)


def test_tasks_out_of_order_are_refused_as_lerobot_goes_by_the_row(new: Path) -> None:
    change_table(new / "meta/tasks.parquet", task_index=lambda rows: rows[::-1])
    assert "meta/tasks.parquet: record 0, field task_index: 2 in row 0" in refusal(new)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image_key": ["x"]}, "data.options.image_key: unknown option; did you mean image_keys?"),
        ({"image_keys": [3]}, "data.options.image_keys is [3]"),
        ({"image_keys": [FRONT, FRONT]}, "named twice"),
        ({"episodes": ["3-1"]}, "data.options.episodes: '3-1'"),
        ({"episodes": [True]}, "data.options.episodes: True"),
        ({"episodes": []}, "data.options.episodes is empty"),
        ({"episodes": [0, "2-7"]}, "data.options.episodes names 2-7"),
        ({"image_history": [0, -0.1]}, "data.options.image_history is [0, -0.1]"),
        ({"image_history": [0.1]}, "data.options.image_history is [0.1]"),
        ({"image_history": [-0.15, 0]}, "data.options.image_history: -0.15 s is no multiple of 1/fps = 0.1 s"),
        ({"action_delta_timestamps": [0, 0.1]}, "data.options.action_delta_timestamps has 2 moments"),
        ({"action_delta_timestamps": [0.05]}, "data.options.action_delta_timestamps: 0.05 s is no multiple"),
        ({"instruction": " "}, "data.options.instruction is ' '"),
    ],
)
def test_options_that_cannot_be(new: Path, options: dict[str, Any], expected: str) -> None:
    assert expected in refusal(new, ConfigError, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"image_keys": ["observation.images.left"]},
            "no feature 'observation.images.left'; there are observation.state",
        ),
        ({"image_keys": ["action"]}, "features[action].dtype: dtype float32: no camera"),
        ({"state_key": "proprio"}, "no feature 'proprio'"),
        ({"action_key": TOP}, f"features[{TOP}]: dtype image of shape [64, 96, 3]: a vector of numbers is expected"),
    ],
)
def test_features_that_are_not_there(new: Path, options: dict[str, Any], expected: str) -> None:
    assert expected in refusal(new, **options)


def test_settings_that_do_not_go_together(new: Path) -> None:
    base = data_config(new)
    with pytest.raises(ConfigError, match=r"data\.image\.depth"):
        LeRobotDataset(dataclasses.replace(base, image=ImageConfig(depth=True)))
    noops = ActionConfig(drop_noops=True)
    with pytest.raises(ConfigError, match="drop_noops"):
        LeRobotDataset(dataclasses.replace(base, action=noops, options={"action_delta_timestamps": [0]}))
    dataset = LeRobotDataset(dataclasses.replace(base, action=noops, options={"action_key": "observation.state"}))
    with pytest.raises(DataError, match=r"5 numbers, and data\.action.drop_noops is defined for 7"):
        list(dataset.scan(dataset.locate(str(new)).paths[0]))


def test_data_files_that_a_template_gives_one_name_are_one_file(old: Path) -> None:
    """Each episode is found by its rows, not by its place in the template."""
    tables = [pq.read_table(file, partitioning=None) for file in sorted(old.glob("data/*/*"))]
    pq.write_table(pa.concat_tables(tables), old / "data/all.parquet")
    change_info(old, data_path="data/all.parquet")
    dataset = LeRobotDataset(data_config(old))
    [shard] = dataset.locate(str(old)).paths
    assert [record.num_samples for record in dataset.scan(shard)] == list(SHORT)
    assert read_all(old) == sum(SHORT)


@pytest.mark.parametrize(
    ("version", "template", "expected"),
    [
        ("v3.0", "videos/{chunk_index}-{file_index}.mp4", f"for {FRONT} chunk 0 file 0 and for {WRIST} chunk 0 file 0"),
        ("v3.0", "videos/{video_key}/{chunk_index}.mp4", f"for {FRONT} chunk 0 file 0 and for {FRONT} chunk 0 file 1"),
        ("v2.1", "videos/{video_key}.mp4", f"for {FRONT} episode 0 and for {FRONT} episode 1"),
    ],
)
def test_videos_that_a_template_gives_one_name(tmp_path: Path, version: str, template: str, expected: str) -> None:
    """One camera would be shown as two, or one episode as all."""
    root = write_lerobot(tmp_path / "set", SHORT, version=version, videos=(FRONT, WRIST), codec=None)
    change_info(root, video_path=template)
    text = refusal(root)
    assert f"field video_path: '{template}' gives videos/" in text
    assert expected in text


@pytest.mark.parametrize("value", [float("inf"), 1e300])
def test_a_moment_that_no_video_has(new: Path, value: float) -> None:
    file = next(new.glob("meta/episodes/*/*"))
    change_table(file, **{f"videos/{FRONT}/from_timestamp": lambda old: [*old[:-1], value]})
    assert f"field videos/{FRONT}/from_timestamp: {value}" in refusal(new)


def test_a_link_to_a_data_set_that_is_not_here(new: Path) -> None:
    folder = new.parent / "robots"
    folder.mkdir()
    new.rename(folder / "bridge")
    for name in ("fractal", ".hidden"):
        (folder / name).symlink_to(new.parent / "unmounted" / name)
    for path in (folder, folder / "*"):
        found = LeRobotDataset(data_config(folder)).locate(str(path))
        assert len(found.paths) == 1
        assert found.broken == (folder / "fractal",)
    assert LeRobotDataset(data_config(folder)).locate(str(folder / "bridge")).broken == ()
