"""Encoded samples -> piece: the rows of one ticket, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from types import NoneType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loader_service.plan.lane_plan import Rows
from stoker_proto.errors import DataError, FetchError
from stoker_proto.processor import Processor
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Piece, Ticket


class EncodedSample(NamedTuple):
    """One sample as it travels. A named tuple, as frozen dataclasses take several times as long to make."""

    input_ids: NDArray[np.int32]  # [T]
    supervised: NDArray[np.uint8]  # [T]
    images: tuple[bytes, ...]
    action: NDArray[np.float32] | None  # [K, D]
    timestep: int
    auxiliary: NDArray[np.float32] | None = None  # [A]


MAX_IMAGES = 255
"""Images of one sample at most: `Piece.image_counts` is uint8."""
MAX_ACTION_SIDE = 4096
"""Largest number of actions in a chunk, and of numbers in an action; ranks reject a larger piece."""
_WHOLE_NUMBERS = (int, np.integer)
_LARGEST_TIMESTEP = (1 << 63) - 1  # `Piece.keys` is int64
_OVERHEAD_BYTES = 1 << 16  # of a piece beside its samples


def check_sample(images: Sequence[bytes], timestep: object, action_shape: Sequence[int] = ()) -> None:
    """Raises DataError for a sample that fits into no message.

    images: as they travel; timestep: part of its key; action_shape: (actions in the chunk, numbers in an action)."""
    if len(images) > MAX_IMAGES:
        raise DataError(f"it has {len(images)} images: at most {MAX_IMAGES} travel in a sample; use fewer, or split it")
    size = sum(map(len, images))
    if size > encoding.MAX_FRAME_BYTES - _OVERHEAD_BYTES:
        raise DataError(
            f"its {len(images)} images have {size} bytes: at most {encoding.MAX_FRAME_BYTES} travel in a message; use fewer or "
            "smaller ones, or data.image.transport: jpeg"
        )
    if not isinstance(timestep, _WHOLE_NUMBERS) or not 0 <= timestep <= _LARGEST_TIMESTEP:
        raise DataError(
            f"its timestep is {str(timestep)[:40]}: a whole number from 0 to {_LARGEST_TIMESTEP} is expected"
        )
    if max(action_shape, default=0) > MAX_ACTION_SIDE:
        raise DataError(f"its action has shape {list(action_shape)}: at most {MAX_ACTION_SIDE} a side travel")


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """All samples of one record, or the reason why they are sent as rows without labels."""

    samples: Sequence[EncodedSample] = field(default_factory=tuple)
    error: str | None = None
    size_bytes: int = 0
    excluded: frozenset[int] = frozenset()
    """Numbers of the samples that data.exclude names: they have no labels."""
    is_stored: bool = False
    """Read from the cache on disk, not decoded."""


def filler_of(processor: Processor) -> EncodedSample:
    """The replacement for a sample of a bad record: one token that is no label."""
    return EncodedSample(np.array([processor.end_id], np.int32), np.zeros(1, np.uint8), (), None, timestep=0)


Outcome = EncodedRecord | DataError | FetchError
"""The result of encoding a record."""


def assemble_piece(
    ticket: Ticket,
    loader: str,
    entry: int,
    rows: Rows,
    records: Mapping[int, EncodedRecord],
    filler: EncodedSample,
) -> Piece:
    """Put the ticket's rows together. `filler` takes the place of each sample of a bad record."""
    skipped: dict[int, str] = {}
    samples: list[EncodedSample] = []
    for i, (number, index) in enumerate(rows.samples):
        record = records[number]
        if record.error is None:
            samples.append(record.samples[index])
        else:
            skipped[i] = record.error
            samples.append(filler._replace(timestep=index))
    input_ids, supervised, images, actions, timesteps, auxiliary = zip(*samples, strict=True)
    numbers, _ = zip(*rows.samples, strict=True)
    keys = zip(repeat(entry, len(numbers)), numbers, timesteps, strict=True)
    stacked = _stack(auxiliary, num_dimensions=1)
    return Piece(
        ticket=ticket.ticket,
        loader=loader,
        keys=np.array(list(keys), np.int64),
        lengths=np.array(list(map(len, input_ids)), np.int32),
        input_ids=np.concatenate(input_ids),
        supervised=np.concatenate(supervised),
        image_counts=np.array(list(map(len, images)), np.uint8),
        images=list(chain.from_iterable(images)),
        actions=_stack(actions, num_dimensions=2),
        auxiliary=stacked if stacked.size else np.zeros((0, 0), np.float32),
        skipped=skipped,
        row_samples=np.array(rows.row_samples or (), np.uint16),
    )


def _stack(values: Sequence[NDArray[np.float32] | None], *, num_dimensions: int) -> NDArray[np.float32]:
    """float32[N, ...]; NaN for a sample without a value; all other sides 0 if no sample has one."""
    types = set(map(type, values))
    if NoneType not in types:
        return np.array(values, np.float32)
    if len(types) == 1:
        return np.empty((len(values), *[0] * num_dimensions), np.float32)
    known = [value for value in values if value is not None]
    missing = np.full(known[0].shape, np.nan, np.float32)
    return np.stack([missing if value is None else value for value in values])
