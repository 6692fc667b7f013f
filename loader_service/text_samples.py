"""Samples of language -> rows: dialogues, plain text, ids. The loader makes rows of them, loader-prepare counts those rows.

Sample(turns=...)                 one row
Sample(text=...), input_ids=...   as many as it needs; none where it has no token
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord
from stoker_proto.config import Config
from stoker_proto.errors import DataError, located
from stoker_proto.processor import Processor
from stoker_proto.rows import EncodedRow

_BATCH_CHARACTERS = 1 << 20
"""Texts are tokenised together up to this much: bounds the memory, and keeps the cores busy."""


def is_language(sample: Sample) -> bool:
    """Whether it is a dialogue, text or ids. Raises DataError for a sample of several forms."""
    if not sample.turns and sample.text is None and sample.input_ids is None:
        return False
    forms = {
        "turns": bool(sample.turns),
        "text": sample.text is not None,
        "input_ids": sample.input_ids is not None,
        "action": sample.action is not None,
        "answer": sample.answer is not None,
    }
    given = [name for name, there in forms.items() if there]
    if len(given) > 1 and given != ["action", "answer"]:  # those two are the rows' to refuse
        raise DataError(f"a sample has {' and '.join(given)}: one of them is expected")
    return given[:1] in (["turns"], ["text"], ["input_ids"])


def rows_of(sample: Sample, processor: Processor) -> list[EncodedRow]:
    """The rows of a sample for which `is_language` holds. Raises DataError."""
    if sample.turns:
        return [processor.encode_turns(sample.turns, len(sample.images))]
    if sample.images:
        raise DataError(f"plain text with {len(sample.images)} images: only dialogues and instructions have images")
    if sample.text is not None:
        return processor.texts.of_text(sample.text, sample.special_tokens)
    if sample.input_ids is None:
        raise DataError("a sample has no turns, text or input_ids")
    return processor.texts.of_ids(sample.input_ids)


@dataclass(slots=True)
class _Pending:
    """A record whose texts are not counted yet."""

    record: ScannedRecord
    rows: int = 0
    tokens: int = 0
    texts: list[tuple[str, Collection[str]]] = field(default_factory=list)


class RowCounter:
    """Gives scanned records the numbers of rows and tokens that the loader will make of them."""

    def __init__(self, dataset: BaseSFTDataset, processor: Processor) -> None:
        self._dataset, self._processor = dataset, processor

    def count(self, shard: Path, records: Iterable[ScannedRecord]) -> Iterator[ScannedRecord]:
        """The records in their order. A bad one raises DataError, or under policy `skip` says why and keeps its place."""
        batch: list[_Pending] = []
        characters = 0
        for record in records:
            pending = self._read(shard, record)
            batch.append(pending)
            characters += sum(len(text) for text, _ in pending.texts)
            if characters >= _BATCH_CHARACTERS:
                yield from self._finish(shard, batch)
                batch, characters = [], 0
        yield from self._finish(shard, batch)

    def _read(self, shard: Path, record: ScannedRecord) -> _Pending:
        pending = _Pending(record)
        if record.error is not None or record.num_samples == 0:  # left out: nobody will read it
            return pending
        try:
            with located(file=str(shard), record=str(record.offset)):
                for sample in self._dataset.read(shard, record.offset, record.size):
                    self._add(pending, sample)
                    if sample.notes:
                        notes = dict.fromkeys((*pending.record.notes, *sample.notes))  # `validate` gave them already
                        pending.record = replace(pending.record, notes=tuple(notes))
        except DataError as error:
            if self._dataset.config.on_bad_sample == "fail":
                raise
            return _Pending(replace(record, error=str(error)))
        return pending

    def _add(self, pending: _Pending, sample: Sample) -> None:
        if not is_language(sample):
            raise DataError(
                f"{type(self._dataset).__name__}.is_text is set, and `read` gives a sample without turns, text or input_ids"
            )
        if sample.text is not None and not sample.images:
            pending.texts.append((sample.text, sample.special_tokens))
            return
        rows = rows_of(sample, self._processor)
        pending.rows += len(rows)
        pending.tokens += sum(len(row.input_ids) for row in rows)

    def _finish(self, shard: Path, batch: Sequence[_Pending]) -> Iterator[ScannedRecord]:
        try:
            counts = iter(self._processor.texts.count_texts([text for pending in batch for text in pending.texts]))
        except DataError:  # some text of the batch cannot be encoded: one by one, so that it is named
            for pending in batch:
                yield self._finish_one(shard, pending)
            return
        for pending in batch:
            yield _counted(pending, [next(counts) for _ in pending.texts])

    def _finish_one(self, shard: Path, pending: _Pending) -> ScannedRecord:
        try:
            return _counted(pending, self._processor.texts.count_texts(pending.texts))
        except DataError as error:
            named = DataError(error.reason, file=str(shard), record=str(pending.record.offset))
            if self._dataset.config.on_bad_sample == "fail":
                raise named from error
            return replace(pending.record, error=str(named))


@dataclass(frozen=True, slots=True)
class Counting:
    """That records are counted, and by what: sent to scanning processes, each of which builds its own processor."""

    config: Config
    fingerprint: str

    @classmethod
    def needed(cls, config: Config, dataset: BaseSFTDataset) -> Counting | None:
        """None where `scan` knows the number of rows and nobody asks for tokens. Raises ConfigError."""
        data = config.data
        lengths_matter = data.packing or data.group_by_length or data.weigh_by == "tokens"
        if not dataset.is_text or (dataset.one_row_each and not lengths_matter):
            return None
        return cls(config, Processor.build(config, None).text_fingerprint)

    def counter(self, dataset: BaseSFTDataset) -> RowCounter:
        """Of this process."""
        processor = _processors.get(self.fingerprint)
        if processor is None:
            _processors.clear()
            processor = _processors[self.fingerprint] = Processor.build(self.config, None)
        return RowCounter(dataset, processor)


_processors: dict[str, Processor] = {}  # the last one used


def _counted(pending: _Pending, counts: list[tuple[int, int]]) -> ScannedRecord:
    if pending.record.error is not None:
        return pending.record
    rows = pending.rows + sum(rows for rows, _ in counts)
    tokens = pending.tokens + sum(tokens for _, tokens in counts)
    return replace(pending.record, num_samples=rows, num_tokens=tokens)
