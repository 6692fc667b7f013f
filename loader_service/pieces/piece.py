"""Encoded samples -> piece: what a ticket asks for, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loader_service.plan.lane_plan import Rows
from stoker_proto.errors import DataError, FetchError
from stoker_proto.wire.messages import Piece, Ticket


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One sample as it travels."""

    input_ids: NDArray[np.int32]  # [T]
    supervised: NDArray[np.uint8]  # [T]
    images: tuple[bytes, ...]
    action: NDArray[np.float32] | None  # [K, D]
    timestep: int


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """All samples of one record, or the reason why they are rows without labels."""

    samples: Sequence[EncodedSample] = field(default_factory=tuple)
    error: str | None = None
    size_bytes: int = 0


Outcome = EncodedRecord | DataError | FetchError
"""What becomes of a record."""


def assemble_piece(
    ticket: Ticket,
    loader: str,
    entry: int,
    rows: Rows,
    records: Mapping[int, EncodedRecord],
    filler: EncodedSample,
) -> Piece:
    """Put the ticket's rows together. `filler` stands where a bad record's sample has its place."""
    refs = rows.samples
    skipped: dict[int, str] = {}
    samples: list[EncodedSample] = []
    keys: list[tuple[int, int, int]] = []
    for i, (number, index) in enumerate(refs):
        record = records[number]
        if record.error is not None:
            skipped[i] = record.error
            samples.append(filler)
            keys.append((entry, number, index))
        else:
            sample = record.samples[index]
            samples.append(sample)
            keys.append((entry, number, sample.timestep))
    return Piece(
        ticket=ticket.ticket,
        loader=loader,
        keys=np.array(keys, np.int64).reshape(-1, 3),
        lengths=np.array([len(sample.input_ids) for sample in samples], np.int32),
        input_ids=np.concatenate([sample.input_ids for sample in samples]),
        supervised=np.concatenate([sample.supervised for sample in samples]),
        image_counts=np.array([len(sample.images) for sample in samples], np.uint8),
        images=[image for sample in samples for image in sample.images],
        actions=_stack_actions(samples),
        skipped=skipped,
        row_samples=np.array(rows.row_samples or (), np.uint16),
    )


def _stack_actions(samples: Sequence[EncodedSample]) -> NDArray[np.float32]:
    """float32[N, K, D]; NaN where a sample has none and others have; [N, 0, 0] where none has."""
    actions = [sample.action for sample in samples if sample.action is not None]
    if len(actions) == len(samples):
        return np.array(actions, np.float32)
    if not actions:
        return np.empty((len(samples), 0, 0), np.float32)
    shape = actions[0].shape
    missing = np.full(shape, np.nan, np.float32)
    return np.stack([missing if sample.action is None else sample.action for sample in samples])
