"""Token ids as arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


def int32_array(ids: Iterable[int]) -> Ids:
    """int32[T] of Python's integers, in half the time that `np.array` takes."""
    return np.frombuffer(array("i", ids), np.int32)
