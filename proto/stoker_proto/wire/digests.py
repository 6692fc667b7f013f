"""Digests of samples as they travel, row by row. Two runs that trained on the same rows have the same digests."""

from __future__ import annotations

import hashlib

import numpy as np

from stoker_proto.wire.messages import Piece


def digests_of_rows(piece: Piece) -> list[bytes]:
    """SHA-256 of each row: the digest of its only sample, or the hash over its samples' digests. Independent of piece borders."""
    samples = digests_of_samples(piece)
    if not len(piece.row_samples):
        return samples
    ends = np.cumsum(piece.row_samples, dtype=np.int64).tolist()
    rows = [samples[first:last] for first, last in zip([0, *ends], ends, strict=False)]
    return [row[0] if len(row) == 1 else hashlib.sha256(b"".join(row)).digest() for row in rows]


def digests_of_samples(piece: Piece) -> list[bytes]:
    """SHA-256 of each sample: key, sizes, tokens, labels, action chunk, and images as encoded on the wire."""
    tokens = np.concatenate([[0], np.cumsum(piece.lengths, dtype=np.int64)]).tolist()
    images = np.concatenate([[0], np.cumsum(piece.image_counts, dtype=np.int64)]).tolist()
    digests = []
    for row in range(len(piece.lengths)):
        sizes = (piece.lengths[row], *piece.actions.shape[1:], piece.image_counts[row])
        digest = hashlib.sha256(piece.keys[row].tobytes() + np.array(sizes, "<i8").tobytes())
        digest.update(piece.input_ids[tokens[row] : tokens[row + 1]].tobytes())
        digest.update(piece.supervised[tokens[row] : tokens[row + 1]].tobytes())
        digest.update(piece.actions[row].tobytes())
        if piece.auxiliary.size:
            digest.update(piece.auxiliary[row].tobytes())
        for image in piece.images[images[row] : images[row + 1]]:
            digest.update(len(image).to_bytes(8, "little"))
            digest.update(image)
        digests.append(digest.digest())
    return digests
