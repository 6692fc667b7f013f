"""`lerobot`: what is not asked for is not read, so it cannot refuse the data; index columns as pandas may leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

import pyarrow as pa
import pyarrow.parquet as pq

from loader_service.sources.base import Sample
from tests.loader_service.sources.lerobot.checks import FRONT, SHORT, TOP, refusal, samples
from tests.loader_service.sources.lerobot.files import change_info, change_table

TASK_TEXTS = ["put carrot on plate"] * 4 + ["flip pot upright"] * 9 + ["turn lever"] * 6
STATE = "observation.state"


def every_data_file(root: Path, **columns: Any) -> None:
    for file in sorted(root.glob("data/*/*")):
        change_table(file, **columns)


def same_but_for_states(found: list[Sample], expected: list[Sample]) -> None:
    assert len(found) == len(expected) == sum(SHORT)
    for sample, other in zip(found, expected, strict=True):
        assert sample.state is None
        assert (sample.timestep, sample.instruction) == (other.timestep, other.instruction)
        np.testing.assert_array_equal(sample.action, other.action)
        for image, right in zip(sample.images, other.images, strict=True):
            np.testing.assert_array_equal(image, right)


@pytest.fixture(params=["v2.1", "v3.0"])
def root(request: pytest.FixtureRequest) -> Path:
    """A data set of each version, to be damaged."""
    return Path(request.getfixturevalue("old" if request.param == "v2.1" else "new"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("state", "named"),
    [
        (lambda rows: [[float("nan")] * 5 for _ in rows], "nan is not a finite"),
        (lambda rows: pa.array([None for _ in rows], pa.list_(pa.float32())), "null: a vector"),
        (lambda rows: pa.array(["broken" for _ in rows]), "string: a list of 5"),
        (None, "the column is missing"),
    ],
)
def test_states_matter_only_where_they_are_read(root: Path, state: Callable[..., Any] | None, named: str) -> None:
    expected = samples(root)
    every_data_file(root, **{STATE: state})
    same_but_for_states(samples(root, state="none"), expected)
    assert named in refusal(root)
    assert named in refusal(root, state="none", state_key=STATE)


@pytest.mark.long
@pytest.mark.parametrize("shape", [[0], [5, 5], "five"])
def test_a_state_that_is_described_wrongly_matters_only_where_it_is_read(root: Path, shape: Any) -> None:
    expected = samples(root)
    change_info(root, features=lambda old: {**old, STATE: {"dtype": "float32", "shape": shape}})
    same_but_for_states(samples(root, state="none"), expected)
    assert f"features[{STATE}]" in refusal(root)


@pytest.mark.long
@pytest.mark.parametrize("wrong", ["missing", "empty", "nonsense"])
def test_the_table_of_tasks_is_not_read_where_the_instruction_is_set(root: Path, wrong: str) -> None:
    file = next(root.glob("meta/tasks.*"))
    if wrong == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if wrong == "empty" else b"nonsense")
    every_data_file(root, task_index=None)
    found = samples(root, instruction="wipe the table")
    assert [sample.instruction for sample in found] == ["wipe the table"] * sum(SHORT)
    assert "task" in refusal(root)


@pytest.mark.long
@pytest.mark.parametrize(
    "feature",
    [
        {"dtype": "language", "shape": [1]},
        {"dtype": "float99", "shape": [0, 3]},
        {"dtype": "float32", "shape": [0, 3]},
        {"dtype": "float32", "shape": None},
        {"dtype": None},
        "a note",
    ],
)
def test_features_that_nobody_asked_for(root: Path, feature: Any) -> None:
    expected = samples(root)
    change_info(root, features=lambda old: {**old, "annotation": feature})
    found = samples(root)
    assert [sample.instruction for sample in found] == TASK_TEXTS
    for sample, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(sample.state, other.state)
        assert len(sample.images) == 2
    assert "annotation" in refusal(root, action_key="annotation")


@pytest.mark.long
@pytest.mark.parametrize(
    "feature", [{"dtype": "hologram", "shape": [64, 96, 3]}, {"dtype": "video", "shape": [0, 3]}, {"dtype": "video"}]
)
def test_a_camera_that_cannot_be_read_is_left_out_only_by_name(root: Path, feature: Any) -> None:
    expected = samples(root, image_keys=[TOP])
    change_info(root, features=lambda old: {**old, FRONT: feature})
    assert f"features[{FRONT}]" in refusal(root), "by default all cameras are read"
    if (root / "meta/episodes").is_dir():  # nothing else of that camera is there either
        file = next(root.glob("meta/episodes/*/*"))
        table = pq.read_table(file, partitioning=None)
        pq.write_table(table.drop_columns([n for n in table.column_names if n.startswith(f"videos/{FRONT}/")]), file)
    found = samples(root, image_keys=[TOP])
    assert len(found) == sum(SHORT)
    for sample, other in zip(found, expected, strict=True):
        [image], [right] = sample.images, other.images
        np.testing.assert_array_equal(image, right)


@pytest.mark.long
def test_whole_numbers_written_as_floating_point(root: Path) -> None:
    expected = samples(root)
    names = ("episode_index", "frame_index", "task_index")
    every_data_file(root, **{name: lambda rows: pa.array([float(row) for row in rows]) for name in names})
    if (root / "meta/tasks.parquet").exists():
        change_table(root / "meta/tasks.parquet", task_index=lambda rows: pa.array([float(row) for row in rows]))
        names = ("episode_index", "length", "data/chunk_index", "data/file_index", f"videos/{FRONT}/file_index")
        change = {name: lambda rows: pa.array([float(row) for row in rows]) for name in names}
        change_table(next(root.glob("meta/episodes/*/*")), **change)
    else:
        for file in (root / "meta/tasks.jsonl", root / "meta/episodes.jsonl"):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            rows = [{key: float(value) if type(value) is int else value for key, value in row.items()} for row in rows]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = samples(root)
    assert [sample.instruction for sample in found] == TASK_TEXTS
    for sample, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(sample.action, other.action)
        np.testing.assert_array_equal(sample.images[0], other.images[0])


@pytest.mark.long
@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_whole_are_no_index(root: Path, value: float) -> None:
    every_data_file(root, frame_index=lambda rows: pa.array([value, *(float(row) for row in rows[1:])]))
    assert "field frame_index: double: whole numbers" in refusal(root).replace("float64", "double")
