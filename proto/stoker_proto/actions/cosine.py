"""The orthonormal DCT-II over the timesteps of a chunk, the same bits on every machine.

Loaders on different hosts must give a chunk the same codes, but BLAS chooses its order of summation by the processor. So the
matrix and its input are first rounded to multiples of 2**-20. Then every product and every sum is exact in float64 (at most
8 * 2**20 * 2**20 * 512 = 2**52), and the order does not matter.

Letters: N chunks, K timesteps (or frequencies), C dimensions.
"""

import math

import numpy as np
import numpy.typing as npt

from stoker_proto.actions.statistics import Float64Array

MAX_TIMESTEPS = 512
MAX_MAGNITUDE = 8.0
"""Largest magnitude of a value that is transformed."""
_STEP = 2.0**-20


class CosineTransform:
    """A chunk's values over time <-> their amplitudes over frequency, the lowest first.

    >>> CosineTransform(2).forward(np.array([[[1.0], [1.0]]])).ravel().round(4).tolist()
    [1.4142, 0.0]
    """

    def __init__(self, timesteps: int) -> None:
        """timesteps: K, at most MAX_TIMESTEPS."""
        angles = [[math.pi * k * (2 * t + 1) / (2 * timesteps) for t in range(timesteps)] for k in range(timesteps)]
        matrix = np.array([[math.cos(angle) for angle in row] for row in angles]) * math.sqrt(2.0 / timesteps)
        matrix[0] *= math.sqrt(0.5)
        self._matrix = _rounded(matrix)  # [K frequencies, K timesteps]

    def forward(self, values: npt.NDArray[np.floating]) -> Float64Array:
        """[N, K, C] within +-MAX_MAGNITUDE -> amplitudes float64[N, K, C]."""
        amplitudes: Float64Array = self._matrix @ _rounded(values.astype(np.float64))
        return amplitudes

    def backward(self, amplitudes: npt.NDArray[np.integer]) -> Float64Array:
        """The inverse: whole amplitudes int[N, K, C] -> float64[N, K, C]."""
        values: Float64Array = self._matrix.T @ amplitudes.astype(np.float64)
        return values


def _rounded(values: Float64Array) -> Float64Array:
    rounded: Float64Array = np.rint(values / _STEP) * _STEP
    return rounded
