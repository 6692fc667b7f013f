"""The residual levels of `vq`: a product lattice, finer where residuals are frequent. Its index is written level by level.

Each dimension is warped to [0, 1] by a piecewise linear curve, steep where residuals are dense, and cut into equal steps there.
The step's number is written in mixed radix with the coarsest digit in the first level. A level's code holds one digit per
dimension. Example with two dimensions and two levels of 8 codes, radices [4, 2] and [2, 4]: the steps (5, 3) of 8 x 8 are the
digits 5 = 2*2 + 1 and 3 = 0*4 + 3, so the codes are 2*2 + 0 = 4 and 1*4 + 3 = 7.

Why not k-means: codebooks fitted to residuals of a k-means level memorise small data sets. Measured on held-out smooth actions of
6 continuous dimensions with 256 codes: a further k-means level divides the error by 1.6 to 2.1, a level of the lattice by 2.4 to
2.6. The warp makes steps small where residuals are dense, and its floor bounds the error everywhere else.

Letters: N points, C dimensions, L levels, B pieces of a warp.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from stoker_proto.actions.base import Float32Array, array_from_json, array_to_json
from stoker_proto.actions.kmeans import Int64Array
from stoker_proto.errors import DataError

Float64Array = npt.NDArray[np.float64]

_MAX_PIECES = 64
_ROWS_PER_PIECE = 8
_FLOOR = 0.1
"""The share of the steps that is spread evenly over the whole range, for values that are not in the sample."""
_MAX_STEPS = 65_536
"""Most steps per dimension: more than float32 actions can use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualLattice:
    """Residuals float32[N, C] <-> codes int64[N, L]."""

    knots: tuple[Float64Array, ...]
    """Per dimension float64[B + 1], ascending: the ends of the warp's pieces."""
    heights: tuple[Float64Array, ...]
    """Per dimension float64[B + 1], from 0 to 1: the warp at its knots."""
    radices: Int64Array
    """int64[L, C]: the number of digits of a dimension in a level. Their product over a level is at most the codebook's size."""

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.radices)

    @classmethod
    def fit(cls, residuals: Float32Array, cover: Float32Array, *, num_levels: int, num_codes: int) -> Self:
        """Steps are small where `residuals` float32[M, C] are dense, and cover all of them and of `cover` float32[*, C]."""
        curves = [_warp(residuals[:, d], cover[:, d]) for d in range(residuals.shape[1])]
        spread = np.array([s for _, _, s in curves])
        radices = np.ones((num_levels, len(curves)), dtype=np.int64)
        steps = np.ones(len(curves), dtype=np.int64)
        for level in range(num_levels):
            radices[level] = allocate(spread, steps, num_codes)
            steps = steps * radices[level]
        return cls(knots=tuple(k for k, _, _ in curves), heights=tuple(h for _, h, _ in curves), radices=radices)

    def first(self, num_levels: int) -> Self:
        """The same lattice with its first levels only."""
        return type(self)(knots=self.knots, heights=self.heights, radices=self.radices[:num_levels])

    def encode(self, residuals: Float32Array) -> Int64Array:
        """float32[N, C] -> int64[N, L]. A residual outside the lattice takes the outermost step."""
        total = self.radices.prod(axis=0)
        steps = np.empty(residuals.shape, dtype=np.int64)
        for d, (knots, heights) in enumerate(zip(self.knots, self.heights, strict=True)):
            warped = _piecewise(residuals[:, d].astype(np.float64), knots, heights)
            steps[:, d] = np.clip(np.floor(warped * total[d]), 0, total[d] - 1)
        codes = np.empty((len(residuals), self.num_levels), dtype=np.int64)
        strides = _strides(self.radices)
        for level in reversed(range(self.num_levels)):
            codes[:, level] = (steps % self.radices[level] * strides[level]).sum(axis=1)
            steps //= self.radices[level]
        return codes

    def decode(self, codes: Int64Array) -> Float64Array:
        """int64[N, L] -> float64[N, C]: the middles of the steps. A code beyond a level's last is read as the last."""
        steps = np.zeros((len(codes), len(self.knots)), dtype=np.int64)
        if self.num_levels == 0:
            return steps.astype(np.float64)
        strides, sizes = _strides(self.radices), self.radices.prod(axis=1)
        for level, radices in enumerate(self.radices):
            code = np.minimum(codes[:, level], sizes[level] - 1)
            steps = steps * radices + code[:, None] // strides[level] % radices
        middles: Float64Array = (steps + 0.5) / self.radices.prod(axis=0)
        residuals: Float64Array = np.empty(middles.shape, dtype=np.float64)
        for d, (knots, heights) in enumerate(zip(self.knots, self.heights, strict=True)):
            residuals[:, d] = _piecewise(middles[:, d], heights, knots)  # the inverse of the warp
        return residuals

    def to_json(self) -> dict[str, Any]:
        """Arrays in Base64."""
        return {
            "knots": [array_to_json(k) for k in self.knots],
            "heights": [array_to_json(h) for h in self.heights],
            "radices": self.radices.tolist(),
        }

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Self:
        """The lattice that `to_json` described."""
        knots, heights = ([array_from_json(a, np.float64) for a in d[n]] for n in ("knots", "heights"))
        radices = np.asarray(d["radices"], dtype=np.int64).reshape(len(d["radices"]), len(knots))
        if any(k.shape != h.shape or k.ndim != 1 or len(k) < 2 for k, h in zip(knots, heights, strict=True)):
            raise DataError("a damaged action codec: knots and heights do not match; run loader-prepare again")
        if (radices < 1).any():
            raise DataError("a damaged action codec: a radix below 1; run loader-prepare again")
        return cls(knots=tuple(knots), heights=tuple(heights), radices=radices)


