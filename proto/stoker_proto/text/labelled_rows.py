"""Token ids with labels of their own, as tokenised data and dataset classes give them, as one row.

    input_ids     5     6     7     8  9
    labels     -100  -100  -100     8  9        the convention of transformers: a label stands at its own token, not before it
    learned       -     -     -     8  9

The ids are used unchanged: nothing is put before or behind them. The first token has no context, so it is never learned. Images
stand where the ids have the model's image token: once per image, or as often as an image needs tokens. They are never learned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import DataError, RowError
from stoker_proto.text.rows import EncodedRow, RowForm
from stoker_proto.text.tokenizer import Ids

IGNORED = -100
"""The label of a token that is not learned, as in transformers."""


class LabelledRows:
    """Writes such rows for one tokenizer and model."""

    def __init__(self, form: RowForm, expand: Callable[[Ids, NDArray[np.uint8], int], EncodedRow]) -> None:
        """expand: `RowWriter.expand`."""
        self._tokenizer, self._image, self._expand = form.tokenizer, form.image, expand
        self._max_seq_len, self._overlong = form.max_seq_len, form.overlong

    def encode(self, input_ids: NDArray[Any], labels: NDArray[Any], num_images: int) -> EncodedRow:
        """The row of input_ids int[T] with labels int[T]. Raises DataError, RowError where it does not fit."""
        ids = checked_ids(input_ids, self._tokenizer.size)
        row = self._with_images(ids, learned_of(ids, labels), num_images)
        row.supervised[:1] = 0
        if len(row.input_ids) > self._max_seq_len:
            row = self._truncated(row)
        if not row.supervised.any():
            raise DataError(
                f"none of the {len(row.input_ids)} tokens is learned (labels are {IGNORED}, and the first token has no context): "
                "remove the row, or correct its labels"
            )
        return row

    def _with_images(self, ids: Ids, supervised: NDArray[np.uint8], num_images: int) -> EncodedRow:
        image = self._image
        if image is None:
            if num_images:
                raise RowError(
                    f"a sample has {num_images} images, but the model takes text only; use a vision-language model or drop them"
                )
            return EncodedRow(ids, supervised)
        places = ids == image.token_id
        supervised[places] = 0
        found = int(places.sum())
        if found == num_images:
            return self._expand(ids, supervised, num_images)
        if found == num_images * image.num_tokens:
            return EncodedRow(ids, supervised)
        raise DataError(
            f"input_ids hold {image.token!r} {found} times for {num_images} images: {num_images} times (Stoker repeats it) or "
            f"{num_images * image.num_tokens} times ({image.num_tokens} per image) is expected"
        )

    def _truncated(self, row: EncodedRow) -> EncodedRow:
        if self._overlong != "truncate":
            raise RowError(
                f"input_ids with labels need {len(row.input_ids)} tokens, but data.max_seq_len is {self._max_seq_len}: raise it, "
                "or set data.overlong to truncate"
            )
        kept, cut = np.split(row.input_ids, [self._max_seq_len])
        if self._image is not None and (cut == self._image.token_id).any():
            raise RowError(
                f"data.overlong is truncate, and an image stands behind token {self._max_seq_len} of {len(row.input_ids)}: "
                "images are never cut; raise data.max_seq_len"
            )
        return EncodedRow(kept, row.supervised[: self._max_seq_len])


def checked_ids(input_ids: NDArray[Any], size: int) -> Ids:
    """The ids as int32[T]. size: of the vocabulary. Raises DataError."""
    ids = np.asarray(input_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(f"input_ids of shape {list(ids.shape)} and type {ids.dtype}: whole numbers [T] are expected")
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        raise DataError(f"input_ids hold {int(wrong[0])}: the tokenizer has ids 0-{size - 1}")
    return ids.astype(np.int32)


def learned_of(ids: Ids, labels: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8[T]: 1 where the label is the token itself, 0 where it is -100. Raises DataError for any other label."""
    labels = np.asarray(labels)
    if labels.shape != ids.shape or labels.dtype.kind not in "iu":
        raise DataError(
            f"labels of shape {list(labels.shape)} and type {labels.dtype} for {len(ids)} input_ids: as many whole numbers are "
            "expected"
        )
    learned: NDArray[np.bool_] = labels != IGNORED
    wrong = np.flatnonzero(learned & (labels != ids))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"label {at} is {int(labels[at])}, and input_ids have {int(ids[at])} there: a label is the token at its place, or "
            f"{IGNORED} (labels that are shifted by one must be shifted back)"
        )
    return learned.astype(np.uint8)
