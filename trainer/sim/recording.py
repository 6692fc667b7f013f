"""Trajectories on disk, as "Open-PI" JSONL with one NPZ each, written so that the same data is the same bytes.

One line of `train.jsonl`, with `train/traj_000005/obs.npz` beside it:

    {"obs_path": "train/traj_000005/obs.npz", "task": "PickCube-v1", "instruction": "pick up the red cube and hold it
     at 9 cm back, 5 cm left, 24 cm up", "actions": [[0.112, -0.04, -1.0, 0.0, 0.0, -0.31, 1.0], ...], "seed": 5}

`obs_path` is relative to the JSONL file. Members of the NPZ, T images for T actions (image t is what was seen just
before action t): `rgb` uint8[T, H, W, 3]; `depth` uint16[T, H, W] in mm and `wrist_rgb` uint8[T, H, W, 3], if recorded;
`qpos` float32[T, 9]; `tcp_pose` float32[T, 7]; `state` float32[T, 9], which `data.state: text` reads; `intrinsic_cv`
float32[T, 3, 3] and `extrinsic_cv` float32[T, 3, 4], the camera's matrices; `objects` float32[T, 8], true positions
(`trainer/sim/environment.py`).

`actions` are the expert's, the labels. If other actions were executed (noise, a policy), or not every timestep was rendered, the
row also has `executed_actions` (of all timesteps, which replay the episode), `acted` (who: noisy expert, policy, expert) and, of
partly rendered episodes, `timesteps` [T]: which ones are here. With `wrist_rgb` the row says which `robot` carries that camera.
"""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from stoker_proto.errors import ConfigError, DataError

WRIST_ROBOT = "panda_wristcam"
"""`robot` of rows with `wrist_rgb`."""
COMPRESSIONS = {"deflated": zipfile.ZIP_DEFLATED, "stored": zipfile.ZIP_STORED}
"""`deflated` is small; `stored` lets a loader read one frame without the others."""

_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a ZIP can name: bytes must not depend on when they were written


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One episode as it is recorded."""

    task: str
    instruction: str
    seed: int
    actions: npt.NDArray[np.float64]
    """float64[T, 7], rounded to 6 decimals"""
    observations: Mapping[str, npt.NDArray[Any]]
    """member of the NPZ -> array whose first dimension is T"""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """further values of the row, JSON"""

    def __post_init__(self) -> None:
        lengths = {name: len(array) for name, array in self.observations.items()} | {"actions": len(self.actions)}
        if len(set(lengths.values())) != 1:
            raise DataError(f"T differs between the parts of {self.task} seed {self.seed}: {lengths}; record T of each")


def write_npz(path: Path, members: Mapping[str, npt.NDArray[Any]], compression: str) -> None:
    """Writes an NPZ that is a function of its members alone: fixed times and modes, members in the order given."""
    method = COMPRESSIONS[compression]
    with zipfile.ZipFile(path, "x", method) as archive:
        for name, array in members.items():
            npy = io.BytesIO()
            np.lib.format.write_array(npy, np.ascontiguousarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _ZIP_EPOCH)
            info.compress_type = method
            info.external_attr = 0o644 << 16
            archive.writestr(info, npy.getvalue(), compresslevel=9 if compression == "deflated" else None)


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """All members of one NPZ; the inverse of `write_npz`."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


class Recorder:
    """Writes `out/NAME.jsonl` and `out/NAME/traj_000000/obs.npz` ...; a context manager.

    Each trajectory appears whole or not at all: its folder is built under another name and renamed, then its line is
    appended. If Ctrl-C or a full disk ends the block, a valid, shorter set without stray files remains.
    """

    def __init__(self, out: Path, name: str, compression: str = "deflated") -> None:
        """Raises ConfigError if the set exists already: nothing is overwritten or mixed."""
        self.jsonl = out / f"{name}.jsonl"
        self._folder = out / name
        self._compression = compression
        for path in (self.jsonl, self._folder):
            if path.exists():
                raise ConfigError(f"{path} exists and is not overwritten; remove it or choose another --out or --name")
        # One attribute, so that an interrupt sees either the state before a trajectory or the one after it.
        self._committed = (0, 0)  # number of trajectories, bytes of the JSONL

    @property
    def num_written(self) -> int:
        """How many trajectories are complete."""
        return self._committed[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        num_written, size_bytes = self._committed
        unfinished = self._folder / f"traj_{num_written:06d}"
        for path in (unfinished, _partial(unfinished)):
            shutil.rmtree(path, ignore_errors=True)
        if num_written:
            os.truncate(self.jsonl, size_bytes)
        elif self._folder.exists():
            self.jsonl.unlink(missing_ok=True)
            self._folder.rmdir()

    def write(self, trajectory: Trajectory) -> None:
        """Adds one trajectory as the next number."""
        num_written, size_bytes = self._committed
        final = self._folder / f"traj_{num_written:06d}"
        _partial(final).mkdir(parents=True)
        write_npz(_partial(final) / "obs.npz", trajectory.observations, self._compression)
        _partial(final).rename(final)
        row = {
            "obs_path": (final / "obs.npz").relative_to(self.jsonl.parent).as_posix(),
            "task": trajectory.task,
            "instruction": trajectory.instruction,
            "actions": trajectory.actions.tolist(),
            "seed": trajectory.seed,
            **trajectory.extra,
        }
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with self.jsonl.open("ab") as file:
            file.write(line)
        self._committed = (num_written + 1, size_bytes + len(line))


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")
