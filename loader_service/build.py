"""Record -> encoded samples -> piece: all the work that a ticket asks for.

`RecordEncoder` decodes a record once and turns every sample of it into what travels: token ids, labels, encoded images.
`assemble_piece` only puts such samples together.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loader_service.lane_plan import Rows
from loader_service.prepare.manifest import EntryManifest
from loader_service.sources.base import BaseSFTDataset, make_datasets
from loader_service.text_samples import is_language, rows_of
from loader_service.token_counts import TokenCounts, has_token_counts
from stoker_proto.config import DataConfig
from stoker_proto.errors import DataError, FetchError, located
from stoker_proto.hashing import key64
from stoker_proto.messages import Piece, Ticket
from stoker_proto.processor import Processor

logger = logging.getLogger(__name__)


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


class _Text(NamedTuple):
    """What of a `Sample` with an instruction is still needed when its frames are encoded."""

    images: tuple[bytes, ...]
    instruction: str
    state: NDArray[np.float32] | None
    action: NDArray[np.float32] | None
    answer: str | None
    timestep: int


class RecordEncoder:
    """Decodes and encodes single records of one config; used by several threads at once."""

    def __init__(self, data: DataConfig, processor: Processor) -> None:
        self.data, self.processor = data, processor
        self._packed: dict[tuple[str, int], bool] = {}
        datasets = make_datasets(data)
        self._dataset_of: dict[tuple[str, int], BaseSFTDataset] = {
            (split, entry): datasets[source]
            for split in ("train", "val")
            for entry, source in enumerate(data.entry_sources(split))
        }

    def share_work(self, threads: int) -> int:
        """How many threads may call `encode` so that `threads` work while others wait for remote files."""
        stores = {
            id(dataset.remote): dataset.remote for dataset in self._dataset_of.values() if dataset.remote is not None
        }
        for store in stores.values():
            store.pins.limit_work(threads)
        return threads + (self.data.remote.concurrency if stores else 0)

    def encode(self, manifest: EntryManifest, record: int, epoch: int) -> EncodedRecord:
        """The record's samples. A bad record raises DataError, or under policy `skip` says why it is bad."""
        try:
            with self._dataset_of[manifest.split, manifest.entry].reading():
                return self._encode(manifest, record, epoch)
        except DataError as error:
            if self.data.on_bad_sample == "fail":
                raise
            logger.warning("skipped: %s", error)
            return EncodedRecord(error=str(error), size_bytes=1000)

    def _encode(self, manifest: EntryManifest, record: int, epoch: int) -> EncodedRecord:
        augment = self.data.augment.enabled and manifest.split == "train"
        seed = self.data.order.seed
        dataset = self._dataset_of[manifest.split, manifest.entry]
        expected = int(manifest.num_samples[record])
        shard, offset, size = manifest.place(record)
        found: list[_Text | EncodedSample] = []
        try:
            shard = dataset.local(shard)
            for index, sample in enumerate(dataset.read(shard, offset, size)):
                key = key64("augment", seed, epoch, manifest.entry, record, index) if augment else None
                images = tuple(self.processor.encode_image(image, key) for image in sample.images)
                if is_language(sample):
                    with located(file=str(shard), record=str(record), field=f"sample {index}"):
                        rows = rows_of(sample, self.processor)
                    found += [
                        EncodedSample(row.input_ids, row.supervised, images, None, len(found) + i)
                        for i, row in enumerate(rows)
                    ]
                else:
                    # Kept without its frames, so that one raw frame at a time is alive.
                    found.append(
                        _Text(images, sample.instruction, sample.state, sample.action, sample.answer, sample.timestep)
                    )
                if len(found) > expected:
                    raise DataError(
                        "it gives more samples than the scan counted; run loader-prepare again (a dataset class of texts sets "
                        "is_text)",
                        file=str(shard),
                    )
        except (DataError, FetchError, MemoryError):
            raise
        except Exception as error:
            logger.exception("dataset class %s failed on %s", type(dataset).__name__, shard)
            raise DataError(f"{type(error).__name__}: {error}", file=str(shard), record=str(record)) from error
        if len(found) != expected:
            raise DataError(
                f"it gives {len(found)} samples, the scan counted {expected}: the file changed; run loader-prepare again",
                file=str(shard),
                record=str(record),
            )
        encoded = self._tokenise(found, shard, record)
        if self._is_packed(manifest):
            check_packable(encoded, TokenCounts.of(manifest, self.data).of_record(record), shard, record)
        return encoded

    def _is_packed(self, manifest: EntryManifest) -> bool:
        key = manifest.split, manifest.entry
        if key not in self._packed:
            self._packed[key] = self.data.packing and has_token_counts(manifest)
        return self._packed[key]

    def _tokenise(self, found: Sequence[_Text | EncodedSample], shard: Path, record: int) -> EncodedRecord:
        codes = self._action_codes(found)
        encoded = []
        size = 0
        for i, item in enumerate(found):
            sample = item if isinstance(item, EncodedSample) else self._encode_text(item, codes.get(i), shard, record)
            encoded.append(sample)
            size += 5 * len(sample.input_ids) + sum(map(len, sample.images)) + 400  # 400: the Python objects
        return EncodedRecord(encoded, None, size)

    def _encode_text(self, text: _Text, codes: NDArray[np.int32] | None, shard: Path, record: int) -> EncodedSample:
        try:
            row = self.processor.encode(
                text.instruction, len(text.images), codes=codes, answer=text.answer, state=text.state
            )
        except DataError:  # a context around every sample, and its words, would be felt
            with located(file=str(shard), record=str(record), field=f"timestep {text.timestep}"):
                raise
        action = None if text.action is None else np.asarray(text.action, np.float32)
        return EncodedSample(row.input_ids, row.supervised, text.images, action, text.timestep)

    def _action_codes(self, samples: Sequence[_Text | EncodedSample]) -> dict[int, NDArray[np.int32]]:
        """Codes of all action chunks of the record, in one call of the codec."""
        with_action = [i for i, sample in enumerate(samples) if sample.action is not None]
        if not with_action:
            return {}
        if self.processor.codec is None:
            raise DataError("samples have actions, but no action codec was fitted; run loader-prepare again")
        actions = np.stack([np.asarray(samples[i].action, np.float32) for i in with_action])  # [n, K, D]
        return dict(zip(with_action, self.processor.codec.encode(actions), strict=True))


def check_packable(encoded: EncodedRecord, expected: Sequence[int], shard: Path, record: int) -> None:
    """The plan packed samples of the `expected` lengths, without images and actions. Raises DataError."""
    for index, (sample, tokens) in enumerate(zip(encoded.samples, expected, strict=True)):
        where = {"file": str(shard), "record": str(record), "field": f"sample {index}"}
        if sample.images or sample.action is not None:
            what = "images" if sample.images else "an action"
            raise DataError(f"it has {what}, and data.packing is for text: set data.packing to false", **where)
        if len(sample.input_ids) != tokens:
            raise DataError(
                f"it has {len(sample.input_ids)} tokens, and the scan's counts say {tokens}: run loader-prepare again, or mend "
                "num_tokens of the dataset's scan",
                **where,
            )


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
    keys = np.empty((len(refs), 3), np.int64)
    for i, ref in enumerate(refs):
        record = records[ref.record]
        if record.error is not None:
            skipped[i] = record.error
            samples.append(filler)
            keys[i] = entry, ref.record, ref.sample
        else:
            sample = record.samples[ref.sample]
            samples.append(sample)
            keys[i] = entry, ref.record, sample.timestep
    return Piece(
        ticket=ticket.ticket,
        loader=loader,
        keys=keys,
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
