"""`lerobot`: a data file that cannot be is one line that names file, episode and field."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker_proto.errors import DataError

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

import pyarrow as pa
import pyarrow.parquet as pq

from loader_service.sources.lerobot.columns import parse_rows
from loader_service.sources.lerobot.info import Feature
from loader_service.sources.lerobot.meta import Columns
from tests.loader_service.sources.lerobot.checks import (
    SHORT,
    TOP,
    data_file,
    read_all,
    refusal,
    scanned,
)
from tests.loader_service.sources.lerobot.files import change_info, change_table, write_lerobot


def nan(rows: list[list[float]]) -> list[list[float]]:
    return [*rows[:5], [*rows[5][:2], float("nan"), *rows[5][3:]], *rows[6:]]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"action": nan}, "field action[1][2]: nan"),
        ({"observation.state": nan}, "field observation.state[1][2]: nan"),
        ({"action": None}, "field action: the column is missing"),
        ({"timestamp": None}, "field timestamp: the column is missing"),
        ({"task_index": None}, "field task_index: the column is missing"),
        ({"task_index": lambda rows: [99] * len(rows)}, "field task_index[0]: task 99 has no text"),
        ({"frame_index": lambda rows: [0] * len(rows)}, "field frame_index[1]: 0"),
        ({"timestamp": lambda rows: [None, *rows[1:]]}, "field timestamp: null"),
        ({"timestamp": lambda rows: [row + 3.0 for row in rows]}, "field timestamp[0]: 3 s, and frame 0 at fps 10"),
        ({"timestamp": lambda rows: rows[:4] + rows[4:13][::-1] + rows[13:]}, "field timestamp[0]: 0.8 s, and frame 0"),
        ({"timestamp": lambda rows: [*rows[:6], rows[7], *rows[7:]]}, "field timestamp[2]: 0.3 s, and frame 2 at"),
        ({"episode_index": lambda rows: [*rows[:4], 2, *rows[5:]]}, "meta/ says"),
        (
            {"action": lambda rows: pa.array([[0.0] * 7] * 5 + [[0.0] * 3] + [[0.0] * 7] * 13)},
            "field action[1]: 3 numbers",
        ),
        ({"action": lambda rows: pa.array([None] + [[0.0] * 7] * 18)}, "field action: null"),
        ({"action": lambda rows: pa.array(["x"] * 19)}, "field action: string"),
        ({TOP: None}, f"field {TOP}: the column is missing"),
        (
            {TOP: lambda rows: [{"bytes": b"GIF89a", "path": None}, *rows[1:]]},
            f"field {TOP}[0]: an image that cannot be read",
        ),
        ({TOP: lambda rows: [{"bytes": None, "path": "../../secret"}, *rows[1:]]}, "leads outside"),
    ],
)
def test_a_table_that_cannot_be(new: Path, columns: dict[str, Any], expected: str) -> None:
    change_table(data_file(new), **columns)
    text = refusal(new)
    assert expected in text
    assert str(new) in text


def test_frames_per_second_that_are_not_those_of_the_rows(new: Path) -> None:
    """Without a camera nothing else would tell: `action_delta_timestamps` and `image_history` are counted in frames."""
    change_info(new, fps=5)
    text = refusal(new, image_keys=[])
    assert (
        "record episode 0, field timestamp[1]: 0.1 s, and frame 1 at fps 5 (meta/info.json) is at 0.2 s: correct"
        in text
    )


@pytest.mark.parametrize("fps", [5.0, 10.0, 29.97, 60.0])
def test_timestamps_are_written_as_float32_and_by_clocks(fps: float) -> None:
    num_frames = int(4 * 3600 * fps)
    frames = np.arange(num_frames)
    jitter = np.random.default_rng(0).uniform(-0.2, 0.2, num_frames) / fps
    feature = Feature("action", "float32", (1,), ())
    for seconds, is_well in ((frames / fps, True), (frames / fps + jitter, True), (frames / (fps * 1.001), False)):
        table = pa.table(
            {
                "episode_index": np.zeros(num_frames, np.int64),
                "frame_index": frames,
                "timestamp": seconds.astype(np.float32),
                "task_index": np.zeros(num_frames, np.int64),
                "action": np.zeros(num_frames, np.float32),
            }
        )
        columns = Columns((), None, feature)
        if is_well:
            assert len(parse_rows(table, columns, 0, fps).timestamps) == num_frames
        else:
            with pytest.raises(DataError, match=r"field timestamp\[251\]: "):
                parse_rows(table, columns, 0, fps)


def test_a_task_without_a_text_is_found_by_the_scan(new: Path) -> None:
    change_table(data_file(new), task_index=lambda rows: [*rows[:4], *[99] * 9, *rows[13:]])
    assert [record.error is not None for record in scanned(new)] == [False, True, False]


def test_an_episode_that_goes_on_in_another_ones_rows(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "set", SHORT, videos=(), rows_per_data_file=11)
    change_table(sorted(root.glob("data/*/*"))[1], episode_index=lambda rows: [7, *rows[1:]])
    assert "record episode 1, field episode_index: a row of episode 7 among its rows" in refusal(root)
    sorted(root.glob("data/*/*"))[1].rename(root / "moved.parquet")
    assert [record.error is not None for record in scanned(root, episodes="0-1")] == [False, True]


def test_nothing_of_a_chosen_camera_is_read_of_the_others(new: Path) -> None:
    change_table(data_file(new), **{TOP: None})
    shutil.rmtree(new / "videos")
    assert read_all(new, image_keys=[]) == sum(SHORT)


@pytest.mark.parametrize("named", ["old", "new"])
@pytest.mark.parametrize("damage", ["cut", "empty", "html"])
def test_a_parquet_that_is_damaged(damage: str, named: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(named)
    file = data_file(root)
    content = {"cut": file.read_bytes()[:-100], "empty": b"", "html": b"<html>not found</html>"}[damage]
    file.write_bytes(content)
    assert f"{file}: unreadable parquet" in refusal(root)
    bad = [record for record in scanned(root) if record.error]
    assert [record.num_samples for record in bad] == ([9] if named == "old" else list(SHORT))
    assert len(scanned(root)) == len(SHORT)
    if named == "new":
        assert [record.offset for record in bad] == [0, 4, 13]


def test_flipped_bytes_of_a_parquet_end_in_one_error_or_none(new: Path) -> None:
    """No exception but ours, whatever the bytes say."""
    file = data_file(new)
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    caught = []
    for _ in range(60):
        content = bytearray(whole)
        for at in random.integers(0, len(content), 20):
            content[at] ^= 1 << int(random.integers(8))
        file.write_bytes(content)
        try:
            read_all(new, image_keys=[TOP])
        except DataError as error:
            caught.append(str(error))
    assert len(caught) > 20
    assert not any("\n" in text for text in caught)


def test_an_image_of_another_size(new: Path, tmp_path: Path) -> None:
    other = write_lerobot(tmp_path / "other", SHORT, videos=[], images=[TOP], size=(32, 32), rows_per_data_file=1000)
    cells = pq.read_table(data_file(other), partitioning=None).column(TOP).to_pylist()
    change_table(data_file(new), **{TOP: lambda rows: [*rows[:6], *cells[6:]]})
    assert f"record episode 1, field {TOP}[2]: 32x32 pixels (height x width) of mode RGB" in refusal(new)
