"""One episode: its rows, wherever they lie, its texts, and its cameras' frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.paths import resolve_inside
from loader_service.sources.extras import library
from loader_service.sources.lerobot.columns import EpisodeRows, integers, numeric_columns, parse_rows
from loader_service.sources.lerobot.image_column import ImagePlace, image_frames
from loader_service.sources.lerobot.info import Feature
from loader_service.sources.lerobot.meta import Columns, Meta
from loader_service.sources.lerobot.options import LeRobotOptions
from loader_service.sources.lerobot.rows import RowReader
from loader_service.sources.lerobot.video import Begin, video_frames
from loader_service.sources.named_files import NamedFiles, content_of, video_content
from stoker_proto.errors import DataError, located


@dataclass(frozen=True, slots=True)
class LeRobotFolder:
    """A data set, and all that is needed to read it."""

    meta: Meta
    options: LeRobotOptions
    reader: RowReader
    data_root: str
    """No image and no video outside of it is read."""

    @property
    def fps_of_timestamps(self) -> float | None:
        """What the timestamps of rows must agree with; None: they are not used."""
        return self.meta.info.fps if self.options.match_frames == "timestamp" else None


@dataclass(frozen=True, slots=True)
class Episode:
    """What is known of an episode before its frames are decoded. T frames."""

    rows: EpisodeRows
    instructions: list[str]  # [T]
    columns: Columns
    pieces: tuple[tuple[Path, int, int], ...]
    """Data files and the half-open ranges of its rows in them."""


def read_episode(shard: Path, start: int, length: int, folder: LeRobotFolder) -> Episode:
    """The episode whose rows begin at `start`. Raises DataError."""
    meta, reader = folder.meta, folder.reader
    columns = meta.columns
    pieces = episode_pieces(shard, start, length, folder)
    names = numeric_columns(columns)
    tables = [reader.read(file, first, last, names) for file, first, last in pieces]
    table = tables[0] if len(tables) == 1 else library("pyarrow").concat_tables(tables)
    index = int(integers(table.slice(0, 1), "episode_index")[0])
    expected = int(meta.episodes.length[meta.episodes.row_of(index)])
    with located(record=f"episode {index}"):
        if expected != length:
            raise DataError(f"{length} rows were scanned, and meta/ says {expected}: run loader-prepare again")
        rows = parse_rows(table, columns, index, folder.fps_of_timestamps)
        return Episode(rows, instructions_of(rows, folder), columns, pieces)


def episode_pieces(shard: Path, start: int, length: int, folder: LeRobotFolder) -> tuple[tuple[Path, int, int], ...]:
    """Where the rows lie: in the shard, and where it ends before the episode does, in the data files that follow."""
    meta, reader = folder.meta, folder.reader
    pieces = []
    file, place = shard, _place_of(shard, meta)
    while True:
        stop = min(start + length, reader.num_rows(file))
        pieces.append((file, start, stop))
        length -= stop - start
        if length <= 0:
            return tuple(pieces)
        place = _next_place(file, place, meta, reader)
        file, start = meta.info.root / meta.info.data_file(*place), 0


def _place_of(shard: Path, meta: Meta) -> tuple[int, int] | None:
    """(chunk, number) of a data file of v3.0 in which an episode begins."""
    rows = meta.rows_of.get(shard.relative_to(meta.info.root).as_posix()) if meta.info.is_v3 else None
    if rows is None or not len(rows):
        return None
    return int(meta.episodes.data_chunk[rows[0]]), int(meta.episodes.data_file[rows[0]])


def _next_place(file: Path, place: tuple[int, int] | None, meta: Meta, reader: RowReader) -> tuple[int, int]:
    """Chunk and number of the data file after this one: the next number of its chunk, or the first of the next chunk."""
    if place is not None:
        chunk, number = place
        for follower in ((chunk, number + 1), (chunk + 1, 0)):
            if reader.files.is_there(meta.info.root / meta.info.data_file(*follower)):
                return follower
    raise DataError(
        "it ends before the episode does, which is longer in meta/; if it continues in the next data file, copy that here too",
        file=str(file),
    )


def instructions_of(rows: EpisodeRows, folder: LeRobotFolder) -> list[str]:
    """The text of each frame. Raises DataError for a task without one."""
    meta, options = folder.meta, folder.options
    if options.instruction is not None:
        return [options.instruction] * len(rows.actions)
    assert rows.task_index is not None
    texts = []
    for t, task in enumerate(rows.task_index.tolist()):
        text = meta.tasks.get(task)
        if text is None or not text.strip():
            raise DataError(
                f"task {task} has no text in meta/tasks: add it, or set data.options.instruction",
                field=f"task_index[{t}]",
            )
        texts.append(text)
    return texts


def video_path(camera: Feature, episode: int, folder: LeRobotFolder) -> str:
    """Path of the mp4 with the camera's frames."""
    meta = folder.meta
    row, place = meta.episodes.row_of(episode), meta.episodes.videos[camera.key]
    name = meta.info.video_file(camera.key, int(place.chunk[row]), int(place.file[row]))
    return resolve_inside(name, base=str(meta.info.root), root=folder.data_root, field="video_path")


def video_files(columns: Columns, episode: int, folder: LeRobotFolder) -> NamedFiles | None:
    """Size and header of each of the episode's videos, which must be here; None without videos. Raises DataError."""
    parts: list[bytes] = []
    for camera in columns.cameras:
        if camera.dtype != "video":
            continue
        path = video_path(camera, episode, folder)
        if not Path(path).is_file():
            raise DataError(f"the video {path} is missing: fetch it", field=camera.key)
        parts += [camera.key.encode(), video_content(path).to_bytes(8, "little")]
    return NamedFiles(content_of(parts)) if parts else None


def open_camera(
    camera: Feature, episode: Episode, wanted: list[int], folder: LeRobotFolder
) -> Iterator[NDArray[np.uint8]]:
    """Frames uint8[H, W, 3] of the timesteps `wanted` (rising), decoded one after another as they are taken."""
    meta, reader = folder.meta, folder.reader
    with located(file=meta.info.file):
        size = camera.size()
    if camera.dtype == "video":
        row, places = meta.episodes.row_of(episode.rows.episode), meta.episodes.videos[camera.key]
        path = str(reader.files.local(Path(video_path(camera, episode.rows.episode, folder))))
        begin = Begin(
            float(places.from_timestamp[row] + episode.rows.timestamps[0]),
            int(places.frames_before[row]),
            int(places.frames_in_file[row]),
            int(places.frames_before_with_gaps[row]),
            by_number=folder.options.match_frames == "frame_index",
        )
        return video_frames(path, wanted, begin=begin, fps=meta.info.fps, size=size)
    cells: Iterator[Any] = (
        row[camera.key]
        for file, start, stop in episode.pieces
        for row in reader.images(file, start, stop, [camera.key])
    )
    place = ImagePlace(str(meta.info.root), folder.data_root, reader.files)
    return image_frames(cells, wanted, size, key=camera.key, place=place)