def allocate(spread: Float64Array, steps: Int64Array, num_codes: int) -> Int64Array:
    """Radices int64[C] of one level, product at most `num_codes`.

    There are two ways to grow the radices: by one or by doubling. The one with the larger product is taken, unless its error is
    more than a tenth larger: the next level can correct an uneven share, but not a lost code.

    Args:
        spread: float64[C], the error of a dimension with one step; with n steps the error is spread / n.
        steps: int64[C], the steps of a dimension after the earlier levels.
    """
    one_more = _greedy(spread, steps, num_codes, lambda radix: radix + 1)
    doubled = _greedy(spread, steps, num_codes, lambda radix: 2 * radix)
    first, second = sorted((one_more, doubled), key=lambda radices: -int(radices.prod()))
    errors = [float(np.cumsum(spread / (steps * radices))[-1]) if len(spread) else 0.0 for radices in (first, second)]
    return first if errors[0] <= 1.1 * errors[1] else second


def _greedy(spread: Float64Array, steps: Int64Array, num_codes: int, grow: Callable[[int], int]) -> Int64Array:
    """Repeatedly grow the radix of the dimension with the largest error whose growth still fits."""
    radices = np.ones(len(spread), dtype=np.int64)
    while True:
        for d in np.argsort(-(spread / (steps * radices)), kind="stable").tolist():
            grown = grow(int(radices[d]))
            product = int(radices.prod()) // int(radices[d]) * grown
            if product <= num_codes and spread[d] > 0 and steps[d] * grown <= _MAX_STEPS:
                radices[d] = grown
                break
        else:
            return radices


def product_grid(low: Float32Array, high: Float32Array, num_points: int) -> Float32Array:
    """At most `num_points` points float32[*, C] that cover the box as evenly as a product grid can."""
    span = (high - low).astype(np.float64)
    counts = allocate(span, np.ones(len(span), dtype=np.int64), num_points)
    index = np.arange(int(counts.prod()), dtype=np.int64)[:, None]
    digits = index // _strides(counts[None])[0] % counts
    grid: Float32Array = (low + (digits + 0.5) / counts * span).astype(np.float32)
    return grid


def _warp(residuals: Float32Array, cover: Float32Array) -> tuple[Float64Array, Float64Array, float]:
    """(knots, heights, error of one step) of one dimension.

    The mean absolute error is smallest when the density of steps is the root of the probability density (Panter and Dite's rule
    for the first power of the error).
    """
    ordered = np.sort(residuals).astype(np.float64)
    pieces = min(_MAX_PIECES, max(1, len(ordered) // _ROWS_PER_PIECE))
    inner = ordered[np.arange(pieces) * len(ordered) // pieces]
    low, high = min(ordered[0], cover.min()), max(ordered[-1], cover.max())
    if low == high:
        low, high = low - 1e-6, high + 1e-6
    knots = np.unique(np.concatenate([[low], inner, [ordered[-1], high]]).astype(np.float64)) + 0.0
    width = np.diff(knots)
    counts = np.diff(np.searchsorted(ordered, knots[1:-1], side="right"), prepend=0, append=len(ordered))
    counts[[0, -1]] += 1  # other values may be smaller or larger than all of the sample
    share = counts / (len(ordered) + 2)
    density = np.sqrt(share * width)  # of steps in a piece: width * sqrt(share / width)
    total = np.cumsum(density)[-1]
    rise = (1 - _FLOOR) * density / total + _FLOOR * width / (knots[-1] - knots[0])
    heights = np.concatenate([[0.0], np.cumsum(rise)])
    heights /= heights[-1]
    return knots, heights, float(np.cumsum(share * width / rise)[-1])


def _piecewise(x: Float64Array, knots: Float64Array, heights: Float64Array) -> Float64Array:
    """The piecewise linear curve through (knots, heights), extrapolated outside. Not `np.interp`, which may fuse operations."""
    piece = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
    slopes = np.diff(heights) / np.diff(knots)
    result: Float64Array = heights[piece] + (x - knots[piece]) * slopes[piece]
    return result


def _strides(radices: Int64Array) -> Int64Array:
    """int64[L, C]: how much one unit of a dimension's digit adds to a level's code. The last dimension counts fastest."""
    strides = np.ones_like(radices)
    strides[:, :-1] = np.cumprod(radices[:, :0:-1], axis=1)[:, ::-1]
    return strides
