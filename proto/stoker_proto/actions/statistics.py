"""Per-dimension statistics of a source's actions, gathered in one pass, in any order, over any number of processes.

Two loaders that scan the same shards in a different order must write the same manifest, bit for bit. So sums are exact: a float32
is an integer of 24 bits times a power of two, and integers are added per exponent. Quantiles and the codec's fit use a sample
that depends only on the actions' keys: the actions whose keys have the smallest hashes.

Letters: N actions, D dimensions of an action, M actions in the sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from stoker_proto.errors import DataError
from stoker_proto.hashing import mix64

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Number = TypeVar("Number", bound=np.generic)

_SMALLEST_EXPONENT = -149  # the smallest positive float32 is 2**-149
_NUM_EXPONENTS = 280  # frexp of a float32 gives -148 .. 128
_BUFFER_ROWS = 16_384  # small adds are buffered: a numpy call costs as much for 50 actions as for 1,000


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionStatistics:
    """Statistics of a source's actions per dimension, in the units of the dataset. All arrays are [D]."""

    count: int
    """Number of actions (timesteps) seen."""
    min: Float64Array
    max: Float64Array
    mean: Float64Array
    std: Float64Array
    """Population standard deviation."""
    q01: Float64Array
    """1st percentile (linear between order statistics). If the source is larger than the sample, that of the sample."""
    q99: Float64Array
    mask: npt.NDArray[np.bool_]
    """True: normalised by q01 and q99. False: not normalised, as OpenVLA does with the gripper."""

    def __post_init__(self) -> None:
        lengths = {f.name: np.shape(getattr(self, f.name)) for f in fields(self) if f.name != "count"}
        if len(set(lengths.values())) != 1 or len(self.min.shape) != 1:
            raise DataError(
                f"action statistics whose parts differ in length: {lengths}; every part needs one value per dimension"
            )

    @property
    def dim(self) -> int:
        """D, the dimensions of an action."""
        return len(self.min)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; floats are exact."""
        return {f.name: self.count if f.name == "count" else getattr(self, f.name).tolist() for f in fields(self)}

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Self:
        """The statistics that `to_json` wrote. Raises DataError for a missing or unknown name."""
        names = {f.name for f in fields(cls)}
        if set(d) != names:
            raise DataError(f"action statistics with the names {sorted(d)}; expected {sorted(names)}")
        arrays = {n: np.asarray(d[n], dtype=bool if n == "mask" else np.float64) for n in names - {"count"}}
        return cls(count=int(d["count"]), **arrays)

    def widened(self) -> Self:
        """The same, with min and max in place of q01 and q99 in a normalised dimension where these are equal although it
        moves.

        A gripper that closes in one timestep of 200 has q01 = q99, and its movements would be clipped away.
        """
        flat = self.mask & (self.q01 == self.q99) & (self.min < self.max)
        return replace(self, q01=np.where(flat, self.min, self.q01), q99=np.where(flat, self.max, self.q99))

    def normalise(self, actions: npt.ArrayLike) -> Float32Array:
        """[..., D] in the units of the dataset -> float32[..., D]: 2 (x - q01) / (q99 - q01 + 1e-8) - 1, clipped to [-1, 1],
        where `mask`, else x. A dimension with min = max becomes 0.

        Source: openvla `prismatic/vla/datasets/rlds/utils/data_utils.py`, BOUNDS_Q99.
        """
        x = np.asarray(actions, dtype=np.float64)
        scaled = np.clip(2.0 * (x - self.q01) / (self.q99 - self.q01 + 1e-8) - 1.0, -1.0, 1.0)
        result = np.where(self.min == self.max, 0.0, np.where(self.mask, scaled, x))
        return result.astype(np.float32)

    def unnormalise(self, x: npt.ArrayLike) -> Float32Array:
        """The inverse of `normalise` on [-1, 1], float32[..., D]. A dimension with min = max becomes that value."""
        normalised = np.asarray(x, dtype=np.float64)
        scaled = 0.5 * (normalised + 1.0) * (self.q99 - self.q01) + self.q01
        result = np.where(self.min == self.max, self.min, np.where(self.mask, scaled, normalised))
        return result.astype(np.float32)


def smallest_hashes(
    hashes: npt.NDArray[np.uint64], rows: npt.NDArray[Number], keep: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[Number]]:
    """uint64[n] and [n, ...]: the `keep` rows with the smallest hashes, in no particular order."""
    if len(hashes) <= keep:
        return hashes, rows
    kept = np.argpartition(hashes, keep - 1)[:keep]
    return hashes[kept], rows[kept]


class StatisticsAccumulator:
    """Streaming, mergeable statistics. The order of `add` and `merge` does not change a bit of the result.

    Memory: at most 2 * capacity + 16,384 rows, for a source of any size.
    """

    def __init__(self, dim: int, *, capacity: int = 65_536) -> None:
        """Args:
        dim: D.
        capacity: M, how many actions the sample keeps. Only accumulators of equal capacity can be merged.
        """
        if dim < 1 or capacity < 1:
            raise DataError(f"actions of {dim} dimensions and a sample of {capacity}: both must be at least 1")
        self.dim, self.capacity = dim, capacity
        self.count = 0
        self._min = np.full(dim, np.inf, dtype=np.float32)
        self._max = np.full(dim, -np.inf, dtype=np.float32)
        # int64[3, D * exponents]: sums of the mantissas; of the high and of the low half of their squares
        self._sums = np.zeros((3, dim * _NUM_EXPONENTS), dtype=np.int64)
        self._hashes = np.empty(0, dtype=np.uint64)
        self._rows = np.empty((0, dim), dtype=np.float32)
        self._buffer = np.empty((min(_BUFFER_ROWS, 4 * capacity), dim), dtype=np.float32)
        self._buffer_keys = np.empty(len(self._buffer), dtype=np.uint64)
        self._buffered = 0

    def add(self, actions: npt.ArrayLike, keys: npt.NDArray[np.uint64]) -> None:
        """Count actions float32[N, D]. keys: uint64[N], unique in the source (e.g. record << 20 | timestep)."""
        rows = check_rows(actions, self.dim)
        if len(rows) != len(keys):
            raise DataError(f"{len(rows)} actions with {len(keys)} keys; every action needs one")
        self.count += len(rows)
        for start in range(0, len(rows), len(self._buffer)):
            block, names = rows[start : start + len(self._buffer)], keys[start : start + len(self._buffer)]
            if self._buffered + len(block) > len(self._buffer):
                self._flush()
            end = self._buffered + len(block)
            self._buffer[self._buffered : end] = block
            self._buffer_keys[self._buffered : end] = names
            self._buffered = end

    def merge(self, other: "StatisticsAccumulator") -> None:
        """Add what `other` has counted; `other` stays as it is. Raises DataError where dimensions or capacities differ."""
        if (self.dim, self.capacity) != (other.dim, other.capacity):
            raise DataError(
                f"statistics of {other.dim} dimensions with a sample of {other.capacity} do not merge into "
                f"{self.dim} dimensions with a sample of {self.capacity}"
            )
        other._flush()
        self._flush()
        self.count += other.count
        self._min, self._max = np.minimum(self._min, other._min), np.maximum(self._max, other._max)
        self._sums += other._sums
        self._keep(other._hashes, other._rows)

    def finish(self, mask: npt.ArrayLike | None = None) -> tuple[ActionStatistics, Float32Array]:
        """The statistics, and the sample float32[M, D] in the order of the hashes (so any part of it is a fair sample).

        Args:
            mask: bool[D], see `ActionStatistics.mask`; default: every dimension is normalised.
        """
        self._flush()
        if self.count == 0:
            raise DataError("no actions at all: there is nothing to normalise by or to fit a codec to")
        order = np.argsort(self._hashes, kind="stable")
        sample = self._rows[order]
        mean, std = self._moments()
        statistics = ActionStatistics(
            count=self.count,
            min=self._min.astype(np.float64) + 0.0,  # + 0.0: -0.0 and 0.0 are equal, so which came first must not show
            max=self._max.astype(np.float64) + 0.0,
            mean=mean,
            std=std,
            q01=quantile(sample, 0.01),
            q99=quantile(sample, 0.99),
            mask=np.ones(self.dim, dtype=bool) if mask is None else np.asarray(mask, dtype=bool),
        )
        return statistics, sample

    def to_arrays(self, keep: int) -> dict[str, npt.NDArray[Any]]:
        """Arrays for a file: count; extremes [2, D]; sums of the used exponents; hashes [M] and rows [M, D] with M <= keep."""
        self._flush()
        used = np.flatnonzero(self._sums.any(axis=0))
        hashes, rows = smallest_hashes(self._hashes, self._rows, keep)
        return {
            "count": np.array(self.count),
            "extremes": np.stack([self._min, self._max]),
            "used": used,
            "sums": self._sums[:, used],
            "hashes": hashes,
            "rows": rows,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], keep: int, *, capacity: int = 65_536) -> Self | None:
        """The inverse, with a sample of at most `keep` actions. None if too few are in the file although more were seen."""
        hashes, rows, extremes = arrays["hashes"], arrays["rows"], arrays["extremes"]
        count = int(arrays["count"])
        if len(hashes) < min(keep, count):
            return None
        if extremes.ndim != 2 or rows.shape != (len(hashes), extremes.shape[1]):
            raise DataError("saved statistics whose arrays do not fit each other")
        actions = cls(extremes.shape[1], capacity=capacity)
        actions.count = count
        actions._min, actions._max = extremes[0].copy(), extremes[1].copy()
        actions._sums[:, arrays["used"]] = arrays["sums"]
        actions._hashes, actions._rows = smallest_hashes(hashes, rows, keep)
        return actions

    def _flush(self) -> None:
        if self._buffered == 0:
            return
        rows, keys = self._buffer[: self._buffered], self._buffer_keys[: self._buffered]
        self._buffered = 0
        self._min, self._max = np.minimum(self._min, rows.min(axis=0)), np.maximum(self._max, rows.max(axis=0))
        self._sums += _exponent_sums(rows)
        hashes = mix64(keys)
        if len(self._hashes) == self.capacity:  # most rows of a large source are dropped here
            near = hashes < self._hashes.max()
            hashes, rows = hashes[near], rows[near]
        self._keep(hashes, rows)

    def _keep(self, hashes: npt.NDArray[np.uint64], rows: Float32Array) -> None:
        """Keep the `capacity` smallest hashes of the sample and of these rows."""
        hashes, rows = np.concatenate([self._hashes, hashes]), np.concatenate([self._rows, rows])
        self._hashes, self._rows = smallest_hashes(hashes, rows, self.capacity)

    def _moments(self) -> tuple[Float64Array, Float64Array]:
        """Mean and standard deviation from the exact sums, each rounded once; the root rounds the deviation once more."""
        sums = self._sums.reshape(3, self.dim, _NUM_EXPONENTS)
        powers = [Fraction(2) ** (e + _SMALLEST_EXPONENT - 24) for e in range(_NUM_EXPONENTS)]
        mean, std = np.empty(self.dim), np.empty(self.dim)
        for d in range(self.dim):
            used = np.flatnonzero(sums[:, d].any(axis=0)).tolist()
            total = sum((int(sums[0, d, e]) * powers[e] for e in used), Fraction(0))
            squares = sum(
                ((int(sums[1, d, e]) * 2**24 + int(sums[2, d, e])) * powers[e] ** 2 for e in used), Fraction(0)
            )
            mean[d] = float(total / self.count)
            std[d] = np.sqrt(float(squares / self.count - (total / self.count) ** 2))
        return mean, std


def check_rows(actions: npt.ArrayLike, dim: int) -> Float32Array:
    """The actions as float32[N, D]. Raises DataError naming the row of a wrong width or of a value that is not finite."""
    try:
        rows = np.asarray(actions, dtype=np.float32)
    except (ValueError, TypeError) as error:
        rows_of_lists: Any = actions
        for i, row in enumerate(rows_of_lists):
            if np.shape(row) != (dim,):
                raise DataError(f"row {i}: shape {list(np.shape(row))}; an action has {dim} numbers") from error
        raise DataError(f"actions that are not numbers: {error}") from error
    if rows.ndim != 2 or rows.shape[1] != dim:
        width = rows.shape[-1] if rows.ndim else 0
        raise DataError(f"row 0: {width} numbers (actions of shape {list(rows.shape)}); an action has {dim}")
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0].tolist()
        raise DataError(f"row {row}: dimension {column} is {rows[row, column]}; an action needs finite numbers")
    return rows


def quantile(sample: Float32Array, fraction: float) -> Float64Array:
    """Per dimension, linear between order statistics (numpy's default rule): float32[M, D] -> float64[D].

    Implemented here, because manifests of different numpy versions must agree to the bit.
    """
    ordered = np.sort(sample, axis=0).astype(np.float64)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    result: Float64Array = ordered[below] + (ordered[above] - ordered[below]) * (position - below) + 0.0
    return result


def _exponent_sums(rows: Float32Array) -> npt.NDArray[np.int64]:
    """Exact int64[3, D * exponents]: sums of mantissas, and of their squares' high and low 24 bits."""
    mantissa, exponent = np.frexp(rows)  # row = mantissa * 2**exponent, 0.5 <= |mantissa| < 1
    integer = mantissa.astype(np.float64).ravel() * 2.0**24
    dims = np.arange(rows.shape[1], dtype=np.int64) * _NUM_EXPONENTS
    cell = (exponent.astype(np.int64) - _SMALLEST_EXPONENT + dims).ravel()
    square = integer * integer  # below 2**48: exact
    high = np.floor(square * 2.0**-24)
    low = square - high * 2.0**24
    size = rows.shape[1] * _NUM_EXPONENTS
    sums = [np.bincount(cell, weights=part, minlength=size) for part in (integer, high, low)]
    return np.stack(sums).astype(np.int64)
