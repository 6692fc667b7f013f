"""Samples of language -> rows: dialogues, plain text, ids. The loader makes rows of them, loader-prepare counts those rows.

Sample(turns=...)                 one row; several where the model's chat template rewrites history
Sample(text=...), input_ids=...   as many as it needs; none where it has no token
Sample(input_ids=..., labels=...) one row
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord
from loader_service.sources.fields import OF_THE_FIRST
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError, located
from stoker_proto.host.hub_cache import find_model_folder
from stoker_proto.host.trouble import check_host
from stoker_proto.model_folder import ModelFolder
from stoker_proto.processor import Processor
from stoker_proto.text.chat_rows import DialogueSample
from stoker_proto.text.rows import EncodedRow
from stoker_proto.text.turns import Turn

logger = logging.getLogger(__name__)
T = TypeVar("T")

_NO_TOKEN = "left out: no token to learn"
"""No row is made of a text that the tokenizer drops, or of a single token id: neither has a token to learn."""
_FORMS = ("turns", "text", "input_ids", "action", "answer")
_BATCH_CHARACTERS = 1 << 20
"""Texts are tokenised together up to this many characters: enough to keep the cores busy, with bounded memory."""


@dataclass(frozen=True, slots=True)
class TextSample:
    """A sample of language, before it is tokenised: turns, text or token ids, and how many images belong to it."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...]
    text: str | None
    special_tokens: tuple[str, ...]
    input_ids: NDArray[np.int32] | None
    labels: NDArray[np.int32] | None
    num_images: int

    @property
    def num_characters(self) -> int:
        """Of its texts; ids count as characters."""
        return (
            len(self.text or "")
            + sum(len(turn.text) + len(turn.reasoning or "") for turn in self.turns)
            + (0 if self.input_ids is None else len(self.input_ids))
        )

    @classmethod
    def of(cls, sample: Sample) -> TextSample | None:
        """None for a sample with an instruction. Raises DataError for a sample that has several forms at once."""
        if not sample.turns and sample.text is None and sample.input_ids is None:
            return None
        given = [name for name in _FORMS if getattr(sample, name) is not None and (name != "turns" or sample.turns)]
        if len(given) > 1:
            raise DataError(f"a sample has {' and '.join(given)}: one of them is expected")
        if sample.labels is not None and sample.input_ids is None:
            raise DataError("a sample has labels and no input_ids: labels belong to token ids")
        if sample.images and not sample.turns and sample.labels is None:
            raise DataError(
                f"plain text with {len(sample.images)} images: only dialogues, instructions and input_ids with labels have images"
            )
        return cls(
            sample.turns,
            sample.tools,
            sample.text,
            sample.special_tokens,
            sample.input_ids,
            sample.labels,
            len(sample.images),
        )


def rows_of(samples: Sequence[TextSample], processor: Processor) -> list[list[EncodedRow] | DataError]:
    """The rows of each sample, or the reason why it has none. All samples are tokenised together."""
    return _together(samples, lambda some: _rows_of(some, processor))


Counts = tuple[int, int, tuple[int, ...]]
"""(rows, tokens in them, tokens of each) of a sample; the last is empty where the first two determine it."""


def counts_of(samples: Sequence[TextSample], processor: Processor) -> list[Counts | DataError]:
    """The counts of each sample, of the rows that `rows_of` would make. Rows of plain text are counted, not built."""
    return _together(samples, lambda some: _counts_of(some, processor))


def _lengths_of(samples: Sequence[TextSample], processor: Processor) -> list[Counts | DataError]:
    """The counts of each sample, with the tokens of each row."""
    counts: list[Counts | DataError] = []
    for rows in rows_of(samples, processor):
        if isinstance(rows, DataError):
            counts.append(rows)
        else:
            lengths = tuple(len(row.input_ids) for row in rows)
            counts.append((len(lengths), sum(lengths), lengths))
    return counts


