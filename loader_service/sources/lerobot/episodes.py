"""The tables of episodes and of tasks, of both versions.

v2.1, `meta/episodes.jsonl` and `meta/tasks.jsonl`, a line each:

    {"episode_index": 0, "tasks": ["put carrot on plate"], "length": 10}      {"task_index": 0, "task": "put carrot on plate"}

v3.0, `meta/episodes/chunk-000/file-000.parquet` and `meta/tasks.parquet`, a row each:

    episode_index 0, length 10, data/chunk_index 0, data/file_index 0,
    videos/<camera>/chunk_index 0, videos/<camera>/file_index 0, videos/<camera>/from_timestamp 0.0
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from loader_service.sources.lerobot.info import Info
from loader_service.sources.lfs import refuse_pointer
from loader_service.sources.parquet import ParquetReader
from stoker_proto.errors import DataError, located
from stoker_proto.host.trouble import check_host

_TASK_COLUMNS = ("task", "__index_level_0__")
_LARGEST = 1 << 40
"""Of an index, a length or a time in seconds; sums of some millions of them fit into int64."""
_MAX_GAP = 1e9  # frames between two episodes of a video; more is a wrong from_timestamp


@dataclass(frozen=True, slots=True)
class VideoPlaces:
    """Where a camera's frames of each episode lie. E episodes."""

    chunk: NDArray[np.int64]  # [E]
    file: NDArray[np.int64]  # [E]; in v2.1 the episode's index
    from_timestamp: NDArray[np.float64]  # [E], seconds from the file's first frame on
    frames_before: NDArray[np.int64]  # [E], of the episodes that begin before it in its file
    frames_in_file: NDArray[np.int64]  # [E], of all episodes in its file
    frames_before_with_gaps: NDArray[np.int64]  # [E], and whole frames between them, by their from_timestamps


@dataclass(frozen=True, slots=True)
class EpisodeTable:
    """All episodes, by index. E episodes."""

    index: NDArray[np.int64]  # [E], rising
    length: NDArray[np.int64]  # [E], frames
    data_chunk: NDArray[np.int64]  # [E]
    data_file: NDArray[np.int64]  # [E]; in v2.1 the episode's index
    videos: dict[str, VideoPlaces]

    def row_of(self, episode: int) -> int:
        """Raises DataError for an episode that the table does not have."""
        row = int(np.searchsorted(self.index, episode))
        if row == len(self.index) or self.index[row] != episode:
            raise DataError("the table of episodes in meta/ does not have it", record=str(episode))
        return row


