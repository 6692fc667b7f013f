"""ManiSkill's recorded trajectories: an HDF5 file with one group per episode, and a JSON file of the same name.

    trajectory.h5     traj_0/actions [T, D], traj_0/obs/sensor_data/<camera>/rgb [T+1, H, W, 3], .../depth [T+1, H, W, 1],
                      traj_0/obs/agent/qpos [T+1, S], .../qvel [T+1, S], ...
    trajectory.json   {"env_info": {"env_id": "PushCube-v1", ...}, "episodes": [{"episode_id": 0, "elapsed_steps": 23,
                       "success": true, "reset_kwargs": {...}, "control_mode": "pd_ee_delta_pose"}, ...]}

Images are there when it was recorded, or replayed, with `obs_mode` rgb. Source: ManiSkill `mani_skill/utils/wrappers/record.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from loader_service.convert.episode import Episode, EpisodeRef, check_episode_size
from loader_service.shards import expand_entry
from stoker_proto.errors import ConfigError, DataError, located

MAX_JSON_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ManiSkill:
    """HDF5 files that hold many episodes each."""

    inputs: tuple[str, ...]
    camera: str | None = None
    """None: the only one there is."""
    only_success: bool = False
    depth: bool = False
    qvel: bool = False
    """Put the joints' velocities behind their positions, which are the state wherever they were recorded."""
    task: str | None = None
    """None: env_info.env_id."""

    def episodes(self) -> list[EpisodeRef]:
        """In the order of the JSON's episodes."""
        found = []
        for entry in self.inputs:
            for path in expand_entry(entry, ("**/*.h5", "**/*.hdf5")):
                try:
                    tree = _describe(path)
                    with _open(path) as file:
                        found += [
                            self._ref(file, path, number, episode)
                            for number, episode in enumerate(tree["episodes"])
                            if self._wanted(episode)
                        ]
                except DataError as error:  # of the file: what it holds cannot be told
                    found.append(EpisodeRef(file=str(path), name="", size_bytes=0, error=error))
        return found

    def read(self, ref: EpisodeRef) -> Episode:
        """One group."""
        path = Path(ref.file)
        with _open(path) as file, located(file=ref.file, record=ref.name):
            group = _child(file, ref.name)
            actions = _array(group, "actions", np.floating, 2).astype(np.float32)
            camera = self._camera(group)
            check_episode_size(camera["rgb"].shape[0], int(np.prod(camera["rgb"].shape[1:])))
            frames = _array(camera, "rgb", np.uint8, 4)
            depth = _depth(camera) if self.depth else None
            states = _states(group, self.qvel)
            if len(actions) != ref.place:
                raise DataError(
                    f"{len(actions)} actions, and elapsed_steps in {path.with_suffix('.json').name} is {ref.place}: they "
                    "belong to different recordings",
                    field="actions",
                )
        task = self.task or _describe(path)["env_info"].get("env_id")
        if not isinstance(task, str):
            raise DataError("env_info.env_id is missing: give --task", file=str(path.with_suffix(".json")))
        return Episode(rgb=frames, actions=actions, depth=depth, states=states, task=task)

    def identity(self) -> dict[str, Any]:
        """Camera, depth, states, choice, task."""
        return {
            "format": "maniskill",
            "camera": self.camera,
            "only_success": self.only_success,
            "depth": self.depth,
            "states": ["qpos", "qvel"] if self.qvel else ["qpos"],
            "task": self.task,
        }

    def _wanted(self, episode: Any) -> bool:
        """True also if the JSON has no `success`: the episode then has an error."""
        success = episode.get("success") if self.only_success and isinstance(episode, dict) else None
        return not isinstance(success, bool | int | float) or bool(success)

    def _ref(self, file: Any, path: Path, number: int, episode: Any) -> EpisodeRef:
        """Of the JSON's episode `number`, with its error if it has one."""
        name, place, size, wrong = f"episodes[{number}]", 0, 0, None
        try:
            with located(file=str(path.with_suffix(".json")), record=name):
                name, place = self._described(episode)
            with _readable(path), located(file=str(path), record=name):
                size = int(np.prod(self._camera(_child(file, name))["rgb"].shape))
        except DataError as error:
            wrong = error
        return EpisodeRef(file=str(path), name=name, place=place, size_bytes=size, error=wrong)

    def _described(self, episode: Any) -> tuple[str, int]:
        """Name of the group and number of actions according to the JSON."""
        if not isinstance(episode, dict) or not all(
            type(episode.get(key)) is int for key in ("episode_id", "elapsed_steps")
        ):
            raise DataError("an episode without episode_id or elapsed_steps")
        success = episode.get("success")
        if self.only_success and not isinstance(success, bool | int | float):
            raise DataError(f"{success!r}: --only-success needs true or false for every episode", field="success")
        return f"traj_{episode['episode_id']}", episode["elapsed_steps"]

    def _camera(self, group: Any) -> Any:
        """The HDF5 group of the camera."""
        sensors = _child(_child(group, "obs"), "sensor_data")
        names = [name for name in sensors if "rgb" in sensors[name]]
        if not names:
            raise DataError("no camera with rgb: record or replay with obs_mode rgb", field="obs/sensor_data")
        if self.camera is None and len(names) > 1:
            raise ConfigError(f"there are the cameras {', '.join(names)}: choose one with --camera")
        name = self.camera or names[0]
        if name not in names:
            raise DataError(f"--camera {name}: there are {', '.join(names)}", field="obs/sensor_data")
        return sensors[name]


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The HDF5 file, read-only; errors of h5py become DataErrors."""
    try:
        import h5py
    except ImportError as error:
        raise ConfigError("HDF5 files need h5py: pip install 'stoker[convert]'") from error
    with _readable(path), h5py.File(path, "r") as file:
        yield file


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, RuntimeError) as error:
        raise DataError(f"HDF5 that cannot be read ({error}): copy the file again", file=str(path)) from error


def _describe(path: Path) -> dict[str, Any]:
    """The JSON beside the file, with its two parts."""
    file = path.with_suffix(".json")
    with located(file=str(file)):
        try:
            if file.stat().st_size > MAX_JSON_BYTES:
                raise DataError(f"more than {MAX_JSON_BYTES} bytes: it is no description of a recording")
            tree = orjson.loads(file.read_bytes())
        except OSError as error:
            raise DataError(f"it cannot be read ({error.strerror}): ManiSkill writes it beside {path.name}") from error
        except ValueError as error:
            raise DataError(f"not JSON ({error})") from error
        if not (
            isinstance(tree, dict) and isinstance(tree.get("episodes"), list) and isinstance(tree.get("env_info"), dict)
        ):
            raise DataError("env_info or episodes is missing: it is no description of a recording")
        return tree


def _child(group: Any, name: str) -> Any:
    if name not in group:
        raise DataError(f"there is no {name}; there are {', '.join(list(group)[:10]) or 'none'}", field=name)
    return group[name]


def _array(group: Any, name: str, kind: Any, ndim: int) -> NDArray[Any]:
    dataset = _child(group, name)
    if not np.issubdtype(dataset.dtype, kind) or len(dataset.shape) != ndim:
        raise DataError(
            f"{dataset.dtype} {list(dataset.shape)}: {kind.__name__} with {ndim} dimensions is expected", field=name
        )
    array: NDArray[Any] = dataset[()]
    return array


def _depth(camera: Any) -> NDArray[np.uint16]:
    """uint16[F, H, W] in mm."""
    depth = _array(camera, "depth", np.integer, 4)[..., 0]
    if depth.min(initial=0) < 0 or depth.max(initial=0) > 65_535:
        raise DataError(f"depths from {depth.min()} to {depth.max()}: 0 to 65535 mm are expected", field="depth")
    return depth.astype(np.uint16)


def _states(group: Any, qvel: bool) -> NDArray[np.float32] | None:
    """float32[T + 1, S], the joints' positions and, if asked for, velocities; None where none were recorded."""
    agent = group["obs"].get("agent", {})
    names = ["qpos", "qvel"] if qvel else [name for name in ("qpos",) if name in agent]
    with located(field="obs/agent"):
        parts = [_array(agent, name, np.floating, 2) for name in names]
        if len({len(part) for part in parts}) > 1:
            raise DataError(f"{len(parts[0])} positions and {len(parts[1])} velocities: as many are expected")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found by the episode's check
        return np.concatenate(parts, axis=1).astype(np.float32) if parts else None
