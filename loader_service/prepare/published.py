"""Statistics that came with the data: `data.action.statistics_path`.

    LeRobot v3.0    meta/stats.json            {"action": {"min": [...], "max", "mean", "std", "q01", "q99", "count"}}
    OpenVLA         dataset_statistics.json    {"bridge_orig": {"action": {the same}, "num_transitions": 60000}}

Needed where a model is trained on that has been normalised by them already. Our own are exact over the data; those of LeRobot are
quantiles averaged over episodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from stoker_proto.actions import ActionStatistics
from stoker_proto.errors import ConfigError

_PARTS = ("min", "max", "mean", "std", "q01", "q99")


def published_statistics(path: str, dim: int, mask: NDArray[np.bool_]) -> ActionStatistics:
    """The statistics of `action` in the file, for D = dim dimensions with a mask bool[D]. Raises ConfigError."""
    key = f"data.action.statistics_path {path}"
    try:
        tree = orjson.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: not readable JSON ({error})") from error
    action = _find(tree, key)
    missing = [name for name in _PARTS if name not in action]
    if missing:
        raise ConfigError(
            f"{key}: its `action` has no {', '.join(missing)}; leave the key out to take those of the data"
        )
    parts: dict[str, NDArray[np.float64]] = {}
    for name in _PARTS:
        try:
            parts[name] = np.asarray(action[name], np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}: action.{name} is no list of numbers") from error
        if parts[name].shape != (dim,) or not np.isfinite(parts[name]).all():
            raise ConfigError(
                f"{key}: action.{name} has the shape {list(parts[name].shape)}: {dim} finite numbers are expected, one for each "
                "dimension of the data's actions"
            )
    if (parts["q01"] > parts["q99"]).any() or (parts["min"] > parts["max"]).any():
        raise ConfigError(f"{key}: a q01 above its q99, or a min above its max")
    return ActionStatistics(count=_count(action), mask=mask, **parts)


def _find(tree: Any, key: str) -> Mapping[str, Any]:
    tree = tree if isinstance(tree, dict) else {}
    if isinstance(tree.get("action"), dict):
        found: dict[str, Any] = tree["action"]
        return found
    inner = [value for value in tree.values() if isinstance(value, dict) and isinstance(value.get("action"), dict)]
    if len(inner) == 1:
        return _find(inner[0], key)
    reason = f"{len(inner)} data sets have `action`: leave one of them" if inner else "it has no `action`"
    raise ConfigError(f"{key}: {reason}; LeRobot's meta/stats.json or OpenVLA's dataset_statistics.json is expected")


def _count(action: Mapping[str, Any]) -> int:
    count = np.ravel(action.get("count", 0))
    return int(count[0]) if len(count) else 0
