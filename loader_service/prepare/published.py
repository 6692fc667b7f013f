"""Statistics that came with the data: `data.action.statistics_path`.

    LeRobot v3.0    meta/stats.json            {"action": {"min": [...], "max", "mean", "std", "q01", "q99", "count"}}
    OpenVLA         dataset_statistics.json    {"bridge_orig": {"action": {the same, "mask": [true, ...]}, "num_transitions"}}

`mask` says which dimensions are normalised; LeRobot's has none, and other features beside `action` (`data.options.action_key`).
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


def published_statistics(path: str, mask: NDArray[np.bool_], name: str = "action") -> ActionStatistics:
    """The statistics of the feature `name` in the file, with data.action.unmasked's mask bool[D]. Raises ConfigError."""
    key, dim = f"data.action.statistics_path {path}", len(mask)
    try:
        tree = orjson.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: not readable JSON ({error})") from error
    action = _find(tree, key, name)
    missing = [name for name in _PARTS if name not in action]
    if missing:
        raise ConfigError(
            f"{key}: its `{name}` has no {', '.join(missing)}; leave the key out to take those of the data"
        )
    parts: dict[str, NDArray[np.float64]] = {}
    for part in _PARTS:
        try:
            parts[part] = np.asarray(action[part], np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{key}: {name}.{part} is no list of numbers") from error
        if parts[part].shape != (dim,) or not np.isfinite(parts[part]).all():
            raise ConfigError(
                f"{key}: {name}.{part} has the shape {list(parts[part].shape)}: {dim} finite numbers are expected, one for each "
                "dimension of the data's actions"
            )
    if (parts["q01"] > parts["q99"]).any() or (parts["min"] > parts["max"]).any():
        raise ConfigError(f"{key}: a q01 above its q99, or a min above its max")
    _check_mask(action.get("mask"), mask, f"{key}: {name}.mask")
    return ActionStatistics(count=_count(action), mask=mask, **parts)


def _check_mask(found: object, mask: NDArray[np.bool_], place: str) -> None:
    """What was normalised there must be what is normalised here."""
    if found is None:
        return
    if not isinstance(found, list) or len(found) != len(mask) or not all(isinstance(one, bool) for one in found):
        raise ConfigError(f"{place} is {found!r:.80}: {len(mask)} times true or false is expected")
    if found != mask.tolist():
        unmasked = [d for d, one in enumerate(found) if not one]
        raise ConfigError(
            f"{place} leaves out the dimensions {unmasked}, and data.action.unmasked is {np.flatnonzero(~mask).tolist()}: set "
            f"data.action.unmasked: {unmasked}"
        )


def _find(tree: Any, key: str, name: str) -> Mapping[str, Any]:
    tree = tree if isinstance(tree, dict) else {}
    if isinstance(tree.get(name), dict):
        found: dict[str, Any] = tree[name]
        return found
    inner = [value for value in tree.values() if isinstance(value, dict) and isinstance(value.get(name), dict)]
    if len(inner) == 1:
        return _find(inner[0], key, name)
    reason = f"{len(inner)} data sets have `{name}`: leave one of them" if inner else f"it has no `{name}`"
    raise ConfigError(f"{key}: {reason}; LeRobot's meta/stats.json or OpenVLA's dataset_statistics.json is expected")


def _count(action: Mapping[str, Any]) -> int:
    count = np.ravel(action.get("count", 0))
    return int(count[0]) if len(count) else 0
