"""The space that `vq` and `fast` quantise in: continuous dimensions at a similar scale, without the discrete ones.

A gripper that is -1 or 1, and a rotation that is always 0, must come back exactly. They are not quantised: each combination of
their values is a group with its own codewords. Example with the dimensions x, y (continuous), rz (always 0.0), gripper (-1 or 1):

    action [0.2, -0.4, 0.0, 1.0]  ->  scaled point [0.25, -0.5], group 1     (groups: 0 = (0.0, -1.0), 1 = (0.0, 1.0))

Letters: N actions, D dimensions of an action, C of them continuous.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from stoker_proto.actions.base import Float32Array, array_from_json, array_to_json
from stoker_proto.actions.kmeans import Int64Array
from stoker_proto.actions.statistics import ActionStatistics

_MAX_VALUES = 4
"""A dimension with more distinct values than this is continuous."""
_SAMPLES_PER_VALUE = 8
"""A dimension is discrete only if the sample has at least this many actions per value."""
_REACH = 8.0
"""Values farther from the middle than this many halves of q01..q99 are clipped, so that one outlier does not coarsen the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSpace:
    """Actions in the dataset's units <-> (scaled continuous point, group of discrete values)."""

    centre: Float32Array
    """float32[D]; the middle of q01..q99."""
    scale: Float32Array
    """float32[D], positive; half of q01..q99, so that most scaled values lie in [-1, 1]."""
    lower: Float32Array
    """float32[D]; smaller values are clipped to it."""
    upper: Float32Array
    values: tuple[Float32Array, ...]
    """Per dimension its distinct values, ascending; empty for a continuous dimension."""

    @property
    def continuous(self) -> list[int]:
        """The continuous dimensions, ascending."""
        return [d for d, values in enumerate(self.values) if len(values) == 0]

    @property
    def num_groups(self) -> int:
        """Number of combinations of discrete values, seen or not."""
        product = 1
        for values in self.values:
            product *= max(1, len(values))
        return product

    @property
    def box(self) -> tuple[Float32Array, Float32Array]:
        """The lowest and highest scaled point: float32[C] each."""
        low, high = (self.lower - self.centre) / self.scale, (self.upper - self.centre) / self.scale
        return low[self.continuous], high[self.continuous]

    @classmethod
    def fit(cls, sample: Float32Array, statistics: ActionStatistics, *, max_groups: int) -> Self:
        """From a sample float32[M, D] and the statistics of the whole source; at most `max_groups` groups."""
        low, high = statistics.min, statistics.max
        middle, half = (statistics.q01 + statistics.q99) / 2, (statistics.q99 - statistics.q01) / 2
        flat = half == 0  # nearly always the same value: use its whole range instead
        middle, half = np.where(flat, (low + high) / 2, middle), np.where(flat, (high - low) / 2, half)
        lower, upper = np.maximum(low, middle - _REACH * half), np.minimum(high, middle + _REACH * half)
        return cls(
            centre=middle.astype(np.float32),
            scale=np.where(half > 0, half, 1.0).astype(np.float32),
            lower=lower.astype(np.float32),
            upper=upper.astype(np.float32),
            values=_discrete_values(sample, statistics, max_groups),
        )

    def to_scaled(self, actions: Float32Array) -> tuple[Float32Array, Int64Array]:
        """Actions float32[N, D] -> points float32[N, C], groups int64[N] (by the nearest discrete values)."""
        clipped = np.clip(actions, self.lower, self.upper)
        scaled = (clipped - self.centre) / self.scale
        groups = np.zeros(len(actions), dtype=np.int64)
        for d, values in enumerate(self.values):
            if len(values) > 1:
                middles = (values[:-1] + values[1:]) * np.float32(0.5)
                groups = groups * len(values) + np.searchsorted(middles, actions[:, d])
        return np.ascontiguousarray(scaled[:, self.continuous]), groups

    def from_scaled(self, points: npt.NDArray[np.float64], groups: Int64Array) -> Float32Array:
        """Points float64[N, C] and groups int64[N] -> actions float32[N, D], never outside [lower, upper]."""
        actions = np.empty((len(points), len(self.values)), dtype=np.float32)
        for i, d in enumerate(self.continuous):
            value = points[:, i] * np.float64(self.scale[d]) + np.float64(self.centre[d])
            actions[:, d] = np.clip(value.astype(np.float32), self.lower[d], self.upper[d])
        for d in reversed(range(len(self.values))):
            values = self.values[d]
            if len(values) > 0:
                actions[:, d] = values[groups % len(values)]
                groups = groups // len(values)
        return actions

    def outside(self, actions: Float32Array) -> npt.NDArray[np.bool_]:
        """bool[..., D]: numbers of float32[..., D] that cannot come back: out of range, or an unknown discrete value."""
        found: npt.NDArray[np.bool_] = (actions < self.lower) | (actions > self.upper)
        for d, values in enumerate(self.values):
            if len(values) > 0:
                found[..., d] |= ~np.isin(actions[..., d], values)
        return found

    def to_json(self) -> dict[str, Any]:
        """Arrays in Base64."""
        names = ("centre", "scale", "lower", "upper")
        values = [array_to_json(v) for v in self.values]
        return {**{n: array_to_json(getattr(self, n)) for n in names}, "values": values}

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Self:
        """The space that `to_json` described."""
        arrays = {n: array_from_json(d[n], np.float32) for n in ("centre", "scale", "lower", "upper")}
        return cls(values=tuple(array_from_json(v, np.float32) for v in d["values"]), **arrays)


def _discrete_values(sample: Float32Array, statistics: ActionStatistics, max_groups: int) -> tuple[Float32Array, ...]:
    """The distinct values of each discrete dimension, none for a continuous one. Dimensions with the fewest values come first,
    until there would be more than `max_groups` groups."""
    found = [np.unique(sample[:, d]) + np.float32(0.0) for d in range(sample.shape[1])]  # + 0.0: no -0.0
    chosen = [np.empty(0, dtype=np.float32)] * len(found)
    groups = 1
    for d in sorted(range(len(found)), key=lambda d: (len(found[d]), d)):
        constant = len(found[d]) == 1 and statistics.min[d] == statistics.max[d]
        few = 2 <= len(found[d]) <= _MAX_VALUES and len(found[d]) * _SAMPLES_PER_VALUE <= len(sample)
        if constant or (few and groups * len(found[d]) <= max_groups):
            chosen[d] = found[d]
            groups *= len(found[d])
    return tuple(chosen)
