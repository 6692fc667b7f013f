"""`loader-prepare --verify`: read every record of every entry once, with every check there is."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

from loader_service.manifest import EntryManifest
from loader_service.pieces.text_samples import Counting
from loader_service.prepare.scan_pool import PoolOptions, run_all
from loader_service.sources.base import BaseSFTDataset, ScannedRecord
from stoker_proto.errors import DataError, StokerError
from stoker_proto.host.trouble import check_host

logger = logging.getLogger(__name__)

_TASK_RECORDS = 64

VerifyTask = tuple[EntryManifest, int, int]  # records [first, last) of an entry


def verify(
    manifests: Iterable[EntryManifest],
    dataset: BaseSFTDataset,
    *,
    processes: int,
    progress: bool,
    counting: Counting | None = None,
) -> list[str]:
    """One line per bad record, in the order of the records. counting: as for the scan.

    Raises HostError where this host cannot read now."""
    tasks: list[VerifyTask] = [
        (manifest, first, min(first + _TASK_RECORDS, manifest.num_records))
        for manifest in manifests
        for first in range(0, manifest.num_records, _TASK_RECORDS)
    ]
    weights = [last - first for _, first, last in tasks]
    pool = PoolOptions(
        processes=processes,
        progress="verify" if progress else None,
        unit=" records",
        min_weight=_TASK_RECORDS,
    )
    results = run_all(partial(_verify_records, counting=counting), tasks, weights, dataset, pool)
    return [problem for problems in results for problem in problems]


def _verify_records(dataset: BaseSFTDataset, task: VerifyTask, counting: Counting | None) -> list[str]:
    manifest, first, last = task
    counter = None if counting is None else counting.counter(dataset)
    problems = []
    for record in range(first, last):
        shard, offset, size = manifest.place(record)
        expected = int(manifest.num_samples[record])
        try:
            with dataset.reading():
                path = dataset.local(shard)
                found = dataset.verify(path, offset, size)
                if counter is not None:  # samples were read, and rows were counted
                    whole = ScannedRecord(offset=offset, size=size, num_samples=found)
                    [counted] = counter.count(path, [whole])
                    if counted.error is not None:
                        raise DataError(counted.error)
                    found = counted.num_samples
        except DataError as error:
            check_host(error, str(shard))  # a dataset class may wrap it
            problems.append(str(error))
            continue
        except StokerError:
            raise
        except Exception as error:  # any exception of a user's dataset class becomes an error of this record
            check_host(error, str(shard))
            logger.exception("dataset class %s failed on %s", type(dataset).__name__, shard)
            reason = f"{type(dataset).__name__} failed: {type(error).__name__}: {error}"
            problems.append(str(DataError(reason, file=str(shard), record=str(record))))
            continue
        if found != expected:
            problems.append(f"{shard}: record {record}: it gives {found} samples, and the scan counted {expected}")
    return problems
