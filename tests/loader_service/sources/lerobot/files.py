"""Writes small LeRobot data sets of both layouts with pyarrow and PyAV, for tests and benchmarks.

`write_lerobot(root, [4, 7], version="v3.0")` writes two episodes of 4 and 7 frames. Everything is a function of the arguments.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TASKS = ("put carrot on plate", "flip pot upright", "turn lever")
ENCODERS: dict[str, dict[str, str]] = {
    "libx264": {"crf": "20", "g": "7", "bf": "2", "threads": "1"},
    "libx265": {
        "crf": "20",
        "x265-params": "log-level=none:pools=none:frame-threads=1:no-wpp=1:keyint=5:bframes=2:rc-lookahead=3",
    },
    "libsvtav1": {"crf": "30", "g": "2", "preset": "12", "svtav1-params": "lp=1"},
}
Encode = Callable[[Path, Any], None]
"""(file, its frames)."""
Paint = Callable[[int, int, int], np.ndarray]
"""(episode, frame, number of the camera) -> uint8[H, W, 3]."""


def write_lerobot(
    root: Path,
    lengths: Sequence[int],
    *,
    version: str = "v3.0",
    videos: Sequence[str] = ("observation.images.front", "observation.images.wrist"),
    images: Sequence[str] = (),
    size: tuple[int, int] = (64, 96),
    fps: int = 10,
    codec: str | None = "libx264",
    encoder: Mapping[str, str] | None = None,
    dim: int = 7,
    state_dim: int = 5,
    rows_per_data_file: int = 11,
    episodes_per_video_file: int = 2,
    chunks_size: int = 2,
    row_group_size: int | None = None,
    paint: Paint | None = None,
    seed: int = 0,
) -> Path:
    """The data set's folder. In v3.0 data files are cut every `rows_per_data_file` rows, so that episodes cross them.

    codec: None: the videos are empty files, which the caller replaces.
    """
    paint = paint or squares(size)
    (root / "meta").mkdir(parents=True)
    tables = [
        _episode(e, length, fps, dim, state_dim, images, paint, len(videos), seed) for e, length in enumerate(lengths)
    ]
    starts = np.cumsum([0, *lengths])
    tables = [_with_index(table, int(start)) for table, start in zip(tables, starts[:-1], strict=True)]
    is_v3 = version == "v3.0"
    write = _write_v3 if is_v3 else _write_v2
    layout = (
        {"rows_per_data_file": rows_per_data_file, "episodes_per_video_file": episodes_per_video_file} if is_v3 else {}
    )
    encode = _Encoder(codec, encoder or ENCODERS[codec], fps, size) if codec else _touch
    write(root, tables, videos, chunks_size, fps, row_group_size, encode, paint, **layout)
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": [state_dim], "names": None},
        "action": {"dtype": "float32", "shape": [dim], "names": None},
    }
    for key in (*videos, *images):
        dtype = "video" if key in videos else "image"
        features[key] = {"dtype": dtype, "shape": [*size, 3], "names": ["height", "width", "channels"]}
    for key, dtype in {"timestamp": "float32"}.items() | dict.fromkeys(
        ("frame_index", "episode_index", "index", "task_index"), "int64"
    ).items():
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    data, video = (
        ("data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")  # noqa: E501
        if is_v3
        else (
            "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        )
    )  # fmt: skip
    info = {
        "codebase_version": version, "total_episodes": len(lengths), "total_frames": int(sum(lengths)), "fps": fps,
        "chunks_size": chunks_size, "data_path": data, "video_path": video if videos else None, "features": features,
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info, indent=1))
    return root


def squares(size: tuple[int, int]) -> Paint:
    """A square that moves, on a background that tells episode, frame and camera apart."""

    def paint(episode: int, t: int, camera: int) -> np.ndarray:
        frame = np.empty((*size, 3), np.uint8)
        frame[:] = (17 * t % 256, 61 * episode % 256, 90 * camera % 256)
        left = 2 * t % (size[1] - 8)
        frame[4:12, left : left + 8] = (250, 30 * (t % 8), 128)
        return frame

    return paint


def change_info(root: Path, **changes: Any) -> None:
    """Set keys of info.json; a callable gets the old value."""
    file = root / "meta/info.json"
    tree = json.loads(file.read_text())
    for key, value in changes.items():
        tree[key] = value(tree[key]) if callable(value) else value
    file.write_text(json.dumps(tree))


def change_table(file: Path, **columns: Any) -> None:
    """Replace columns of a parquet; None drops one, a callable gets the old values as a list. Types stay."""
    table = pq.read_table(file, partitioning=None)
    for name, value in columns.items():
        at = table.column_names.index(name)
        if value is None:
            table = table.remove_column(at)
        else:
            kind = table.schema.field(name).type
            new = value(table.column(name).to_pylist())
            table = table.set_column(at, name, new if isinstance(new, pa.Array) else pa.array(new, kind))
    pq.write_table(table, file)


def _episode(
    episode: int, length: int, fps: int, dim: int, state_dim: int, images: Sequence[str], paint: Paint, num_videos: int, seed: int
) -> pa.Table:  # fmt: skip
    random = np.random.default_rng([seed, episode])
    columns: dict[str, Any] = {
        "observation.state": _vectors(random.normal(size=(length, state_dim))),
        "action": _vectors(random.uniform(-1, 1, (length, dim))),
        "timestamp": pa.array(np.arange(length, dtype=np.float32) / np.float32(fps)),
        "frame_index": pa.array(np.arange(length)),
        "episode_index": pa.array(np.full(length, episode)),
        "task_index": pa.array(np.full(length, episode % len(TASKS))),
    }
    for camera, key in enumerate(images):
        cells = [{"bytes": _png(paint(episode, t, num_videos + camera)), "path": f"{t}.png"} for t in range(length)]
        columns[key] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table(columns)


def _vectors(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32).ravel()), values.shape[1])


def _with_index(table: pa.Table, start: int) -> pa.Table:
    return table.append_column("index", pa.array(np.arange(start, start + len(table))))


def _png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def _touch(file: Path, frames: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


class _Encoder:
    def __init__(self, codec: str, options: Mapping[str, str], fps: int, size: tuple[int, int]) -> None:
        self.codec, self.options, self.fps, self.size = codec, dict(options), fps, size

    def __call__(self, file: Path, frames: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        shown = tuple(frame.tobytes() for frame in frames)
        file.write_bytes(_encoded(self.codec, tuple(self.options.items()), self.fps, self.size, shown))


@lru_cache(maxsize=100)
def _encoded(
    codec: str, options: tuple[tuple[str, str], ...], fps: int, size: tuple[int, int], frames: tuple[bytes, ...]
) -> bytes:
    """The MP4 of these RGB frames. Many tests begin with the same video, and encoding is most of what writing one costs."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps, options=dict(options))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for frame in frames:
            picture = np.frombuffer(frame, np.uint8).reshape(*size, 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _write_v2(
    root: Path, tables: list[pa.Table], videos: Sequence[str], chunks_size: int, fps: int, row_group_size: int | None,
    encode: Encode, paint: Paint,
) -> None:  # fmt: skip
    for e, table in enumerate(tables):
        file = root / f"data/chunk-{e // chunks_size:03d}/episode_{e:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file, row_group_size=row_group_size)
        for camera, key in enumerate(videos):
            mp4 = root / f"videos/chunk-{e // chunks_size:03d}/{key}/episode_{e:06d}.mp4"
            encode(mp4, (paint(e, t, camera) for t in range(len(table))))
    rows = [{"episode_index": e, "tasks": [TASKS[e % len(TASKS)]], "length": len(t)} for e, t in enumerate(tables)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.dumps({"task_index": i, "task": task}) + "\n" for i, task in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("".join(lines))


def _write_v3(
    root: Path, tables: list[pa.Table], videos: Sequence[str], chunks_size: int, fps: int, row_group_size: int | None,
    encode: Encode, paint: Paint, rows_per_data_file: int, episodes_per_video_file: int,
) -> None:  # fmt: skip
    whole = pa.concat_tables(tables)
    for number, start in enumerate(range(0, len(whole), rows_per_data_file)):
        file = root / f"data/chunk-{number // chunks_size:03d}/file-{number % chunks_size:03d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(whole.slice(start, rows_per_data_file), file, row_group_size=row_group_size)
    lengths = [len(table) for table in tables]
    starts = np.cumsum([0, *lengths])
    episodes = []
    for e, length in enumerate(lengths):
        number, group = int(starts[e]) // rows_per_data_file, e // episodes_per_video_file
        before = sum(lengths[group * episodes_per_video_file : e])
        row: dict[str, Any] = {
            "episode_index": e, "tasks": [TASKS[e % len(TASKS)]], "length": length,
            "data/chunk_index": number // chunks_size, "data/file_index": number % chunks_size,
            "dataset_from_index": int(starts[e]), "dataset_to_index": int(starts[e + 1]),
        }  # fmt: skip
        for key in videos:
            row |= {f"videos/{key}/chunk_index": group // chunks_size, f"videos/{key}/file_index": group % chunks_size}
            row |= {f"videos/{key}/from_timestamp": before / fps, f"videos/{key}/to_timestamp": (before + length) / fps}
        episodes.append(row)
    for group in range(0, -(-len(lengths) // episodes_per_video_file)):
        members = range(group * episodes_per_video_file, min((group + 1) * episodes_per_video_file, len(lengths)))
        for camera, key in enumerate(videos):
            mp4 = root / f"videos/{key}/chunk-{group // chunks_size:03d}/file-{group % chunks_size:03d}.mp4"
            encode(mp4, (paint(e, t, camera) for e in members for t in range(lengths[e])))
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    tasks = pa.table({"task_index": list(range(len(TASKS))), "__index_level_0__": list(TASKS)})
    pq.write_table(tasks, root / "meta/tasks.parquet")
