"""Before a loader serves: one sample of each entry is written as a row, so that rows that never fit are an error at the start.

    data.max_seq_len too small for the images of a sample, a dialogue that the template cannot write, states that are missing

Where actions have a variable number of tokens, one sample says little. So the longest of some thousand chunks takes the place of
its action, and a warning says if the row does not fit; such a chunk may never occur with so long an instruction.

Bad samples are not searched here: they are reported, or skipped, when they are read.

If sources are weighed by tokens and an entry's tokens were not counted, its first good sample stands for all: samples of a robot
have about the same length. Every loader that holds the entry finds the same length.
"""

from __future__ import annotations

import logging
from itertools import islice

import numpy as np

from loader_service.manifest import EntryManifest
from loader_service.pieces.text_samples import TextSample, notes_of, rows_of
from loader_service.prepare.cameras import camera_findings
from loader_service.prepare.fit import sampled_chunks
from loader_service.prepare.run import Prepared
from loader_service.prepare.turn_ends import EndCheck
from loader_service.sources.base import BaseSFTDataset, Sample, make_datasets
from loader_service.sources.fields import REASONED
from stoker_proto.config import Config, DataConfig
from stoker_proto.errors import DataError, FetchError, RowError, located
from stoker_proto.host.trouble import host_errors
from stoker_proto.images.padding import unpadded_by
from stoker_proto.model_folder import ModelFolder
from stoker_proto.processor import Processor

logger = logging.getLogger(__name__)

_RECORDS = 3
"""First records of each entry that are read, one sample each. A stored NPZ is read frame by frame, a deflated one whole."""
_CHUNKS = 2048
"""Chunks of an entry whose tokens are counted: about 40 ms."""
_MOST_RECORDS = 1000
"""Records that are read at most to find a length, where the first ones are bad."""


def check_first_records(config: Config, prepared: Prepared, processor: Processor) -> dict[str, dict[int, int]]:
    """split -> entry -> tokens of all its samples: as counted, or with `data.weigh_by: tokens` estimated by the first good one;
    0 where there is none.

    Raises RowError naming the sample, the tokens that it needs and the way out.
    """
    data, datasets = config.data, make_datasets(config.data)
    folder = ModelFolder(config.model.base_model_path)
    ends = EndCheck(processor, folder, data)
    unpadded = unpadded_by(processor.image, folder)
    if unpadded is not None:
        logger.warning("%s", unpadded)
    tokens: dict[str, dict[int, int]] = {}
    for split, entries in prepared.entries.items():
        tokens[split] = {}
        for entry, manifest in entries.items():
            counted = int(manifest.num_tokens.sum(dtype=np.int64))
            _warn_of_reasoning(manifest, processor)
            with located(field=data.path_key(split, entry)):
                dataset = datasets[data.entry_sources(split)[entry]]
                longest = _longest_chunk(manifest, data, processor)
                wanted = not counted and data.weigh_by == "tokens"
                length = _check_entry(manifest, dataset, processor, ends, longest=longest, wanted=wanted)
            # Not estimated unasked: loaders of other shards would estimate by another record.
            tokens[split][entry] = counted or length * manifest.total_samples * (data.weigh_by == "tokens")
    return tokens


def _warn_of_reasoning(manifest: EntryManifest, processor: Processor) -> None:
    reasoned = next((note for note in manifest.notes if note.startswith(REASONED)), None)
    if reasoned is not None and not processor.writes_reasoning:
        logger.warning(
            "%s: %d records have reasoning beside the content of turns, and the template has no place for it: it is written "
            "before the content as <think>. Use a model whose chat template has a place for it, or set data.options.reasoning "
            "to inline or drop",
            manifest.path, manifest.notes[reasoned],
        )  # fmt: skip


def _longest_chunk(manifest: EntryManifest, data: DataConfig, processor: Processor) -> int:
    """Tokens of the longest of some chunks of the entry; 0 if all chunks have the same number."""
    if processor.codec is None or processor.codec.code_lengths is None:
        return 0
    chunks = sampled_chunks(manifest, data.action)
    return 0 if chunks is None else max(map(len, processor.codec.encode(chunks[:_CHUNKS])), default=0)


def _check_entry(
    manifest: EntryManifest,
    dataset: BaseSFTDataset,
    processor: Processor,
    ends: EndCheck,
    *,
    longest: int,
    wanted: bool,
) -> int:
    """The tokens of the first good sample.

    longest: tokens of an action that may occur, 0 where all have as many; wanted: look beyond the first records where these are
    all bad.
    """
    length, needed = 0, 0
    cut: dict[str, None] = {}  # findings, each once
    for number, record in enumerate(manifest.first_records(_MOST_RECORDS)):
        if number >= _RECORDS and (length or not wanted):
            break
        shard, offset, size = manifest.place(record)
        try:
            with host_errors(str(shard)), dataset.reading():
                for sample in islice(dataset.read(dataset.local(shard), offset, size), 1):
                    found, of_action = _write(sample, processor, ends)
                    cut |= dict.fromkeys(camera_findings(sample.images, processor.image))
                    length = length or found
                    needed = max(needed, found - of_action + longest if of_action else 0)
        except FetchError as error:
            if wanted and not length:  # that of another record would not be what other loaders found
                raise
            logger.warning("a sample that the start would look at is left for later: %s", error)
        except RowError as error:
            raise RowError(error.reason, file=str(shard), record=str(record)) from error
        except DataError as error:
            logger.info("a bad sample among the first of %s: %s", manifest.path, error)
        except Exception:  # users write dataset classes: the error is reported when a rank requests the record
            logger.exception("dataset class %s failed on %s", type(dataset).__name__, shard)
    for finding in cut:
        logger.warning("%s: %s", manifest.path, finding)
    ends.tell(manifest.path)
    if longest and needed > dataset.config.max_seq_len:
        logger.warning(
            "%s: action chunks of up to %d tokens occur, and with the first samples' instruction and images such a row needs %d; "
            "data.max_seq_len is %d, and a row that does not fit ends the run: raise it to %d",
            manifest.path, longest, needed, dataset.config.max_seq_len, needed,
        )  # fmt: skip
    return length


def _write(sample: Sample, processor: Processor, ends: EndCheck) -> tuple[int, int]:
    """(tokens of the sample's row, or the mean of its rows; tokens of its action)."""
    text = TextSample.of(sample)
    if text is not None:
        for note in notes_of(text, processor):
            logger.warning("%s", note)
        [rows] = rows_of([text], processor)
        if isinstance(rows, DataError):
            raise rows
        ends.look(text, rows)
        return sum(len(row.input_ids) for row in rows) // max(len(rows), 1), 0
    codes = None
    if sample.action is not None and processor.codec is not None:
        codes = processor.codec.encode(np.asarray(sample.action, np.float32)[None])[0]
    row = processor.encode(
        sample.instruction, len(sample.images), codes=codes, answer=sample.answer, state=sample.state
    )
    return len(row.input_ids), 0 if codes is None else len(codes)