def notes_of(sample: TextSample, processor: Processor) -> list[str]:
    """What of a sample is written otherwise than it may be meant."""
    if sample.text is not None:
        return processor.notes.of_text(sample.text, sample.special_tokens)
    return processor.notes.of_turns(sample.turns)


def _together(
    samples: Sequence[TextSample], write: Callable[[Sequence[TextSample]], list[T | DataError]]
) -> list[T | DataError]:
    """`write(samples)`. If a library raises, each sample is written by itself, so that one bad sample does not fail the others.

    Examples of such samples: half a surrogate pair from a dataset class, a dialogue that the model's template cannot render.
    """
    try:
        return write(samples)
    except ConfigError:
        raise
    except Exception as error:
        check_host(error)
        if len(samples) > 1:
            return [found for one in samples for found in _together([one], write)]
        logger.exception("a text, its turns or its ids cannot be written as rows")
        return [DataError(f"it cannot be written as rows ({type(error).__name__}: {error})")]


def _rows_of(samples: Sequence[TextSample], processor: Processor) -> list[list[EncodedRow] | DataError]:
    dialogues = iter(
        processor.encode_dialogues(
            [DialogueSample(sample.turns, sample.num_images, sample.tools) for sample in samples if sample.turns]
        )
    )
    texts = iter(processor.texts.of_texts([(w.text, w.special_tokens) for w in samples if w.text is not None]))
    rows: list[list[EncodedRow] | DataError] = []
    for sample in samples:
        if sample.turns:
            rows.append(next(dialogues))
        elif sample.text is not None:
            rows.append(next(texts))
        else:
            try:
                rows.append(_rows_of_ids(sample, processor))
            except DataError as error:
                rows.append(error)
    return rows


def _rows_of_ids(sample: TextSample, processor: Processor) -> list[EncodedRow]:
    ids = np.asarray(sample.input_ids)
    if sample.labels is None:
        return processor.texts.of_ids(ids)
    return [processor.encode_labelled(ids, sample.labels, sample.num_images)]


def _counts_of(samples: Sequence[TextSample], processor: Processor) -> list[Counts | DataError]:
    others = iter(_rows_of([sample for sample in samples if sample.text is None], processor))
    texts = iter(processor.texts.count_texts([(w.text, w.special_tokens) for w in samples if w.text is not None]))
    counts: list[Counts | DataError] = []
    for sample in samples:
        found = next(others) if sample.text is None else next(texts)
        if isinstance(found, list):
            counts.append((len(found), sum(len(row.input_ids) for row in found), ()))
        else:
            counts.append(found if isinstance(found, DataError) else (*found, ()))
    return counts


@dataclass(slots=True)
class _Pending:
    """A record whose rows are not counted yet."""

    record: ScannedRecord
    samples: list[TextSample] = field(default_factory=list)


