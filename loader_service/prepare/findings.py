"""Findings of a scan that are no errors, but that the user should know before training.

val 0 (val.jsonl): 12 of its 40 records are train data too          the same file, or a copy of it
train 0 (train.jsonl): 3 trajectories have no timestep left         data.action.drop_noops
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from loader_service.manifest import EntryManifest
from loader_service.prepare.entry import EntryJob

_MOST_NAMED = 3

ShardRecords = tuple[str, NDArray[np.int64]]
"""(shard's content, offsets of its records that have samples)."""


def scan_findings(jobs: Sequence[EntryJob], entries: Mapping[str, Mapping[int, EntryManifest]]) -> tuple[str, ...]:
    """One line for each finding."""
    held = [(job, entries[job.split][job.entry]) for job in jobs]
    return (*_trained_and_validated(held), *_emptied(held))


def _trained_and_validated(held: Sequence[tuple[EntryJob, EntryManifest]]) -> Iterator[str]:
    """Records of validation that are train data too: in the same file, or in a file with the same bytes."""
    val = [(job, manifest) for job, manifest in held if job.split == "val"]
    train = [(job, manifest) for job, manifest in held if job.split == "train"]
    if not val or not train:
        return
    trained: dict[str, list[NDArray[np.int64]]] = {}
    names: dict[str, str] = {}
    for job, manifest in train:
        for content, offsets in _records(job, manifest):
            trained.setdefault(content, []).append(offsets)
            names.setdefault(content, manifest.path)
    for job, manifest in val:
        shared = 0
        path = ""
        for content, offsets in _records(job, manifest):
            if content in trained:
                both = int(np.isin(offsets, np.concatenate(trained[content])).sum())
                path = path or (names[content] if both else "")
                shared += both
        if shared:
            key = job.dataset.config.path_key("val", 0).partition("[")[0]
            total = int(np.count_nonzero(manifest.num_samples))
            yield (
                f"val {job.entry} ({manifest.path}): {shared} of its {total} records are train data too ({path}), so validation "
                f"measures what was learned by heart: name other data in {key}, or with dataset_type lerobot split the episodes "
                "(data.options.episodes and val_episodes)"
            )


def _records(job: EntryJob, manifest: EntryManifest) -> Iterator[ShardRecords]:
    hashes = job.shard_hashes()
    used = manifest.num_samples > 0
    for number, shard in enumerate(manifest.shards):
        offsets = manifest.offsets[used & (manifest.shard_index == number)] if len(manifest.shards) > 1 else (
            manifest.offsets[used]
        )  # fmt: skip
        yield hashes.get(shard, shard), np.asarray(offsets)


def _emptied(held: Sequence[tuple[EntryJob, EntryManifest]]) -> Iterator[str]:
    """Trajectories without a sample because of data.action.drop_noops."""
    for job, manifest in held:
        empty = np.flatnonzero(manifest.num_samples == 0)
        if not job.dataset.config.action.drop_noops or job.dataset.is_text or not len(empty):
            continue
        named = []
        for record in empty[:_MOST_NAMED].tolist():
            shard, offset, _ = manifest.place(record)
            name = job.shards.names[int(manifest.shard_index[record])]
            is_here = bool(manifest.stamps) and name not in job.absent  # a remote shard need not be
            place = job.dataset.where(shard, offset) if is_here else (str(shard), f"at offset {offset}")
            named.append(" ".join(part for part in place if part))
        more = ", ..." if len(empty) > _MOST_NAMED else ""
        bad = f" (bad records, of which there are {manifest.num_bad}, may be among them)" if manifest.num_bad else ""
        yield (
            f"{job.split} {job.entry} ({manifest.path}): data.action.drop_noops leaves no timestep of {len(empty)} of "
            f"{manifest.num_records} trajectories{bad}: {', '.join(named)}{more}. Turn it off if their actions are in other units"
        )
