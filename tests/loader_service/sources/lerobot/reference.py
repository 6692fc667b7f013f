"""The plainest reader of a LeRobot data set, to compare with: every file decoded whole, nothing shared with the loader."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
from PIL import Image


def all_frames(mp4: Path) -> list[np.ndarray]:
    """uint8[H, W, 3] of each frame of a file."""
    with av.open(mp4) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def reference(root: Path) -> Iterator[dict[str, Any]]:
    """Each frame of the data set by its global index: task, state, action, timestep, episode, images by camera."""
    info = json.loads((root / "meta/info.json").read_text())
    is_v3 = info["codebase_version"] == "v3.0"
    rows = [
        row
        for file in sorted(root.glob("data/*/*.parquet"))
        for row in pq.read_table(file, partitioning=None).to_pylist()
    ]
    rows.sort(key=lambda row: row["index"])
    if is_v3:
        table = pq.read_table(root / "meta/tasks.parquet").to_pylist()
        tasks = {row["task_index"]: row["__index_level_0__"] for row in table}
        files = sorted(root.glob("meta/episodes/*/*.parquet"))
        episodes = {
            row["episode_index"]: row for file in files for row in pq.read_table(file, partitioning=None).to_pylist()
        }
    else:
        tasks = {
            row["task_index"]: row["task"]
            for row in map(json.loads, (root / "meta/tasks.jsonl").read_text().splitlines())
        }
    decoded: dict[Path, list[np.ndarray]] = {}
    for row in rows:
        images = {}
        for key, feature in info["features"].items():
            if feature["dtype"] == "image":
                images[key] = np.array(Image.open(io.BytesIO(row[key]["bytes"])))
            if feature["dtype"] != "video":
                continue
            e, start = row["episode_index"], 0.0
            if is_v3:
                place = {
                    name: episodes[e][f"videos/{key}/{name}"]
                    for name in ("chunk_index", "file_index", "from_timestamp")
                }
                start = place["from_timestamp"]
                mp4 = root / f"videos/{key}/chunk-{place['chunk_index']:03d}/file-{place['file_index']:03d}.mp4"
            else:
                mp4 = root / f"videos/chunk-{e // info['chunks_size']:03d}/{key}/episode_{e:06d}.mp4"
            if mp4 not in decoded:
                decoded[mp4] = all_frames(mp4)
            images[key] = decoded[mp4][round((start + row["timestamp"]) * info["fps"])]
        yield {
            "task": tasks[row["task_index"]],
            "state": np.array(row["observation.state"], np.float32),
            "action": np.array(row["action"], np.float32),
            "timestep": row["frame_index"],
            "episode": row["episode_index"],
            "images": images,
        }
