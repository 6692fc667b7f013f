"""Pieces of some rows each -> the piece of all rows, byte for byte as one loader would have sent it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import RemoteProtocolError
from stoker_proto.wire.messages import Piece

Part = tuple[NDArray[np.int64], Piece]
"""(places of its rows among all rows, ascending; the piece of these rows, one sample each)."""


def merge_pieces(ticket: int, parts: Sequence[Part]) -> Piece:
    """The piece of a ticket whose rows the parts have, each once. Raises RemoteProtocolError where they do not fit together."""
    places = np.concatenate([rows for rows, _ in parts])  # [N]
    order = np.argsort(places, kind="stable")  # [N]: row -> its number in the parts, one after the other
    pieces = [piece for _, piece in parts]
    if not np.array_equal(places[order], np.arange(len(places))) or any(len(piece.row_samples) for piece in pieces):
        raise RemoteProtocolError("the pieces of a ticket's rows do not make up the rows, one sample each")
    lengths = np.concatenate([piece.lengths for piece in pieces])
    counts = np.concatenate([piece.image_counts for piece in pieces])
    tokens = _gather(lengths, order)
    images = list(chain.from_iterable(piece.images for piece in pieces))
    skipped: dict[int, str] = {}
    for rows, piece in parts:
        skipped |= {int(rows[sample]): reason for sample, reason in piece.skipped.items() if 0 <= sample < len(rows)}
    sizes = [len(rows) for rows, _ in parts]
    return Piece(
        ticket=ticket,
        loader=pieces[0].loader,
        keys=np.concatenate([piece.keys for piece in pieces])[order],
        lengths=lengths[order],
        input_ids=np.concatenate([piece.input_ids for piece in pieces])[tokens],
        supervised=np.concatenate([piece.supervised for piece in pieces])[tokens],
        image_counts=counts[order],
        images=[images[i] for i in _gather(counts, order).tolist()],
        actions=_filled([piece.actions for piece in pieces], sizes, "actions")[order],
        auxiliary=_auxiliary([piece.auxiliary for piece in pieces], sizes, order),
        skipped=dict(sorted(skipped.items())),
    )


def _gather(lengths: NDArray[np.int32] | NDArray[np.uint8], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Items of rows that lie one after another, in another order of the rows. lengths: items of each row [N]."""
    sizes = lengths.astype(np.int64)
    begins = (np.cumsum(sizes) - sizes)[order]
    sizes = sizes[order]
    return np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))


def _filled(values: Sequence[NDArray[np.float32]], sizes: Sequence[int], name: str) -> NDArray[np.float32]:
    """The values of all rows; NaN for the rows of a piece that has none, as a loader writes for a sample that has none."""
    shapes = {value.shape[1:] for value in values if value.size}
    if len(shapes) > 1:
        raise RemoteProtocolError(f"the pieces of a ticket's rows have {name} of different shapes: {sorted(shapes)}")
    if not shapes:
        return np.concatenate(values)
    (shape,) = shapes
    missing = [np.full((size, *shape), np.nan, np.float32) for size in sizes]
    return np.concatenate([value if value.size else nan for value, nan in zip(values, missing, strict=True)])


def _auxiliary(
    values: Sequence[NDArray[np.float32]], sizes: Sequence[int], order: NDArray[np.int64]
) -> NDArray[np.float32]:
    """float32[N, A], or [0, 0] where no piece has any."""
    if not any(value.size for value in values):
        return np.zeros((0, 0), np.float32)
    return _filled(values, sizes, "auxiliary values")[order]
