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
from stoker_proto.host.trouble import check_host

_PARTS = ("min", "max", "mean", "std", "q01", "q99")


def published_statistics(path: str, mask: NDArray[np.bool_], name: str = "action") -> ActionStatistics:
    """The statistics of the feature `name` in the file, with the mask bool[D], which the file's own must equal.

    Raises ConfigError."""
    key, dim = f"data.action.statistics_path {path}", len(mask)
    action = _read(path, key, name)
    missing = [name for name in _PARTS if name not in action]
    if missing:
        raise ConfigError(
            f"{key}: its `{name}` has no {', '.join(missing)}; leave the key out to take those of the data"
        )
    parts: dict[str, NDArray[np.float64]] = {}
    for part in _PARTS:
        parts[part] = _numbers(action[part], f"{key}: {name}.{part}")
        if parts[part].shape != (dim,) or not np.isfinite(parts[part]).all():
            raise ConfigError(
                f"{key}: {name}.{part} has the shape {list(parts[part].shape)}: {dim} finite numbers are expected, one for each "
                "dimension of the data's actions"
            )
    if (parts["q01"] > parts["q99"]).any() or (parts["min"] > parts["max"]).any():
        raise ConfigError(f"{key}: a q01 above its q99, or a min above its max")
    _check_mask(action.get("mask"), mask, f"{key}: {name}.mask")
    return ActionStatistics(count=_count(action), mask=mask, **parts)


def published_mask(path: str, dim: int, name: str = "action") -> NDArray[np.bool_] | None:
    """bool[D], the file's own mask; None where it has none (LeRobot). Raises ConfigError."""
    key = f"data.action.statistics_path {path}"
    found = _read(path, key, name).get("mask")
    return None if found is None else np.array(_flags(found, dim, f"{key}: {name}.mask"), np.bool_)


def _read(path: str, key: str, name: str) -> Mapping[str, Any]:
    """What the file says of the feature."""
    try:
        tree = orjson.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        check_host(error, path)
        raise ConfigError(f"{key}: not readable JSON ({error})") from error
    return _find(tree, key, name)


def _numbers(value: object, place: str) -> NDArray[np.float64]:
    """The list as it stands. A text such as "0.1" is no number. Raises ConfigError."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise ConfigError(f"{place} is no list of numbers") from error
    if array.dtype.kind not in "iuf":
        raise ConfigError(f"{place} is no list of numbers: {value!r:.80}")
    return array.astype(np.float64)


def _flags(found: object, dim: int, place: str) -> list[bool]:
    if not isinstance(found, list) or len(found) != dim or not all(isinstance(one, bool) for one in found):
        raise ConfigError(f"{place} is {found!r:.80}: {dim} times true or false is expected")
    return found


def _check_mask(found: object, mask: NDArray[np.bool_], place: str) -> None:
    """What was normalised there must be what is normalised here."""
    if found is None:
        return
    flags = _flags(found, len(mask), place)
    if flags != mask.tolist():
        unmasked = [d for d, one in enumerate(flags) if not one]
        raise ConfigError(
            f"{place} leaves out the dimensions {unmasked}, and data.action.unmasked is {np.flatnonzero(~mask).tolist()}: set "
            f"data.action.unmasked: {unmasked}, or remove the key"
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
