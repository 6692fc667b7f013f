"""Which records are read, and how: the first, the middle one and the last of each entry, then others by a seed, in turn.

The frames of one sample are in memory at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loader_service.doctor.facts import CameraFacts, EntryFacts, Examined, RecordFacts, RowFacts
from loader_service.doctor.finding import Finding, of_error
from loader_service.inspection.show import decoded_action
from loader_service.manifest import EntryManifest
from loader_service.pieces.piece import EncodedSample
from loader_service.pieces.text_samples import TextSample, rows_of
from loader_service.sources.base import Sample
from stoker_proto.errors import DataError, HostError, StokerError
from stoker_proto.host.trouble import check_host
from stoker_proto.processor import EncodedRow, Processor

logger = logging.getLogger(__name__)

_ROWS_OF_RECORD = 8
"""Samples of a record that are written as rows, with their images encoded."""
_MOST_TIMESTEPS = 20_000
"""Read of one record at most."""
_CONSTANT, _BLACK = 2.0, 8.0
"""Of 255: a frame whose pixels spread less is of one colour; one that is also darker on average is black."""


def chosen_records(manifest: EntryManifest, count: int, seed: int) -> list[int]:
    """Numbers of the records to read, each once: first, middle, last, then others in an order that the seed decides.

    Records without a sample are left out.
    """
    filled = np.flatnonzero(manifest.num_samples)
    if not len(filled):
        return []
    ends = dict.fromkeys([int(filled[0]), int(filled[len(filled) // 2]), int(filled[-1])])
    others = np.random.default_rng([seed, manifest.entry]).choice(filled, min(len(filled), count + 3), replace=False)
    return list(dict.fromkeys([*ends, *others.tolist()]))[:count]


def read_records(examined: Examined, *, records: int, seconds: float, seed: int, progress: bool) -> None:
    """Fill `EntryFacts.records`, entry after entry in turn, until all are read or the time is over.

    Raises HostError where this host cannot read now. A bad record is a finding.
    """
    deadline = time.monotonic() + seconds
    turns = [
        [(entry, record) for record in chosen_records(entry.manifest, records, seed)]
        for entry in examined.entries
        if entry.manifest is not None
    ]
    chosen = [place for places in itertools.zip_longest(*turns) for place in places if place is not None]
    with tqdm(total=len(chosen), desc="read", unit=" records", disable=not progress) as bar:
        for number, (entry, record) in enumerate(chosen):
            if time.monotonic() > deadline:
                problem = f"{number} of {len(chosen)} records were read in {seconds:g} s; the others were not"
                examined.findings.append(
                    Finding("note", "limits", "", "", problem, "raise --seconds to read all of them")
                )
                return
            _read_record(entry, record, examined, deadline)
            bar.update()


def _read_record(entry: EntryFacts, number: int, examined: Examined, deadline: float) -> None:
    assert entry.manifest is not None
    shard, offset, size = entry.manifest.place(number)
    facts = RecordFacts(file=str(shard), record=number, offset=offset, size=size)
    dataset = entry.dataset
    try:
        with dataset.reading():
            _Reader(facts, examined).read(dataset.read(dataset.local(shard), offset, size), deadline)
    except HostError:
        raise
    except StokerError as error:
        found = of_error(error, "read", str(shard))
        examined.findings.append(found)
        return
    except Exception as error:  # a dataset class may be anybody's: its failure is a finding
        check_host(error, str(shard))
        logger.debug("dataset class %s failed on %s", type(dataset).__name__, shard, exc_info=True)
        reason = f"{type(dataset).__name__} failed: {type(error).__name__}: {error}"
        examined.findings.append(
            Finding("error", "read", str(shard), f"record {number}", reason, "mend the record, or the dataset class")
        )
        return
    entry.records.append(facts)


class _Reader:
    """Reads one record into its facts."""

    def __init__(self, facts: RecordFacts, examined: Examined) -> None:
        self.facts, self.examined = facts, examined
        self.hash = hashlib.blake2b(digest_size=16)
        self.before: list[NDArray[np.generic]] = []

    def read(self, samples: Iterable[Sample], deadline: float) -> None:
        """All samples, until the deadline. Raises what the dataset raises, and DataError for a sample without a row."""
        actions, states = [], []
        for number, sample in enumerate(samples):
            if number >= _MOST_TIMESTEPS or (number and time.monotonic() > deadline):
                self.facts.is_whole = False
                break
            if sample.action is not None:
                actions.append(np.asarray(sample.action, np.float32)[0])
            if sample.state is not None:
                states.append(np.asarray(sample.state, np.float32))
            self._text(sample)
            self._frames(sample)
            if number < _ROWS_OF_RECORD:
                self._rows(sample)
        self.facts.actions = np.stack(actions) if actions else None
        self.facts.states = np.stack(states) if states else None
        for array in (self.facts.actions, self.facts.states):
            if array is not None:
                self.hash.update(array.tobytes())
        self.facts.content = self.hash.hexdigest() if self.facts.is_whole else ""

    def _text(self, sample: Sample) -> None:
        facts = self.facts
        texts = [turn.text for turn in sample.turns]
        texts += [text for text in (sample.text, sample.answer, sample.instruction or None) if text is not None]
        if not sample.turns and sample.text is None and sample.input_ids is None:
            facts.instructions.add(sample.instruction)
        facts.turns = sample.turns
        for text in texts:
            self.hash.update(text.encode("utf-8", "surrogatepass") + b"\0")
            if text not in facts.texts[-8:]:  # instructions repeat
                facts.texts.append(text)
        if sample.input_ids is not None:
            self.hash.update(np.ascontiguousarray(sample.input_ids).tobytes())

    def _frames(self, sample: Sample) -> None:
        cameras = self.facts.cameras
        while len(cameras) < len(sample.images):
            cameras.append(CameraFacts())
        for number, (frame, camera) in enumerate(zip(sample.images, cameras, strict=False)):
            self.hash.update(np.ascontiguousarray(frame[::8, ::8]).tobytes())
            camera.sizes.add((frame.shape[0], frame.shape[1]))
            camera.num_frames += 1
            pixels = frame if frame.dtype == np.uint8 else np.minimum(frame, 255)  # depth in mm: 0 is no return
            is_constant = bool(pixels.std() < _CONSTANT)
            camera.num_constant += is_constant
            camera.num_black += is_constant and bool(pixels.mean() < _BLACK)
            if number < len(self.before):
                camera.num_repeated += bool(np.array_equal(frame, self.before[number]))
        self.before = list(sample.images)

    def _rows(self, sample: Sample) -> None:
        processor = self.examined.processor
        if processor is None:
            return
        for image in sample.images:
            processor.encode_image(image, None)
        text = TextSample.of(sample)
        if text is not None:
            [rows] = rows_of([text], processor)
            if isinstance(rows, DataError):
                raise _placed(rows, self.facts)
            self.facts.rows += [row_facts(row, is_answer=bool(sample.turns)) for row in rows]
            return
        if sample.action is not None and self.examined.codec is None:
            return  # the scan failed, which is a finding
        codes = None
        if sample.action is not None:
            assert self.examined.codec is not None
            codes = self.examined.codec.encode(np.asarray(sample.action, np.float32)[None])[0]
        try:
            row = processor.encode(
                sample.instruction, len(sample.images), codes=codes, answer=sample.answer, state=sample.state
            )
        except DataError as error:
            raise _placed(error, self.facts) from error
        self.facts.rows.append(row_facts(row, is_answer=True))
        if sample.action is not None:
            self.facts.round_trip.append(_round_trip(row, sample, processor))


def row_facts(row: EncodedRow, *, is_answer: bool) -> RowFacts:
    """What is kept of a row."""
    labels = np.flatnonzero(row.supervised)
    return RowFacts(
        num_tokens=len(row.input_ids),
        num_labels=len(labels),
        last_label=int(row.input_ids[labels[-1]]) if len(labels) else None,
        is_answer=is_answer,
    )


def _round_trip(
    row: EncodedRow, sample: Sample, processor: Processor
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The chunk float32[K, D], and the one that the row's tokens decode to."""
    action = np.asarray(sample.action, np.float32)
    encoded = EncodedSample(row.input_ids, row.supervised, (), action, sample.timestep)
    return action, decoded_action(encoded, row.supervised.astype(bool), processor)


def _placed(error: DataError, facts: RecordFacts) -> DataError:
    return type(error)(
        error.reason, file=error.file or facts.file, record=error.record or str(facts.record), field=error.field
    )
