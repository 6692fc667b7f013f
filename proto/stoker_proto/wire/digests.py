"""Digests of samples as they travel, row by row. Two runs that trained on the same rows have the same digests."""

from __future__ import annotations

import hashlib
import importlib
import sys
from types import ModuleType

import numpy as np

from stoker_proto.wire.messages import Piece

_LARGE_BYTES = 64 << 10
"""An image of at least this size is first hashed with XXH3-128 (20 GB/s), whose 16 bytes go into SHA-256 (1.8 GB/s). Frames that
travel as pixels are that large; SHA-256 over them costs more than all other work of the rank."""

RULES = (1, 2)
"""2: as above. 1: images of any size go into SHA-256 as they are. Records of runs without a rule were made by rule 1."""


def _xxhash() -> ModuleType | None:
    """The package, which `pip install` brings along; None on a host that was given only some of the packages."""
    try:
        return importlib.import_module("xxhash")
    except ModuleNotFoundError:
        return None


_XXHASH = _xxhash()
RULE = 1 if _XXHASH is None else 2
"""The rule of this program's own digests."""


def digests_of_rows(piece: Piece, rule: int = RULE) -> list[bytes]:
    """SHA-256 of each row: the digest of its only sample, or the hash over its samples' digests. Independent of piece borders."""
    samples = digests_of_samples(piece, rule)
    if not len(piece.row_samples):
        return samples
    ends = np.cumsum(piece.row_samples, dtype=np.int64).tolist()
    rows = [samples[first:last] for first, last in zip([0, *ends], ends, strict=False)]
    return [row[0] if len(row) == 1 else hashlib.sha256(b"".join(row)).digest() for row in rows]


def digests_of_samples(piece: Piece, rule: int = RULE) -> list[bytes]:
    """SHA-256 of each sample: key, sizes, tokens, labels, action chunk, images as encoded on the wire. Rule 2 needs xxhash."""
    large_bytes = _LARGE_BYTES if rule > 1 else sys.maxsize
    count = len(piece.lengths)
    sizes = np.empty((count, 4), "<i8")  # tokens, timesteps, dimensions, images
    sizes[:, 0], sizes[:, 1:3], sizes[:, 3] = piece.lengths, piece.actions.shape[1:], piece.image_counts
    heads = np.hstack([piece.keys, sizes]).tobytes()
    ends, image_ends = np.cumsum(sizes[:, 0]).tolist(), np.cumsum(sizes[:, 3]).tolist()
    ids, supervised = memoryview(piece.input_ids.tobytes()), memoryview(piece.supervised.tobytes())
    actions, auxiliary = memoryview(piece.actions.tobytes()), memoryview(piece.auxiliary.tobytes())
    head_bytes, id_bytes = 56, piece.input_ids.itemsize
    action_bytes, auxiliary_bytes = len(actions) // max(count, 1), len(auxiliary) // max(count, 1)
    digests, first, first_image = [], 0, 0
    for row, (end, image_end) in enumerate(zip(ends, image_ends, strict=True)):
        parts: list[bytes | memoryview] = [
            heads[row * head_bytes : (row + 1) * head_bytes],
            ids[id_bytes * first : id_bytes * end],
            supervised[first:end],
            actions[row * action_bytes : (row + 1) * action_bytes],
            auxiliary[row * auxiliary_bytes : (row + 1) * auxiliary_bytes],
        ]
        for image in piece.images[first_image:image_end]:
            parts.append(len(image).to_bytes(8, "little"))
            parts.append(image if len(image) < large_bytes else _xxh3_128(image))
        digests.append(hashlib.sha256(b"".join(parts)).digest())
        first, first_image = end, image_end
    return digests


def _xxh3_128(image: bytes | memoryview) -> bytes:
    assert _XXHASH is not None, "rule 2 is used only where the package is"
    digest: bytes = _XXHASH.xxh3_128_digest(image)
    return digest