class RowCounter:
    """Adds to scanned records how many rows and tokens the loader will make of them."""

    def __init__(self, dataset: BaseSFTDataset, processor: Processor) -> None:
        self._dataset, self._processor = dataset, processor

    def count(self, shard: Path, records: Iterable[ScannedRecord]) -> Iterator[ScannedRecord]:
        """The records in their order. A bad one raises DataError; under policy `skip` it keeps its place, with the reason."""
        batch: list[_Pending] = []
        characters = 0
        for record in records:
            pending = self._read(shard, record)
            batch.append(pending)
            characters += sum(sample.num_characters for sample in pending.samples)
            if characters >= _BATCH_CHARACTERS:
                yield from self._finish(shard, batch)
                batch, characters = [], 0
        yield from self._finish(shard, batch)

    def _read(self, shard: Path, record: ScannedRecord) -> _Pending:
        pending = _Pending(record)
        if record.error is not None or record.num_samples == 0:  # left out: never read
            return pending
        # `validate` gave them already; what a scan says of the first records only is said of all here.
        notes = dict.fromkeys(note for note in record.notes if OF_THE_FIRST not in note)
        try:
            for read in self._dataset.read(shard, record.offset, record.size):
                sample = TextSample.of(read)
                if sample is None:
                    raise DataError(
                        f"{type(self._dataset).__name__}.is_text is set, and `read` gives a sample without turns, text or "
                        "input_ids"
                    )
                pending.samples.append(sample)
                notes.update(dict.fromkeys((*read.notes, *notes_of(sample, self._processor))))
        except DataError as error:
            return _Pending(self._bad(shard, record, error))
        pending.record = replace(record, notes=tuple(notes))
        return pending

    def _finish(self, shard: Path, batch: Sequence[_Pending]) -> Iterator[ScannedRecord]:
        samples = [sample for pending in batch for sample in pending.samples]
        divides = self._processor.divides_dialogues
        counts = iter(_lengths_of(samples, self._processor) if divides else counts_of(samples, self._processor))
        for pending in batch:
            record = pending.record
            if record.error is not None or record.num_samples == 0:
                yield record
                continue
            found = [next(counts) for _ in pending.samples]
            bad = next((count for count in found if isinstance(count, DataError)), None)
            if bad is not None:
                yield self._bad(shard, record, bad)
                continue
            good = [count for count in found if not isinstance(count, DataError)]
            notes = record.notes if all(counted[0] for counted in good) else (*record.notes, _NO_TOKEN)
            rows, tokens = sum(counted[0] for counted in good), sum(counted[1] for counted in good)
            lengths = tuple(length for counted in good for length in counted[2]) if divides else ()
            yield replace(record, num_samples=rows, num_tokens=tokens, row_tokens=lengths, notes=notes)

    def _bad(self, shard: Path, record: ScannedRecord, error: DataError) -> ScannedRecord:
        check_host(error, str(shard))  # a dataset class may wrap it
        file, name = self._dataset.where(shard, record.offset)
        try:
            with located(file=file, record=name):
                raise error
        except DataError as found:
            if self._dataset.config.on_bad_sample == "fail":
                raise
            return replace(record, error=str(found))


@dataclass(frozen=True, slots=True)
class Counting:
    """How rows and tokens are counted. Sent to the scanning processes, each of which builds its own processor."""

    config: Config
    fingerprint: str
    """Of the settings that decide the counts; loaders compare it. Equal for a tokenizer.json that was saved again."""
    file_hash: str
    """Of the bytes of tokenizer.json: cached counts are used for exactly this file."""

    @classmethod
    def needed(cls, config: Config, dataset: BaseSFTDataset) -> Counting | None:
        """None if the scan knows the number of rows and no setting needs tokens. Raises ConfigError.

        A chat template that rewrites history makes several rows of a dialogue, so they are counted then.
        """
        if not dataset.is_text:
            return None
        # loader-prepare also runs where the model is not yet. A loader has it, and counts then.
        template, folder = config.data.dialogue.template, find_model_folder(config.model.base_model_path)
        may_divide = template in ("auto", "chat_template") and folder.is_dir()
        if not dataset.is_counted and not may_divide:
            return None
        processor = Processor.build(config, None)
        if not dataset.is_counted and not processor.divides_dialogues:
            return None
        file_hash = hashlib.blake2b(
            ModelFolder(config.model.base_model_path).tokenizer_file.read_bytes(), digest_size=16
        )
        return cls(config, processor.text_fingerprint, file_hash.hexdigest())

    def counter(self, dataset: BaseSFTDataset) -> RowCounter:
        """The counter of this process."""
        key = self.fingerprint, self.file_hash
        processor = _processors.get(key)
        if processor is None:
            _processors.clear()
            processor = _processors[key] = Processor.build(self.config, None)
        return RowCounter(dataset, processor)


_processors: dict[tuple[str, str], Processor] = {}  # the last one used