def load_episodes(info: Info, cameras: list[str]) -> EpisodeTable:
    """cameras: the video features that are read. Raises DataError naming the file, the episode and the column."""
    columns = _v3_columns(info.root, cameras) if info.is_v3 else _v2_columns(info, cameras)
    file = str(info.root / ("meta/episodes" if info.is_v3 else "meta/episodes.jsonl"))
    order = np.argsort(columns["episode_index"], kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    index = columns["episode_index"]
    _check(len(index) > 0, "no episode", file)
    for name, column in columns.items():
        least = 1 if name == "length" else 0
        wrong = np.flatnonzero(~((column >= least) & (column <= _LARGEST)))  # NaN is wrong too
        if len(wrong):
            row = wrong[0]
            raise DataError(
                f"{column[row]}: {least} to {_LARGEST} is expected", file=file, record=str(index[row]), field=name
            )
    twice = np.flatnonzero(index[1:] == index[:-1])
    _check(len(twice) == 0, "it stands there twice", file, record=str(index[twice[0]]) if len(twice) else "")
    videos = {key: _video_places(key, columns, info.fps) for key in cameras}
    return EpisodeTable(index, columns["length"], columns["data/chunk_index"], columns["data/file_index"], videos)


def _video_places(key: str, columns: dict[str, NDArray[Any]], fps: float) -> VideoPlaces:
    chunk, file, start = (columns[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index", "from_timestamp"))
    order = np.lexsort((start, file, chunk))
    ends = np.cumsum(columns["length"][order])
    is_first = np.append(True, (np.diff(chunk[order]) != 0) | (np.diff(file[order]) != 0))  # of its file
    first = np.flatnonzero(is_first)
    of_file = np.cumsum(is_first) - 1
    base = np.append(0, ends[first[1:] - 1])  # frames of all files before
    total = np.diff(np.append(base, ends[-1]))
    lengths = columns["length"][order]
    begins = start[order] * fps  # in frames
    stops = np.append(0, (begins + lengths)[:-1])  # of the episode before
    stops[first] = 0
    # A part of a frame is a shift at a join. Rounded one by one, shifts do not add up to a frame.
    gaps = np.cumsum(np.rint(np.clip(begins - stops, -_MAX_GAP, _MAX_GAP)).astype(np.int64))
    gaps -= np.append(0, gaps[first[1:] - 1])[of_file]
    before, in_file, with_gaps = np.empty_like(ends), np.empty_like(ends), np.empty_like(ends)
    before[order] = ends - lengths - base[of_file]
    in_file[order] = total[of_file]
    with_gaps[order] = ends - lengths - base[of_file] + gaps
    return VideoPlaces(chunk, file, start.astype(np.float64), before, in_file, with_gaps)


def load_tasks(info: Info) -> dict[int, str]:
    """task_index -> text. Raises DataError."""
    rows = _v3_tasks(info.root) if info.is_v3 else _v2_tasks(info.root)
    file = str(info.root / ("meta/tasks.parquet" if info.is_v3 else "meta/tasks.jsonl"))
    tasks: dict[int, str] = {}
    for number, (task_index, task) in enumerate(rows):
        with located(file=file, record=str(number)):
            if (
                type(task_index) is float and task_index.is_integer()
            ):  # pandas writes such where a value was missing once
                task_index = int(task_index)
            if type(task_index) is not int or task_index in tasks:
                raise DataError(f"{task_index!r}: a whole number, once, is expected", field="task_index")
            if info.is_v3 and task_index != number:  # lerobot itself goes by the row there
                raise DataError(
                    f"{task_index} in row {number}: the rows are expected in order of task_index; sort them, or set "
                    "data.options.instruction",
                    field="task_index",
                )
            if not isinstance(task, str):
                raise DataError(f"{task!r}: a text is expected", field="task")
            tasks[task_index] = task
    return tasks


def _v2_columns(info: Info, cameras: list[str]) -> dict[str, NDArray[Any]]:
    rows = list(_json_lines(info.root / "meta/episodes.jsonl"))
    columns: dict[str, NDArray[Any]] = {}
    for name in ("episode_index", "length"):
        values = []
        for number, row in enumerate(rows):
            value: Any = row.get(name)
            if type(value) is float and value.is_integer():
                value = int(value)
            if type(value) is not int or not 0 <= value < 1 << 62:
                file = f"{info.root / 'meta/episodes.jsonl'}:{number + 1}"
                raise DataError(f"{row.get(name)!r}: a whole number is expected", file=file, field=name)
            values.append(value)
        columns[name] = np.array(values, np.int64)
    index = columns["episode_index"]
    chunk = index // info.chunks_size
    columns |= {"data/chunk_index": chunk, "data/file_index": index}
    for key in cameras:
        columns |= {f"videos/{key}/chunk_index": chunk, f"videos/{key}/file_index": index}
        columns[f"videos/{key}/from_timestamp"] = np.zeros(len(index))
    return columns


def _v3_columns(root: Path, cameras: list[str]) -> dict[str, NDArray[Any]]:
    names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    names += [f"videos/{key}/{name}" for key in cameras for name in ("chunk_index", "file_index", "from_timestamp")]
    folder = root / "meta/episodes"
    files = sorted(folder.glob("*/*.parquet"))
    _check(bool(files), "no parquet file in it", str(folder))
    parts: list[dict[str, NDArray[Any]]] = []
    for file in files:
        table = _read_table(file, names)
        part = {}
        for name in names:
            column = table.column(name)
            values = column.to_numpy()
            try:
                if name.endswith("timestamp"):
                    part[name] = values.astype(np.float64, casting="same_kind")
                else:
                    part[name] = whole_numbers(values).astype(np.int64, casting="same_kind")
            except (TypeError, ValueError) as error:  # null, or no number
                raise DataError(
                    f"{column.type}: a number in every row is expected, and whole numbers but for seconds",
                    file=str(file),
                    field=name,
                ) from error
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _v2_tasks(root: Path) -> Iterator[tuple[object, object]]:
    return ((row.get("task_index"), row.get("task")) for row in _json_lines(root / "meta/tasks.jsonl"))


def _v3_tasks(root: Path) -> Iterator[tuple[object, object]]:
    file = root / "meta/tasks.parquet"
    table = _read_table(file, ["task_index"], also=_TASK_COLUMNS)
    text = next((name for name in _TASK_COLUMNS if name in table.column_names), None)
    if text is None:
        raise DataError(f"no column {' or '.join(_TASK_COLUMNS)}", file=str(file))
    return zip(table.column("task_index").to_pylist(), table.column(text).to_pylist(), strict=True)


def _read_table(file: Path, required: list[str], also: tuple[str, ...] = ()) -> Any:
    """Columns of a small parquet file as a pyarrow table; `also`: those that are there. Raises DataError."""
    reader = ParquetReader(0)
    footer = reader.footer(file)
    for name in required:
        if name not in footer.names:
            raise DataError("the column is missing", file=str(file), field=name)
    columns = [*required, *(name for name in also if name in footer.names)]
    return reader.groups(footer, 0, footer.num_groups, columns, keep=False)


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        check_host(error, str(file))
        raise DataError(f"it cannot be read ({error.strerror})", file=str(file)) from error
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except ValueError as error:
            refuse_pointer(file)
            raise DataError(f"unreadable JSON ({error})", file=f"{file}:{number + 1}") from error
        if not isinstance(row, dict):
            raise DataError("a JSON object is expected", file=f"{file}:{number + 1}")
        yield row


def whole_numbers(values: NDArray[Any]) -> NDArray[Any]:
    """Floating-point numbers that are all whole become int64; all else is returned as it is.

    pandas makes float64 of a column of integers in which a value was missing for a while.

    >>> whole_numbers(np.array([0.0, 1.0])), whole_numbers(np.array([0.5, 1.0]))
    (array([0, 1]), array([0.5, 1. ]))
    """
    if values.dtype.kind == "f" and bool(((np.abs(values) < 2.0**53) & (np.trunc(values) == values)).all()):
        return values.astype(np.int64)
    return values


def _check(is_well: bool, reason: str, file: str, *, record: str = "") -> None:
    if not is_well:
        raise DataError(reason, file=file, record=record)
