"""Before anything is served: a sample of each entry is written as a row, so that what can never fit is said at the start.

    data.max_seq_len too small for the images of a sample, a dialogue that the template cannot write, states that are missing

A sample that is bad in itself is not looked for here: it is told, or skipped, when its turn comes.
"""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path

import numpy as np

from loader_service.prepare.manifest import EntryManifest
from loader_service.prepare.run import Prepared
from loader_service.sources.base import BaseSFTDataset, Sample, make_datasets
from loader_service.text_samples import is_language, rows_of
from stoker_proto.config import Config
from stoker_proto.errors import DataError, RowError, located
from stoker_proto.processor import Processor

logger = logging.getLogger(__name__)

_RECORDS = 3
"""First ones of each entry, one sample each: a few milliseconds, as only those frames are decoded."""


def check_first_records(config: Config, prepared: Prepared, processor: Processor) -> None:
    """Raises RowError naming the sample, the tokens that it needs and the way out."""
    data, datasets = config.data, make_datasets(config.data)
    for split, entries in prepared.entries.items():
        for entry, manifest in entries.items():
            with located(field=data.path_key(split, entry)):
                _check_entry(manifest, datasets[data.entry_sources(split)[entry]], processor)


def _check_entry(manifest: EntryManifest, dataset: BaseSFTDataset, processor: Processor) -> None:
    for record in np.flatnonzero(manifest.num_samples[:1000])[:_RECORDS].tolist():
        shard = Path(manifest.shards[int(manifest.shard_index[record])])
        try:
            samples = dataset.read(shard, int(manifest.offsets[record]), int(manifest.sizes[record]))
            for sample in islice(samples, 1):
                _write(sample, processor)
        except RowError as error:
            raise RowError(error.reason, file=str(shard), record=str(record)) from error
        except DataError as error:
            logger.info("a bad sample among the first of %s: %s", manifest.path, error)
        except Exception:  # a dataset class may be anybody's: its failure is told when the record is asked for
            logger.exception("dataset class %s failed on %s", type(dataset).__name__, shard)


def _write(sample: Sample, processor: Processor) -> None:
    if is_language(sample):
        rows_of(sample, processor)
        return
    codes = None
    if sample.action is not None and processor.codec is not None:
        codes = processor.codec.encode(np.asarray(sample.action, np.float32)[None])[0]
    processor.encode(sample.instruction, len(sample.images), codes=codes, answer=sample.answer, state=sample.state)
