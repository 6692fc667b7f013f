"""Pieces of a ticket's parts, merged: the bytes that one loader would have sent."""

from __future__ import annotations

import random

import numpy as np
import pytest

from loader_service.pieces.piece import EncodedRecord, EncodedSample, assemble_piece
from loader_service.plan.lane_plan import Rows, SampleRef
from stoker_proto.errors import RemoteProtocolError
from stoker_proto.wire.messages import Piece, Ticket, piece_payload
from trainer.feed.client.merge import merge_pieces

FILLER = EncodedSample(np.array([2], np.int32), np.zeros(1, np.uint8), (), None, timestep=0)


def some_sample(rng: random.Random, number: int) -> EncodedSample:
    """With or without images, an action and auxiliary values."""
    length = rng.randrange(1, 6)
    images = tuple(b"%d/%d" % (number, n) for n in range(rng.randrange(3)))
    action = np.full((2, 3), number, np.float32) if rng.random() < 0.7 else None
    auxiliary = np.full(2, number, np.float32) if rng.random() < 0.5 else None
    tokens = np.arange(length, dtype=np.int32) + 100 * number
    return EncodedSample(tokens, (tokens % 2).astype(np.uint8), images, action, number, auxiliary)


def piece_of(records: dict[int, EncodedRecord], numbers: list[int], ticket: int) -> Piece:
    asked = Ticket(ticket=ticket, split="train", epoch=0, lane=0, start=0, count=len(numbers))
    return assemble_piece(asked, "a", 4, Rows([SampleRef(n, 0) for n in numbers], None), records, FILLER)


@pytest.mark.parametrize("seed", range(40))
def test_merged_parts_are_the_piece_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(1, 12)
    records = {
        n: EncodedRecord(error=f"record {n} is bad") if rng.random() < 0.2 else EncodedRecord([some_sample(rng, n)])
        for n in range(count)
    }
    numbers = rng.sample(range(count), count)
    owner = [rng.randrange(3) for _ in numbers]
    parts = []
    for one in sorted(set(owner), key=lambda _: rng.random()):
        rows = [row for row, of in enumerate(owner) if of == one]
        parts.append((np.array(rows, np.int64), piece_of(records, [numbers[row] for row in rows], 100 + one)))
    whole, merged = piece_of(records, numbers, 7), merge_pieces(7, parts)
    assert piece_payload(merged) == piece_payload(whole)
    assert (merged.ticket, merged.skipped) == (7, whole.skipped)
    assert list(merged.skipped) == sorted(merged.skipped)
    for name in ("keys", "lengths", "input_ids", "supervised", "image_counts", "actions", "row_samples", "auxiliary"):
        ours, theirs = getattr(merged, name), getattr(whole, name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


def test_parts_that_do_not_make_up_the_rows_are_refused() -> None:
    records = {n: EncodedRecord([some_sample(random.Random(n), n)]) for n in range(3)}
    a, b = piece_of(records, [0, 1], 1), piece_of(records, [2], 2)
    with pytest.raises(RemoteProtocolError, match="do not make up the rows"):
        merge_pieces(7, [(np.array([0, 1]), a), (np.array([1]), b)])
    with pytest.raises(RemoteProtocolError, match="do not make up the rows"):
        merge_pieces(7, [(np.array([0, 1]), a), (np.array([3]), b)])
