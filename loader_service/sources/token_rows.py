"""Rows of token ids as other programs write them -> the ids, and what is learned of them.

{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}                    transformers, axolotl
{"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]}            padding is taken away
{"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}                 TRL; also assistant_masks, loss_mask: 1 is learned
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import DataError

IGNORED = -100
IDS, LABELS, ATTENTION = "input_ids", "labels", "attention_mask"
MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
"""Which tokens are learned, where there are no labels."""
FIELDS = (IDS, LABELS, ATTENTION, *MASKS)
"""All fields that are read."""

Ids = NDArray[np.int32]


def token_row(row: Mapping[str, Any], name: str = IDS) -> tuple[Ids, Ids | None]:
    """(input_ids int32[T], labels int32[T] or None) of a row, whose ids are in the field `name`. Raises DataError."""
    ids = whole_numbers(row[name], name)
    if len(ids) == 0:
        raise DataError("empty: there is nothing to learn", field=name)
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= 1 << 31:
        raise DataError(f"token ids from {least} to {most}: 0 to {(1 << 31) - 1} are possible", field=name)
    labels = None
    if row.get(LABELS) is not None:
        labels = _as_long(row[LABELS], LABELS, ids)
    for mask in MASKS:
        if row.get(mask) is not None:
            labels = _masked(labels, ids, _flags(row[mask], mask, ids), mask)
    if row.get(ATTENTION) is not None:
        kept = _unpadded(_flags(row[ATTENTION], ATTENTION, ids))
        ids, labels = ids[kept], None if labels is None else labels[kept]
    return ids.astype(np.int32), None if labels is None else labels.astype(np.int32)


def whole_numbers(value: Any, field: str) -> NDArray[np.integer[Any]]:
    """The list, array or tensor as integers [T]. Raises DataError."""
    if isinstance(value, list | tuple):
        if not all(type(token) is int or isinstance(token, np.integer) for token in value):
            raise DataError("a list with something else than whole numbers: token ids are expected", field=field)
        if value and not -(1 << 63) <= min(value) <= max(value) < 1 << 63:
            raise DataError(f"numbers up to {max(value, key=abs)}: token ids are expected", field=field)
        return np.array(value, np.int64)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{type(value).__name__}: a list of token ids is expected ({error})", field=field) from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"shape {list(array.shape)} and type {array.dtype}: whole numbers [T] are expected", field=field
        )
    return array


def _as_long(value: Any, field: str, ids: NDArray[Any]) -> NDArray[np.integer[Any]]:
    numbers = whole_numbers(
        [int(x) if type(x) is bool else x for x in value] if isinstance(value, list) else value, field
    )
    if len(numbers) != len(ids):
        raise DataError(f"{len(numbers)} numbers for {len(ids)} token ids: as many are expected", field=field)
    return numbers


def _flags(value: Any, field: str, ids: NDArray[Any]) -> NDArray[np.bool_]:
    if isinstance(value, np.ndarray) and value.dtype == np.bool_:
        value = value.astype(np.int64)
    numbers = _as_long(value, field, ids)
    if not np.isin(numbers, (0, 1)).all():
        wrong = numbers[~np.isin(numbers, (0, 1))][0]
        raise DataError(f"{int(wrong)}: 0 or 1 for each token is expected", field=field)
    flags: NDArray[np.bool_] = numbers == 1
    return flags


def _masked(labels: NDArray[Any] | None, ids: NDArray[Any], mask: NDArray[np.bool_], field: str) -> NDArray[Any]:
    wanted = np.where(mask, ids.astype(np.int64), IGNORED)
    if labels is not None and not np.array_equal(labels, wanted):
        raise DataError("it says something else than the labels or masks beside it: keep one of them", field=field)
    return wanted


def _unpadded(attended: NDArray[np.bool_]) -> slice:
    """Where the row is, without its padding at the beginning or at the end."""
    places = np.flatnonzero(attended)
    if len(places) == 0:
        raise DataError("all 0: the row is padding only", field=ATTENTION)
    kept = slice(int(places[0]), int(places[-1]) + 1)
    if len(places) != kept.stop - kept.start:
        raise DataError("0 between two 1: only padding at the beginning or at the end can be left out", field=ATTENTION)
    return kept
