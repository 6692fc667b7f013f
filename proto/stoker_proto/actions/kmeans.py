"""k-means and nearest-codeword search whose results are the same bits on every machine.

Loaders on different hosts each fit the action codec, and their fingerprints must agree. An action must also get the same codes
wherever it is encoded. Libraries do not promise that: BLAS and threaded reductions choose their order of summation by the
processor. So only these operations are used here:

* elementwise IEEE-754 add, subtract, multiply, divide and compare (a multiply and an add are two calls, so never fused),
* `np.bincount` and `np.cumsum`, which add in the order of the rows,
* `argmin` / `argmax`, which return the first of equal values.

Letters: N points, K codewords, D dimensions.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from stoker_proto.hashing import keyed_hashes

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

_BLOCK_ELEMENTS = 65_536
"""Scores kept at once by `nearest`: two float32 blocks of this size stay in the second-level cache."""


def uniform(count: int, seed: int) -> npt.NDArray[np.float64]:
    """float64[count] in [0, 1), a pure function of `seed`, with 53 random bits each."""
    return (keyed_hashes(count, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def half_squared_norms(codebook: Float32Array) -> Float32Array:
    """|c|^2 / 2 of every codeword: codebook float32[K, D] -> float32[K]."""
    total = np.zeros(codebook.shape[0], dtype=np.float32)
    for column in codebook.T:
        total += column * column
    return total * np.float32(0.5)


def nearest(
    points: Float32Array, columns: Float32Array, offsets: Float32Array, groups: Int64Array | None = None
) -> Int64Array:
    """The nearest codeword (Euclidean) of every point, the first of equally near ones: int64[N].

    Minimises |c|^2 / 2 - p.c, which orders the codewords as |p - c|^2 does.

    Args:
        points: float32[N, D].
        columns: the codebook transposed, float32[D, K], C-contiguous.
        offsets: `half_squared_norms` of the codebook, float32[K]; with `groups` float32[G, K], +inf where a codeword is not
            in the group.
        groups: int64[N], each point's row of `offsets`.
    """
    num_points, num_codes = points.shape[0], columns.shape[1]
    used = [d for d in range(columns.shape[0]) if columns[d].any()]  # a column of zeros cannot change the order
    labels = np.empty(num_points, dtype=np.int64)
    step = max(1, _BLOCK_ELEMENTS // num_codes)
    product = np.empty((min(step, num_points), num_codes), dtype=np.float32)
    score = np.empty_like(product)
    for start in range(0, num_points, step):
        block = points[start : start + step]
        rows = block.shape[0]
        score[:rows] = offsets if groups is None else offsets[groups[start : start + step]]
        for d in used:
            np.multiply(block[:, d, None], columns[d], out=product[:rows])
            np.subtract(score[:rows], product[:rows], out=score[:rows])
        labels[start : start + rows] = score[:rows].argmin(axis=1)
    return labels


def squared_distances(points: Float32Array, centres: Float32Array) -> Float32Array:
    """|p - c|^2 of each row: float32[N, D] and float32[N, D] (or [D]) -> float32[N]."""
    total = np.zeros(points.shape[0], dtype=np.float32)
    for d in range(points.shape[1]):
        difference = points[:, d] - centres[..., d]
        total += difference * difference
    return total


def _seeds(points: Float32Array, num_codes: int, seed: int) -> Float32Array:
    """k-means++: each next seed is drawn with a probability proportional to its squared distance from the seeds so far."""
    draws = uniform(num_codes, seed)
    chosen = np.empty(num_codes, dtype=np.int64)
    chosen[0] = int(draws[0] * len(points))
    distance = squared_distances(points, points[chosen[0]])
    for i in range(1, num_codes):
        cumulative = np.cumsum(distance, dtype=np.float64)
        # The bound matters when the points have fewer distinct values than there are codes: all distances are then 0.
        chosen[i] = min(int(np.searchsorted(cumulative, draws[i] * cumulative[-1], side="right")), len(points) - 1)
        distance = np.minimum(distance, squared_distances(points, points[chosen[i]]))
    return points[chosen]


def _means(points: Float32Array, labels: Int64Array, codebook: Float32Array) -> Float32Array:
    """The mean of every cluster. Empty clusters take the points farthest from their codewords, one each."""
    num_codes = codebook.shape[0]
    counts = np.bincount(labels, minlength=num_codes)
    means = codebook.copy()
    filled = counts > 0
    for d in range(points.shape[1]):
        sums: npt.NDArray[Any] = np.bincount(labels, weights=points[:, d], minlength=num_codes)
        means[filled, d] = (sums[filled] / counts[filled]).astype(np.float32)
    empty = np.flatnonzero(~filled)
    if len(empty):
        distance = squared_distances(points, codebook[labels])
        farthest = np.argsort(-distance, kind="stable")[: len(empty)]
        farthest = farthest[distance[farthest] > 0]  # a point that is a codeword already needs no other
        means[empty[: len(farthest)]] = points[farthest]
    return means


def kmeans(points: Float32Array, num_codes: int, *, seed: int, max_iterations: int = 20) -> Float32Array:
    """A codebook float32[num_codes, D] for points float32[N, D], N >= 1: k-means++, then at most `max_iterations` of Lloyd's.

    Bit-identical on every machine (see the module). With fewer distinct points than codes, codewords repeat.
    """
    codebook = _seeds(points, num_codes, seed)
    labels = None
    for _ in range(max_iterations):
        found = nearest(points, np.ascontiguousarray(codebook.T), half_squared_norms(codebook))
        if labels is not None and np.array_equal(found, labels):
            break
        labels = found
        codebook = _means(points, labels, codebook)
    return codebook
