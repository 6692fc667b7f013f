"""Pieces -> arrays: padding, labels, images, actions, digests, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from stoker_proto.errors import RemoteProtocolError
from stoker_proto.wire.messages import Piece, Ticket
from tests.trainer.feed.fake_loader import HEIGHT, WIDTH, StandInDecoder, make_piece
from trainer.feed.batch import BatchBuilder


def piece_of(lengths: list[int], image_counts: list[int], *, actions: bool = True) -> Piece:
    """Tokens count from 10 x sample; all but the first token of a sample are labels; images are 1, 2, 3 ..."""
    return Piece(
        ticket=0,
        loader="x",
        keys=np.array([[0, 7, i] for i in range(len(lengths))], np.int64).reshape(-1, 3),
        lengths=np.array(lengths, np.int32),
        input_ids=np.array([10 * (i + 1) + t for i, n in enumerate(lengths) for t in range(n)], np.int32),
        supervised=np.array([t > 0 for n in lengths for t in range(n)], np.uint8),
        image_counts=np.array(image_counts, np.uint8),
        images=[bytes([i + 1]) for i in range(sum(image_counts))],
        actions=np.ones((len(lengths), 1, 2), np.float32) if actions else np.zeros((len(lengths), 0, 0), np.float32),
    )


def builder(**options: object) -> BatchBuilder:
    defaults = {"decoder": StandInDecoder(), "num_rows": 4, "max_tokens": 16}
    return BatchBuilder(**{**defaults, **options})  # type: ignore[arg-type]


def test_two_pieces_and_a_padding_row() -> None:
    first = dataclasses.replace(piece_of([2, 3], [1, 0]), skipped={1: "frame missing"})
    batch = builder()([first, piece_of([1], [2])])
    assert batch.input_ids.shape == (4, 8)
    assert batch.input_ids[:, :4].tolist() == [[10, 11, 99, 99], [20, 21, 22, 99], [10, 99, 99, 99], [99, 99, 99, 99]]
    assert batch.labels[:, :4].tolist() == [[-100, 11, -100, -100], [-100, 21, 22, -100], [-100] * 4, [-100] * 4]
    assert batch.attention_mask.sum(1).tolist() == [2, 3, 1, 1]
    assert batch.attention_mask[:, 0].tolist() == [1, 1, 1, 1]
    assert (batch.num_rows, batch.num_supervised, batch.skipped) == (3, 3, ["frame missing"])
    assert batch.keys.tolist() == [[0, 7, 0], [0, 7, 1], [0, 7, 0], [-1, -1, -1]]
    assert batch.image_counts.tolist() == [1, 0, 2, 0]
    assert batch.pixels is not None
    assert batch.pixels.shape == (3, HEIGHT, WIDTH, 3)
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 1, 2]
    assert np.isnan(batch.actions[3]).all()
    assert (batch.actions[:3] == 1).all()
    arrays = (batch.input_ids, batch.labels, batch.pixels, batch.actions)
    assert [array.dtype.name for array in arrays] == ["int64", "int64", "uint8", "float32"]


def test_only_padding_rows() -> None:
    batch = builder()([])
    assert (batch.num_rows, batch.num_supervised, batch.pixels) == (0, 0, None)
    assert batch.input_ids.shape == (4, 8)
    assert (batch.labels == -100).all()
    assert batch.actions.shape == (4, 0, 0)


def test_rows_without_images_or_actions_beside_rows_with_them() -> None:
    batch = builder()([piece_of([2], [0], actions=False), piece_of([2], [1])])
    assert batch.image_counts.tolist() == [0, 1, 0, 0]
    assert np.isnan(batch.actions[0]).all()
    assert (batch.actions[1] == 1).all()


def test_digest_does_not_depend_on_how_pieces_were_cut() -> None:
    ticket = Ticket(ticket=1, split="train", epoch=0, lane=2, start=3, count=4)
    whole = builder()([make_piece(ticket, "a")])
    halves = [dataclasses.replace(ticket, count=1), dataclasses.replace(ticket, start=4, count=3)]
    cut = builder()([make_piece(half, "b") for half in halves])
    assert whole.digest == cut.digest
    assert whole.row_digests == cut.row_digests
    assert len(set(whole.row_digests)) == 4


@pytest.mark.parametrize("field", ["keys", "input_ids", "supervised", "actions"])
def test_digest_sees_every_array(field: str) -> None:
    ticket = Ticket(ticket=1, split="train", epoch=0, lane=2, start=3, count=2)
    piece = make_piece(ticket, "a")
    changed = getattr(piece, field).copy()
    changed.flat[-1] += 1
    assert builder()([piece]).digest != builder()([dataclasses.replace(piece, **{field: changed})]).digest


def test_digest_sees_images() -> None:
    piece = piece_of([2], [2])
    other = dataclasses.replace(piece, images=[piece.images[1], piece.images[0]])
    assert builder()([piece]).digest != builder()([other]).digest


def test_what_a_device_needs_comes_from_the_hook_and_nothing_else() -> None:
    made: list[NDArray[Any]] = []

    def allocate(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        made.append(np.full(shape, 55, dtype))
        return made[-1]

    batch = builder(allocate=allocate)([piece_of([2, 3], [1, 0])])
    sent = [batch.input_ids, batch.attention_mask, batch.pixels, batch.auxiliary]
    assert all(any(array is one for one in made) for array in sent)
    assert len(made) == len(sent)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([piece_of([17], [0])], "17 tokens"),
        ([piece_of([2, 2, 2], [0, 0, 0]), piece_of([2, 2], [0, 0])], "5 rows for a micro-batch of 4"),
    ],
)
def test_what_does_not_fit_is_refused(pieces: list[Piece], message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        builder()(pieces)


def test_images_for_a_model_without_any_are_refused() -> None:
    class TextOnly:
        pad_id, image = 0, None

        def decode_image(self, data: bytes | memoryview, out: object) -> None:
            raise AssertionError

    with pytest.raises(RemoteProtocolError, match="the model takes none"):
        builder(decoder=TextOnly())([piece_of([2], [1])])


def packed_piece(*rows: list[int]) -> Piece:
    """A piece whose rows hold samples of these lengths; every token is a label."""
    lengths = [length for row in rows for length in row]
    piece = piece_of(lengths, [0] * len(lengths), actions=False)
    return dataclasses.replace(
        piece, supervised=np.ones(sum(lengths), np.uint8), row_samples=np.array([len(row) for row in rows], np.uint16)
    )


def test_packed_rows_say_where_each_sample_begins() -> None:
    piece = dataclasses.replace(packed_piece([3, 2], [1]), skipped={2: "no turns"})
    batch = builder(packing=True)([piece, packed_piece([2])])
    assert batch.input_ids[:, :6].tolist() == [
        [10, 11, 12, 20, 21, 99],
        [30, 99, 99, 99, 99, 99],
        [10, 11, 99, 99, 99, 99],
        [99] * 6,
    ]
    assert batch.positions is not None
    assert batch.positions.tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.labels[:3, :6].tolist() == [[-100, 11, 12, -100, 21, -100], [-100] * 6, [-100, 11, *[-100] * 4]]
    assert batch.attention_mask.sum(1).tolist() == [5, 1, 2, 1]
    assert (batch.num_rows, batch.num_supervised, batch.skipped) == (3, 4, ["no turns"])
    assert batch.row_samples.tolist() == [2, 1, 1, 0]
    assert batch.sample_keys.tolist() == [[0, 7, 0], [0, 7, 1], [0, 7, 2], [0, 7, 0]]
    assert batch.keys.tolist() == [[0, 7, 0], [0, 7, 2], [0, 7, 0], [-1, -1, -1]]
    assert batch.actions.shape == (4, 0, 0)
    assert batch.image_counts.tolist() == [0] * 4


def test_without_packing_there_are_no_positions_and_keys_are_those_of_the_samples() -> None:
    batch = builder()([piece_of([2, 3], [1, 0])])
    assert batch.positions is None
    assert batch.sample_keys.tolist() == batch.keys[:2].tolist()
    assert batch.row_samples.tolist() == [1, 1, 0, 0]


def test_the_digest_of_a_packed_row_sees_all_its_samples_and_where_they_end() -> None:
    build = builder(packing=True)
    whole = build([packed_piece([3, 2], [4])])
    first, second = build([packed_piece([3, 2])]), build([packed_piece([3, 1])])
    assert len(whole.row_digests) == 2
    assert whole.row_digests[0] == first.row_digests[0] != second.row_digests[0]
    apart = build([dataclasses.replace(packed_piece([3, 2]), row_samples=np.array([1, 1], np.uint16))])
    assert apart.digest != first.digest


def test_packed_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="a row of 17 tokens"):
        builder(packing=True)([packed_piece([9, 8])])
    with pytest.raises(RemoteProtocolError, match="packed rows, but"):
        builder()([packed_piece([3, 2])])
    piece = dataclasses.replace(packed_piece([3, 2]), actions=np.ones((2, 1, 2), np.float32))
    with pytest.raises(RemoteProtocolError, match="actions in packed rows"):
        builder(packing=True)([piece])
