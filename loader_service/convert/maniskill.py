"""ManiSkill's recorded trajectories: an HDF5 file with one group per episode, and a JSON file of the same name.

    trajectory.h5     traj_0/actions [T, D], traj_0/obs/sensor_data/<camera>/rgb [T+1, H, W, 3], .../depth [T+1, H, W, 1],
                      traj_0/obs/agent/qpos [T+1, S], .../qvel [T+1, S], ...
    trajectory.json   {"env_info": {"env_id": "PushCube-v1", ...}, "episodes": [{"episode_id": 0, "elapsed_steps": 23,
                       "success": true, "reset_kwargs": {...}, "control_mode": "pd_ee_delta_pose"}, ...]}

Images are there when it was recorded, or replayed, with `obs_mode` rgb. Source: ManiSkill `mani_skill/utils/wrappers/record.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from loader_service.convert.episode import Episode, EpisodeRef, camera_array, check_episode_size
from loader_service.shards import expand_entry
from loader_service.sources.lfs import refuse_pointer
from stoker_proto.errors import ConfigError, DataError, located

MAX_JSON_BYTES = 1 << 30
_REPLAY = (
    "replay the demonstrations with obs_mode rgb (python -m mani_skill.trajectory.replay_trajectory --traj-path FILE.h5 "
    "--obs-mode rgb --save-traj)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManiSkill:
    """HDF5 files that hold many episodes each."""

    inputs: tuple[str, ...]
    cameras: tuple[str, ...] = ()
    """In the order of the sample's images; depth is the first one's. Empty: the only one there is."""
    control_mode: str | None = None
    """Leave out episodes with another one. None: all episodes must have the same."""
    only_success: bool = False
    depth: bool = False
    qvel: bool = False
    """Put the joints' velocities behind their positions, which are the state wherever they were recorded."""
    task: str | None = None
    """None: env_info.env_id."""

    def episodes(self) -> list[EpisodeRef]:
        """In the order of the JSON's episodes."""
        found = []
        modes: Counter[str] = Counter()
        for entry in self.inputs:
            for path in expand_entry(entry, ("**/*.h5", "**/*.hdf5")):
                try:
                    tree = _describe(path)
                    with _open(path) as file:
                        for number, episode in enumerate(tree["episodes"]):
                            mode = _control_mode(tree, episode, file)
                            if self._wanted(episode) and self.control_mode in (None, mode):
                                found.append(self._ref(file, path, number, episode))
                                modes.update(() if mode is None else (mode,))
                except DataError as error:  # of the file: what it holds cannot be told
                    found.append(EpisodeRef(file=str(path), name="", size_bytes=0, error=error))
        if len(modes) > 1:
            shown = ", ".join(f"{mode} ({count})" for mode, count in modes.items())
            raise ConfigError(
                f"episodes of the control modes {shown}: the same numbers mean other motions; choose one with --control-mode"
            )
        return found

    def read(self, ref: EpisodeRef) -> Episode:
        """One group."""
        path = Path(ref.file)
        with _open(path) as file, located(file=ref.file, record=ref.name):
            group = _child(file, ref.name)
            actions = _array(group, "actions", np.floating, 2).astype(np.float32)
            cameras = self._cameras(group)
            frames = [_frames(camera, name) for name, camera in cameras.items()]
            depth = _depth(next(iter(cameras.values()))) if self.depth else None
            states = _states(group, self.qvel)
            if len(actions) != ref.place:
                raise DataError(
                    f"{len(actions)} actions, and elapsed_steps in {path.with_suffix('.json').name} is {ref.place}: they "
                    "belong to different recordings",
                    field="actions",
                )
            tree = _describe(path)
            described = next((one for one in tree["episodes"] if isinstance(one, dict) and _name(one) == ref.name), {})
            mode = _control_mode(tree, described, file) if described else None
            success = described.get("success")
        task = self.task or tree["env_info"].get("env_id")
        if not isinstance(task, str):
            raise DataError("env_info.env_id is missing: give --task", file=str(path.with_suffix(".json")))
        more = {camera_array(name): of for name, of in zip(list(cameras)[1:], frames[1:], strict=True)}
        return Episode(
            rgb=frames[0],
            more_cameras=more,
            actions=actions,
            depth=depth,
            states=states,
            task=task,
            control_mode=mode,
            success=bool(success) if isinstance(success, bool | int | float) else None,
        )

    def identity(self) -> dict[str, Any]:
        """Cameras, depth, states, choice, task."""
        chosen = {} if self.control_mode is None else {"control_mode": self.control_mode}
        return {
            **chosen,
            "format": "maniskill, with success",
            "camera": ",".join(self.cameras) or None,
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
                cameras = self._cameras(_child(file, name)).values()
                size = sum(int(np.prod(_dataset(camera, "rgb").shape)) for camera in cameras)
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
        return _name(episode), episode["elapsed_steps"]

    def _cameras(self, group: Any) -> dict[str, Any]:
        """Name -> HDF5 group of each camera."""
        _check_group(group, "")
        obs: Any = group.get("obs")
        if not hasattr(obs, "keys") or "sensor_data" not in obs:  # none at all, or a state vector in its place
            raise DataError(f"no images were recorded: {_REPLAY}", field="obs")
        sensors = _child(obs, "sensor_data")
        _check_group(sensors, "obs/sensor_data")
        names = [name for name in sensors if isinstance(sensors[name], Mapping) and "rgb" in sensors[name]]
        if not names:
            raise DataError(f"no camera with rgb: {_REPLAY}", field="obs/sensor_data")
        if not self.cameras and len(names) > 1:
            raise ConfigError(f"there are the cameras {', '.join(names)}: choose with --camera, e.g. {','.join(names)}")
        for name in self.cameras:
            if name not in names:
                raise DataError(f"--camera {name}: there are {', '.join(names)}", field="obs/sensor_data")
        return {name: sensors[name] for name in self.cameras or names}


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The HDF5 file, read-only; errors of h5py become DataErrors."""
    try:
        import h5py
    except ImportError as error:
        raise ConfigError("HDF5 files need h5py: pip install 'stoker[convert]'") from error
    refuse_pointer(path)
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
    refuse_pointer(file)
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


def _name(episode: Mapping[str, Any]) -> str:
    """Of the HDF5 group of an episode of the JSON."""
    return f"traj_{episode.get('episode_id')}"


def _control_mode(tree: Mapping[str, Any], episode: Any, file: Any) -> str | None:
    """The episode's control mode: from the JSON's entry for it, else from its HDF5 group, else from the JSON's entry for all
    episodes."""
    if not isinstance(episode, dict):
        return None
    kwargs = tree["env_info"].get("env_kwargs")
    group = file.get(_name(episode))
    of_group = None if group is None else group.attrs.get("control_mode")
    of_all = kwargs.get("control_mode") if isinstance(kwargs, dict) else None
    found = (episode.get("control_mode"), of_group, of_all)
    return next((mode for mode in found if isinstance(mode, str) and mode), None)


def _child(group: Any, name: str) -> Any:
    """Raises DataError unless `group` is a group that has it."""
    _check_group(group, "")
    if name not in group:
        raise DataError(f"there is no {name}; there are {', '.join(list(group)[:10]) or 'none'}", field=name)
    return group[name]


def _check_group(node: Any, field: str) -> None:
    if not isinstance(node, Mapping):  # h5py's groups are
        place = field or str(getattr(node, "name", "")).partition("/traj_")[2].partition("/")[2]
        raise DataError("an array: a group is expected, as ManiSkill writes it", field=place)


def _dataset(group: Any, name: str) -> Any:
    """An HDF5 array, not read yet. Raises DataError for a group, and for an array without values."""
    dataset = _child(group, name)
    if isinstance(dataset, Mapping) or getattr(dataset, "shape", None) is None:
        kind = "a group" if isinstance(dataset, Mapping) else "no values"
        raise DataError(f"{kind}: an array is expected, as ManiSkill writes it", field=name)
    return dataset


def _array(group: Any, name: str, kind: Any, ndim: int) -> NDArray[Any]:
    dataset = _dataset(group, name)
    if not np.issubdtype(dataset.dtype, kind) or len(dataset.shape) != ndim:
        raise DataError(
            f"{dataset.dtype} {list(dataset.shape)}: {kind.__name__} with {ndim} dimensions is expected", field=name
        )
    array: NDArray[Any] = dataset[()]
    return array


def _frames(camera: Any, name: str) -> NDArray[np.uint8]:
    """uint8[F, H, W, 3]."""
    with located(field=name):
        shape = _dataset(camera, "rgb").shape
        check_episode_size(shape[0] if shape else 1, int(np.prod(shape[1:])))
    return _array(camera, "rgb", np.uint8, 4)


def _depth(camera: Any) -> NDArray[np.uint16]:
    """uint16[F, H, W] in mm."""
    depth = _array(camera, "depth", np.integer, 4)[..., 0]
    if depth.min(initial=0) < 0 or depth.max(initial=0) > 65_535:
        raise DataError(f"depths from {depth.min()} to {depth.max()}: 0 to 65535 mm are expected", field="depth")
    return depth.astype(np.uint16)


def _states(group: Any, qvel: bool) -> NDArray[np.float32] | None:
    """float32[T + 1, S], the joints' positions and, if asked for, velocities; None where none were recorded."""
    agent = group["obs"].get("agent", {})
    _check_group(agent, "obs/agent")
    names = ["qpos", "qvel"] if qvel else [name for name in ("qpos",) if name in agent]
    with located(field="obs/agent"):
        parts = [_array(agent, name, np.floating, 2) for name in names]
        if len({len(part) for part in parts}) > 1:
            raise DataError(f"{len(parts[0])} positions and {len(parts[1])} velocities: as many are expected")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found by the episode's check
        return np.concatenate(parts, axis=1).astype(np.float32) if parts else None
