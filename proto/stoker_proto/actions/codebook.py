"""The first level of `vq`: typical actions, found by k-means in each group of discrete values (see `space`).

Letters: N points, C continuous dimensions, K codewords, G groups.
"""

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from stoker_proto.actions.base import Float32Array, array_from_json, array_to_json
from stoker_proto.actions.kmeans import Int64Array, half_squared_norms, kmeans, nearest, uniform
from stoker_proto.actions.lattice import product_grid
from stoker_proto.actions.space import ActionSpace
from stoker_proto.errors import DataError
from stoker_proto.hashing import mix64

ROWS_PER_CODEWORD = 8
"""A codeword fitted to fewer actions would memorise them, and its residuals would not be those of other actions."""
_COVER_POINTS = 2_048


class Codebook:
    """K codewords, each of one group. A point's code is the nearest codeword of its own group."""

    def __init__(self, codewords: Float32Array, groups: Int64Array, num_groups: int) -> None:
        """Args:
        codewords: float32[K, C].
        groups: int64[K], values in [0, num_groups), each at least once.
        """
        if codewords.ndim != 2 or groups.shape != codewords.shape[:1] or set(groups.tolist()) != set(range(num_groups)):
            raise DataError(
                f"a damaged action codec: {list(codewords.shape)} codewords with {len(groups)} groups of {num_groups}; "
                "run loader-prepare again"
            )
        self.codewords, self.groups, self.num_groups = codewords, groups, num_groups
        self._columns = np.ascontiguousarray(codewords.T)
        own = groups == np.arange(num_groups)[:, None]  # [G, K]
        self._offsets = np.where(own, half_squared_norms(codewords), np.float32(np.inf)).astype(np.float32)

    def nearest(self, points: Float32Array, groups: Int64Array) -> Int64Array:
        """Points float32[N, C] of groups int64[N] -> codes int64[N]."""
        if self.num_groups == 1:
            return nearest(points, self._columns, self._offsets[0])
        return nearest(points, self._columns, self._offsets, groups)

    def distances(self) -> npt.NDArray[np.float64]:
        """float64[K, K] between codewords, in scaled units; infinite between those of different groups."""
        words = self.codewords.astype(np.float64)
        found: npt.NDArray[np.float64] = np.linalg.norm(words[:, None] - words[None], axis=-1)
        found[self.groups[:, None] != self.groups[None]] = np.inf
        return found

    def residuals(self, points: Float32Array, groups: Int64Array) -> Float32Array:
        """The points minus their codewords: float32[N, C]."""
        return points - self.codewords[self.nearest(points, groups)]

    @classmethod
    def fit(cls, points: Float32Array, groups: Int64Array, space: ActionSpace, *, size: int, by_kmeans: bool) -> Self:
        """Fit `size` codewords to points float32[N, C] of groups int64[N].

        A group's share of the codewords grows with its number of actions; it is at least a quarter of an equal share.
        Where there are too few actions for k-means, or without `by_kmeans`, codewords form a grid over the whole box, so that
        no action is far from every codeword.
        """
        counts = np.bincount(groups, minlength=space.num_groups)
        least = max(1, size // (4 * space.num_groups))
        shares = least + (size - least * space.num_groups) * counts // max(1, len(points))
        shares[counts.argmax()] += size - shares.sum()
        low, high = space.box
        parts = []
        for group, share in enumerate(shares.tolist()):
            own = points[groups == group]
            num_fitted = min(share, len(own) // ROWS_PER_CODEWORD) if by_kmeans else 0
            fitted = [kmeans(own, num_fitted, seed=group)] if num_fitted else []
            codewords = np.concatenate([*fitted, product_grid(low, high, max(1, share - num_fitted))])[:share]
            parts.append(np.concatenate([codewords, np.repeat(codewords[-1:], share - len(codewords), axis=0)]))
        return cls(np.concatenate(parts), np.repeat(np.arange(space.num_groups), shares), space.num_groups)

    def to_json(self) -> dict[str, Any]:
        """Codewords in Base64, and the group of each."""
        return {"words": array_to_json(self.codewords), "groups": self.groups.tolist()}

    @classmethod
    def from_json(cls, d: dict[str, Any], space: ActionSpace) -> Self:
        """The codebook that `to_json` described."""
        return cls(array_from_json(d["words"], np.float32), np.asarray(d["groups"], dtype=np.int64), space.num_groups)


def cover(space: ActionSpace) -> tuple[Float32Array, Int64Array]:
    """Points float32[N, C] all over the box, and groups int64[N]: actions that are possible but not in the sample."""
    low, high = space.box
    draws = uniform(_COVER_POINTS * len(low), seed=1).reshape(_COVER_POINTS, len(low))
    draws = np.clip(1.25 * draws - 0.125, 0.0, 1.0)  # a tenth of the points on each side of the box
    groups = mix64(np.arange(_COVER_POINTS, dtype=np.uint64)) % np.uint64(space.num_groups)
    return (low + draws * (high - low)).astype(np.float32), groups.astype(np.int64)
