"""One episode on disk: a folder that appears whole or not at all.

    traj_000123/obs.npz     rgb uint8[F, H, W, 3], rgb_NAME of further cameras, depth uint16[F, H, W] where there is one
    traj_000123/row.json    its line of the JSONL
    traj_000123/input.json  the stamp of what it was made of (`folder.stamps_of`)

While it is written it is called `.traj_000123.{random}.tmp`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from loader_service.convert.episode import Episode, EpisodeRef
from loader_service.sources.npz import NpzFile
from stoker_proto.errors import DataError
from stoker_proto.host.files import whole_folder
from stoker_proto.host.trouble import check_host

ROW_FILE, NPZ_FILE, STAMP_FILE = "row.json", "obs.npz", "input.json"


def episode_folder(out: Path, number: int) -> Path:
    """Where episode `number` lies."""
    return out / f"traj_{number:06d}"


def read_stamp(out: Path, number: int) -> bytes | None:
    """The episode's stamp; None unless it was written completely."""
    folder = episode_folder(out, number)
    try:
        return (folder / STAMP_FILE).read_bytes() if (folder / ROW_FILE).is_file() else None
    except OSError as error:
        check_host(error, str(folder))
        return None


def write_episode(out: Path, number: int, ref: EpisodeRef, episode: Episode, *, compress: bool, stamp: bytes) -> None:
    """Write the episode's folder. The output folder is locked, and no other process writes this episode."""
    folder = episode_folder(out, number)
    row: dict[str, Any] = {"obs_path": f"{folder.name}/{NPZ_FILE}"}
    if episode.task is not None:
        row["task"] = episode.task
    if episode.instruction is not None and episode.instruction.strip():
        row["instruction"] = episode.instruction
    row["actions"] = np.ascontiguousarray(episode.actions)
    if episode.states is not None:
        row["states"] = np.ascontiguousarray(episode.states)
    if episode.control_mode is not None:
        row["control_mode"] = episode.control_mode
    if episode.success is not None:
        row["success"] = episode.success
    row["source"] = ref.source
    arrays: dict[str, Any] = {"rgb": episode.rgb, **episode.more_cameras}
    if episode.depth is not None:
        arrays["depth"] = episode.depth
    with whole_folder(folder) as unfinished:
        with (unfinished / NPZ_FILE).open("wb") as file:
            (np.savez_compressed if compress else np.savez)(file, allow_pickle=False, **arrays)
            to_disk(file)
        with (unfinished / ROW_FILE).open("wb") as file:
            # Floats are written as the shortest text that reads back as the same 32 bits.
            file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
            to_disk(file)
        (unfinished / STAMP_FILE).write_bytes(
            stamp
        )  # cut off by a loss of power it is no stamp, and the episode not done


def read_back(out: Path, number: int) -> tuple[bytes, int]:
    """The episode's line and its number of actions, compared with the frames of its NPZ. Raises DataError."""
    folder = episode_folder(out, number)
    again = f"delete {folder} and run the command again"
    try:
        line = (folder / ROW_FILE).read_bytes()
        num_actions = len(orjson.loads(line)["actions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        check_host(error, str(folder))
        raise DataError(f"it cannot be read back ({error}): {again}", file=str(folder / ROW_FILE)) from error
    with NpzFile(str(folder / NPZ_FILE)) as npz:
        counts = {name: len(npz.frames(name, dtype=np.uint8, ndim=4)) for name in npz.names if name.startswith("rgb")}
    if "rgb" not in counts or not {*counts.values()} <= {num_actions, num_actions + 1}:
        raise DataError(f"{counts} frames and {num_actions} actions: {again}", file=str(folder))
    return line, num_actions


def to_disk(file: Any) -> None:
    """Flush and sync, so that the rename cannot reach the disk before the content does."""
    file.flush()
    os.fsync(file.fileno())
