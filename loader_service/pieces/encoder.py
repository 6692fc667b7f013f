"""Record -> encoded samples. A record is decoded once; each of its samples becomes token ids, labels and encoded images, as they
travel. `piece` only puts such samples together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loader_service.manifest import EntryManifest
from loader_service.pieces.changed_shards import changed_shards, check_files, shard_of
from loader_service.pieces.device_images import device_images
from loader_service.pieces.excluded import Excluded
from loader_service.pieces.piece import EncodedRecord, EncodedSample, Outcome, check_sample
from loader_service.pieces.sample_values import checked_sample, stacked
from loader_service.pieces.text_samples import TextSample, rows_of
from loader_service.plan.token_counts import TokenCounts, has_token_counts
from loader_service.sources.base import BaseSFTDataset, Sample, make_datasets
from stoker_proto.config import DataConfig, LoaderConfig
from stoker_proto.errors import DataError, FetchError, StokerError, located
from stoker_proto.hashing import key64
from stoker_proto.host.stages import READ, TOKENISE, switch
from stoker_proto.host.trouble import check_host, host_error
from stoker_proto.processor import EncodedRow, Processor

logger = logging.getLogger(__name__)

_MOST_TEXTS = 64
"""Samples of language of one record that are tokenised together at most."""


class _Text(NamedTuple):
    """A `Sample` with an instruction, without its frames: these are encoded already."""

    images: tuple[bytes, ...]
    instruction: str
    state: NDArray[np.float32] | None
    action: NDArray[np.float32] | None
    is_pad: NDArray[np.bool_] | None
    """bool[K]: actions of the chunk that are no labels; None: all are."""
    answer: str | None
    timestep: int
    auxiliary: NDArray[np.float32] | None


class _Waiting(NamedTuple):
    """A sample of language before it is tokenised."""

    text: TextSample
    images: tuple[bytes, ...]
    number: int
    """Number of the sample in its record."""


@dataclass(slots=True)
class _Record:
    """A record that is being encoded."""

    manifest: EntryManifest
    number: int
    expected: int
    """Number of samples that the scan counted."""
    shard: Path
    found: list[_Text | EncodedSample] = field(default_factory=list)
    texts: list[_Waiting] = field(default_factory=list)
    """Samples of language that are not tokenised yet; they come after `found`."""

    def too_many(self) -> DataError:
        """The error if `read` returned more samples than the scan counted."""
        return DataError(
            "it gives more samples than the scan counted; run loader-prepare again (a dataset class of texts sets is_text)",
            file=str(self.shard),
        )


class RecordEncoder:
    """Decodes and encodes records of one config; used by several threads at once."""

    def __init__(
        self,
        data: DataConfig,
        processor: Processor,
        loader: LoaderConfig | None = None,
        excluded: Excluded | None = None,
    ) -> None:
        """loader: with the device that encodes frames; None: the CPU. excluded: samples without labels; None: those of
        data.exclude. Raises ConfigError for a device that is not to be had, or a wrong file."""
        self.data, self.processor = data, processor
        self._device_images = device_images(processor.coder, loader or LoaderConfig())
        self._excluded = Excluded.read(data) if excluded is None else excluded
        self._excluded_of: dict[tuple[str, int], dict[int, frozenset[int]]] = {}  # (split, entry): record: samples
        self._packed: dict[tuple[str, int], bool] = {}
        self._beside: dict[tuple[str, int], str] = {}  # of each entry: why its records cannot be read; "": they can
        self._with_images: set[tuple[str, int]] = set()
        datasets = make_datasets(data)
        self._dataset_of: dict[tuple[str, int], BaseSFTDataset] = {
            (split, entry): datasets[source]
            for split in ("train", "val")
            for entry, source in enumerate(data.entry_sources(split))
        }

    def preload(self, manifests: Iterable[EntryManifest]) -> None:
        """Import the libraries that these entries need, while there are descriptors for it."""
        for manifest in manifests:
            dataset = self._dataset_of[manifest.split, manifest.entry]
            dataset.preload([Path(shard) for shard in manifest.held_shards()])
            if dataset.remote is not None:
                dataset.remote.preload()

    def share_work(self, threads: int) -> int:
        """Number of threads to start, so that `threads` work while others wait for remote files."""
        stores = {
            id(dataset.remote): dataset.remote for dataset in self._dataset_of.values() if dataset.remote is not None
        }
        for store in stores.values():
            store.pins.limit_work(threads)
        return threads + (self.data.remote.concurrency if stores else 0)

    def dataset_of(self, manifest: EntryManifest) -> BaseSFTDataset:
        """The dataset that reads the entry."""
        return self._dataset_of[manifest.split, manifest.entry]

    def excluded_of(self, manifest: EntryManifest, number: int) -> frozenset[int]:
        """Numbers of the record's samples that data.exclude names."""
        if not self._excluded.names:
            return frozenset()
        key = manifest.split, manifest.entry
        if key not in self._excluded_of:
            self._excluded_of[key] = self._excluded.of(manifest)
        return self._excluded_of[key].get(number, frozenset())

    def is_small(self, manifest: EntryManifest) -> bool:
        """Whether the entry's records are encoded several at a time: language, of which no record has had an image so far."""
        key = manifest.split, manifest.entry
        return self._dataset_of[key].is_text and key not in self._with_images

    def encode(self, manifest: EntryManifest, record: int, epoch: int) -> EncodedRecord:
        """The record's samples. A bad record raises DataError; under policy `skip` the result holds the reason."""
        [outcome] = self.encode_all([(manifest, record)], epoch)
        if not isinstance(outcome, EncodedRecord):
            raise outcome
        return outcome

    def encode_all(self, places: Sequence[tuple[EntryManifest, int]], epoch: int) -> list[Outcome]:
        """`encode` for several records, whose texts are tokenised together. An error is returned in its record's place."""
        records: list[_Record | DataError | FetchError] = []
        with ExitStack() as stack:
            for dataset in {id(d): d for d in (self._dataset_of[m.split, m.entry] for m, _ in places)}.values():
                stack.enter_context(dataset.reading())
            for manifest, number in places:
                try:
                    records.append(self._read(manifest, number, epoch))
                except (DataError, FetchError) as error:
                    records.append(error)
        changed = changed_shards(places)  # after the reading, so that a change during it is seen
        if changed:
            records = [changed.get(shard_of(*place), record) for place, record in zip(places, records, strict=True)]
        read = [record for record in records if isinstance(record, _Record)]
        switch(TOKENISE)
        rows = iter(rows_of([one.text for record in read for one in record.texts], self.processor))
        return [
            self._finish(record, [next(rows) for _ in record.texts])
            if isinstance(record, _Record)
            else self._bad(record)
            for record in records
        ]

    def _bad(self, error: DataError | FetchError) -> Outcome:
        if isinstance(error, FetchError):
            return error
        if (trouble := host_error(error)) is not None:  # whatever wrapped it
            return trouble
        if self.data.on_bad_sample == "fail":
            return error
        logger.warning("skipped: %s", error)
        return EncodedRecord(error=str(error), size_bytes=1000)

    def _read(self, manifest: EntryManifest, number: int, epoch: int) -> _Record:
        """Read a record and encode its frames."""
        augment = self.data.augment.enabled and manifest.split == "train"
        # Validation scores whole chunks, so that its figures are comparable between runs.
        hides_padding = not self.data.action.learn_padding and manifest.split == "train"
        seed = self.data.order.seed
        dataset = self._dataset_of[manifest.split, manifest.entry]
        shard, offset, size = manifest.place(number)
        switch(READ)  # a record that failed may have ended in another stage
        record = _Record(manifest, number, int(manifest.num_samples[number]), shard)
        key_of = (lambda index: key64("augment", seed, epoch, manifest.entry, number, index)) if augment else None
        try:
            self._check_beside(manifest, dataset)
            record.shard = dataset.local(shard)
            samples = self._samples(dataset, record, offset, size)
            for index, (sample, images) in enumerate(self._with_encoded_images(samples, key_of)):
                text = TextSample.of(sample)
                if text is None or images:  # rows of text have no timestep and no action
                    _check(sample, images, record, index)
                if text is not None:
                    if images:
                        self._with_images.add((manifest.split, manifest.entry))
                    record.texts.append(_Waiting(text, images, index))
                    if len(record.texts) >= _MOST_TEXTS:
                        self._tokenise_texts(record)
                else:
                    if record.texts:
                        self._tokenise_texts(record)
                    # Kept without its frames, so that only the raw frames of one sample are in memory.
                    record.found.append(
                        _Text(
                            images, sample.instruction, sample.state, sample.action,
                            sample.action_is_pad if hides_padding else None, sample.answer, sample.timestep,
                            sample.auxiliary,
                        )
                    )  # fmt: skip
                if len(record.found) > record.expected:
                    raise record.too_many()
        except DataError as error:
            check_host(error, str(record.shard))  # a dataset class may wrap it
            if dataset.remote is not None:
                raise dataset.remote.recheck(error) from error
            raise
        except StokerError as error:
            raise _not_here(error) from error
        return record

    def _check_beside(self, manifest: EntryManifest, dataset: BaseSFTDataset) -> None:
        """Raises FetchError where an index or a table beside the shards is not that of which the loader told the ranks.

        Once for each entry: a dataset keeps what it has read."""
        key = manifest.split, manifest.entry
        if not manifest.beside or self._beside.get(key) == "":
            return
        if key not in self._beside:
            try:
                changed = dataset.beside([Path(shard) for shard in manifest.shards]) != manifest.beside
                reason = "it is another now" if changed else ""
            except (DataError, OSError, MemoryError) as error:
                check_host(error, manifest.path)
                reason = str(error)
            self._beside[key] = reason
        if self._beside[key]:
            raise FetchError(
                f"{manifest.path}: what lies beside the data (meta/, data.task_table) changed while this loader was running "
                f"({self._beside[key]}): put it back as it was, or start all loaders again; a run that began with the old one "
                "refuses the new one"
            )

    def _with_encoded_images(
        self, samples: Iterable[Sample], key_of: Callable[[int], int] | None
    ) -> Iterator[tuple[Sample, tuple[bytes, ...]]]:
        """Each sample with its encoded frames. key_of: number of the sample -> key of its augmentation; None: it has none."""
        if self._device_images is not None:
            yield from self._device_images.encode_samples(
                (sample, None if key_of is None else key_of(index)) for index, sample in enumerate(samples)
            )
            return
        encode = self.processor.encode_image
        for index, sample in enumerate(samples):
            key = None if key_of is None else key_of(index)
            yield sample, tuple(map(encode, sample.images, repeat(key)))

    def _samples(self, dataset: BaseSFTDataset, record: _Record, offset: int, size: int) -> Iterator[Sample]:
        """What the dataset class reads, checked. Its exceptions become DataErrors: the class may be anybody's."""
        manifest, number, shard = record.manifest, record.number, record.shard
        try:
            for index, sample in enumerate(dataset.read(shard, offset, size)):
                try:
                    checked = checked_sample(sample)
                except DataError:  # a context around every sample would be felt
                    with located(file=str(shard), record=str(number), field=f"sample {index}"):
                        raise
                if index == 0 and checked.files is not None and not check_files(manifest, number, checked.files):
                    dataset.verify(shard, offset, size)  # touched, or copied anew: compare its checksums
                yield checked
        except StokerError:
            raise
        except Exception as error:
            check_host(error, str(shard))
            logger.exception("dataset class %s failed on %s", type(dataset).__name__, shard)
            raise DataError(f"{type(error).__name__}: {error}", file=str(shard), record=str(number)) from error

    def _finish(self, record: _Record, rows: Sequence[list[EncodedRow] | DataError]) -> Outcome:
        """The record, encoded; rows: of its samples of language."""
        try:
            self._add_rows(record, rows)
            if len(record.found) != record.expected:
                raise DataError(
                    f"it gives {len(record.found)} samples, the scan counted {record.expected}: the file changed; run "
                    "loader-prepare again",
                    file=str(record.shard),
                    record=str(record.number),
                )
            encoded = self._without_excluded(self._tokenise(record), record)
            if self._is_packed(record.manifest):
                expected = TokenCounts.of(record.manifest, self.data).of_record(record.number)
                check_packable(encoded, expected, record.shard, record.number)
        except DataError as error:
            return self._bad(error)
        except StokerError as error:
            return _not_here(error)
        except (OSError, MemoryError, RuntimeError) as error:
            if (trouble := host_error(error, str(record.shard))) is None:
                raise
            return trouble
        return encoded

    def _tokenise_texts(self, record: _Record) -> None:
        before = switch(TOKENISE)
        self._add_rows(record, rows_of([one.text for one in record.texts], self.processor))
        switch(before)

    def _add_rows(self, record: _Record, rows: Sequence[list[EncodedRow] | DataError]) -> None:
        """The waiting samples of language become rows. Raises DataError for a bad one."""
        for (_, images, number), found in zip(record.texts, rows, strict=True):
            if isinstance(found, DataError):
                with located(file=str(record.shard), record=str(record.number), field=f"sample {number}"):
                    raise found
            for row in found:
                record.found.append(
                    EncodedSample(row.input_ids, row.supervised, images[: row.num_images], None, len(record.found))
                )
        record.texts.clear()
        if len(record.found) > record.expected:
            raise record.too_many()

    def _is_packed(self, manifest: EntryManifest) -> bool:
        key = manifest.split, manifest.entry
        if key not in self._packed:
            self._packed[key] = self.data.packing and has_token_counts(manifest)
        return self._packed[key]

    def _tokenise(self, record: _Record) -> EncodedRecord:
        codes = self._action_codes(record)
        encoded = []
        size = 0
        samples = self._encode_together(record.found, codes)
        for i, item in enumerate(record.found):
            if samples:
                sample = samples[i]
            else:
                sample = item if isinstance(item, EncodedSample) else self._encode_text(item, codes.get(i), record)
            encoded.append(sample)
            size += 5 * len(sample.input_ids) + sum(map(len, sample.images)) + 400  # 400: the Python objects
        return EncodedRecord(encoded, None, size)

    def _without_excluded(self, encoded: EncodedRecord, record: _Record) -> EncodedRecord:
        """The same samples; those of data.exclude have no labels."""
        numbers = self.excluded_of(record.manifest, record.number)
        if not numbers:
            return encoded
        samples = [
            sample._replace(supervised=np.zeros_like(sample.supervised)) if i in numbers else sample
            for i, sample in enumerate(encoded.samples)
        ]
        return replace(encoded, samples=samples, excluded=numbers)

    def _encode_together(
        self, found: Sequence[_Text | EncodedSample], codes: dict[int, NDArray[np.int32]]
    ) -> list[EncodedSample]:
        """The samples of a record of one instruction whose actions have equally many tokens; [] for any other, or a bad one."""
        texts = [text for text in found if isinstance(text, _Text)]
        if not len(texts) == len(codes) == len(found) or len(set(map(len, codes.values()))) != 1:
            return []
        forms = {(one.instruction, len(one.images), one.is_pad is None and one.answer is None) for one in texts}
        (instruction, num_images, is_plain), *others = forms
        if others or not is_plain:
            return []
        try:
            rows = self.processor.encode_actions(instruction, num_images, np.array(list(codes.values())))
        except DataError:  # encoded one by one, the error names its sample
            return []
        if rows is None:
            return []
        return [
            EncodedSample(
                input_ids,
                rows.supervised,
                text.images,
                text.action,
                text.timestep,
                None if text.auxiliary is None else np.asarray(text.auxiliary, np.float32),
            )
            for text, input_ids in zip(texts, rows.input_ids, strict=True)
        ]

    def _encode_text(self, text: _Text, codes: NDArray[np.int32] | None, record: _Record) -> EncodedSample:
        try:
            row = self.processor.encode(
                text.instruction,
                len(text.images),
                codes=codes,
                is_pad=text.is_pad,
                answer=text.answer,
                state=text.state,
            )
        except DataError:  # a context around every sample would be felt
            with located(file=str(record.shard), record=str(record.number), field=f"timestep {text.timestep}"):
                raise
        auxiliary = None if text.auxiliary is None else np.asarray(text.auxiliary, np.float32)
        return EncodedSample(row.input_ids, row.supervised, text.images, text.action, text.timestep, auxiliary)

    def _action_codes(self, record: _Record) -> dict[int, NDArray[np.int32]]:
        """Number of the sample -> codes of its action chunk. One call of the codec encodes all chunks of the record."""
        actions = {i: sample.action for i, sample in enumerate(record.found) if sample.action is not None}
        if not actions:
            return {}
        if self.processor.codec is None:
            raise DataError("samples have actions, but no action codec was fitted; run loader-prepare again")
        with located(file=str(record.shard), record=str(record.number), field="action"):
            codes = self.processor.codec.encode(stacked(list(actions.values())))
        return dict(zip(actions, codes, strict=True))


def _check(sample: Sample, images: Sequence[bytes], record: _Record, index: int) -> None:
    """Raises DataError for a sample that does not fit into a piece."""
    try:
        check_sample(images, sample.timestep, () if sample.action is None else sample.action.shape)
    except DataError:  # a context around every sample would be felt
        with located(file=str(record.shard), record=str(record.number), field=f"sample {index}"):
            raise


def _not_here(error: StokerError) -> FetchError:
    """Any other StokerError concerns this host (a full cache folder, a missing package), so the ticket may go to another
    loader."""
    return error if isinstance(error, FetchError) else FetchError(str(error))


def check_packable(encoded: EncodedRecord, expected: Sequence[int], shard: Path, record: int) -> None:
    """Raises DataError unless the samples have the `expected` numbers of tokens, by which they were packed, and only text."""
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
