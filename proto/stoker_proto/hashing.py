"""Keyed integers and fingerprints that are the same on every machine and for every version of every library.

NumPy does not promise that its generators keep their streams, and a batch must be a pure function of its ticket. So every random
choice of the order and of the augmentation is a hash of the thing it is for.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014) of each element: a bijection of uint64, so no ties."""
    mixed = values.astype(np.uint64, copy=True)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def key64(*parts: int | str) -> int:
    """A 64-bit key made of the names and numbers of its use, e.g. `key64("window", seed, epoch, lane, window)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keyed_hashes(count: int, key: int) -> NDArray[np.uint64]:
    """uint64[count], all different: the hashes of 0..count-1 under the key."""
    values = np.arange(count, dtype=np.uint64)
    values *= np.uint64(_GOLDEN)
    values += np.uint64(key & _MASK)
    return mix64(values)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; raises ValueError for NaN, which JSON does not have."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
