"""Rows of demonstrations -> what was executed, and from which seed.

One line of a JSONL file, as the collector writes it:

    {"obs_path": "train/traj_000005/obs.npz", "task": "PickCube-v1", "instruction": "pick up ...",
     "actions": [[0.112, -0.04, -1.0, 0.0, 0.0, -0.31, 1.0], ...], "seed": 5}

Where other actions were executed than the labels say (noise, a policy), the row has `executed_actions` too: these are replayed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError, DataError
from trainer.sim.recording import WRIST_ROBOT


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One episode."""

    task: str
    seed: int
    actions: NDArray[np.float32]
    """float32[T, D], as executed."""
    place: str
    """File and line, for messages."""
    wrist_camera: bool = False
    """Whether the robot carried a camera on its hand. That is another robot: it needs other actions for the same movement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recordings:
    """The episodes to replay."""

    episodes: tuple[Recording, ...]
    num_without: int
    """Rows, among those that were read, without a seed or a task: they cannot be replayed."""


def read_recordings(files: Iterable[Path], per_task: int, tasks: Iterable[str] = ()) -> Recordings:
    """The first `per_task` episodes of each task, or of the given tasks. Raises ConfigError, DataError."""
    wanted, found, num_without = set(tasks), list[Recording](), 0
    counts = Counter[str]()
    for file in files:
        try:
            lines = file.open(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{file}: the demonstrations cannot be read ({error}); name a JSONL file") from error
        with lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = _parse(line, file, number)
                task, seed = row.get("task"), row.get("seed")
                if not isinstance(task, str) or isinstance(seed, bool) or not isinstance(seed, int):
                    num_without += 1
                    continue
                if (wanted and task not in wanted) or counts[task] >= per_task:
                    continue
                counts[task] += 1
                actions = _actions(row, file, number)
                place, wrist = f"{file}:{number}", row.get("robot") == WRIST_ROBOT
                found.append(Recording(task=task, seed=seed, actions=actions, place=place, wrist_camera=wrist))
    return Recordings(episodes=tuple(found), num_without=num_without)


def _parse(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"line {number} is not JSON ({error})", file=str(file)) from error
    if not isinstance(row, dict):
        raise DataError(f"line {number} is a {type(row).__name__}: an object is expected", file=str(file))
    return row


def _actions(row: dict[str, Any], file: Path, number: int) -> NDArray[np.float32]:
    name = "executed_actions" if "executed_actions" in row else "actions"
    try:
        actions = np.asarray(row.get(name), np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"line {number}: {name} are no numbers of one shape ({error})", file=str(file)) from error
    if actions.ndim != 2 or not actions.size or not np.isfinite(actions).all():
        raise DataError(
            f"line {number}: {name} have shape {list(actions.shape)}: finite numbers [T, D] are expected",
            file=str(file),
        )
    return actions
