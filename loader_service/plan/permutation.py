"""Keyed permutations: which record, which sample comes when. Exactly defined, so every loader makes the same ones.

Items are sorted by the splitmix64 hash of (their number, a key). The hash is a bijection of uint64, so there are no ties and
any sorting algorithm gives the same answer; NumPy's own generators promise no such thing from version to version.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stoker_proto.hashing import keyed_hashes


def keyed_permutation(count: int, key: int) -> NDArray[np.uint32]:
    """uint32[count]: the numbers 0..count-1 in the order that the 64-bit key gives them. count < 2**32."""
    return np.argsort(keyed_hashes(count, key)).astype(np.uint32)
