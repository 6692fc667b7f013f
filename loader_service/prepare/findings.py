"""Findings of a scan that are no errors, but that the user should know before training.

val 0 (val.jsonl): 12 of its 40 records are train data too          the same file, or a copy of it
train 1 (train.jsonl): 40 of its 40 records are in train 0 too      two globs that name one file
train 1 (b.jsonl): dimension 6 reaches from -1 to 1                 and in train 0 from 0 to 1: grippers of two conventions
train 0 (data): its files are of several splits                     data/train-0.parquet and data/test-0.parquet
train 0 (train.jsonl): 3 trajectories have no timestep left         data.action.drop_noops
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from loader_service.manifest import EntryManifest
from loader_service.prepare.entry import EntryJob

_MOST_NAMED = 3
_SPLIT = re.compile("(?<![a-z])(train(?:ing)?|test(?:ing)?|val(?:id(?:ation)?)?|dev|eval)(?![a-z])")
"""A split in the name of a file or folder."""

ShardRecords = tuple[str, NDArray[np.int64]]
"""(shard's content, offsets of its records that have samples)."""


def scan_findings(jobs: Sequence[EntryJob], entries: Mapping[str, Mapping[int, EntryManifest]]) -> tuple[str, ...]:
    """One line for each finding."""
    held = [(job, entries[job.split][job.entry]) for job in jobs]
    of_index = (
        f"{_name(job, manifest)}: {line}" for job, manifest in held for line in job.dataset.findings(job.shards.paths)
    )
    return (
        *_trained_and_validated(held),
        *_trained_twice(held),
        *_several_splits(held),
        *_two_ranges(held),
        *_emptied(held),
        *of_index,
    )


def _name(job: EntryJob, manifest: EntryManifest) -> str:
    return f"{job.split} {job.entry} ({manifest.path})"


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


def _trained_twice(held: Sequence[tuple[EntryJob, EntryManifest]]) -> Iterator[str]:
    """Records of a train entry that an entry before it has, too."""
    known: dict[str, list[tuple[int, NDArray[np.int64]]]] = {}
    for job, manifest in held:
        if job.split != "train":
            continue
        shared, other = 0, -1
        own = list(_records(job, manifest))
        for content, offsets in own:
            for entry, before in known.get(content, ()):
                both = int(np.isin(offsets, before).sum())
                if both:
                    shared, other = shared + both, entry if other < 0 else other
                    break
        for content, offsets in own:
            known.setdefault(content, []).append((job.entry, offsets))
        if shared:
            total = int(np.count_nonzero(manifest.num_samples))
            yield (
                f"{_name(job, manifest)}: {shared} of its {total} records are in train {other} too, so each epoch trains them "
                "more than once: name each file once, or keep it if that is meant"
            )


def _several_splits(held: Sequence[tuple[EntryJob, EntryManifest]]) -> Iterator[str]:
    """Entries whose files are, by their names, of a train split and of another one, as in many published data sets."""
    for job, manifest in held:
        found: dict[bool, str] = {}
        for name in job.shards.names:
            if said := _SPLIT.findall(name.lower()):
                found.setdefault(said[-1].startswith("train"), name)
        if len(found) == 2:
            used = "trained" if job.split == "train" else "validated on"
            yield (
                f"{_name(job, manifest)}: by their names its files are of several splits ({found[True]}, {found[False]}), and "
                f"all of them are {used}: name those that are meant, e.g. {job.shards.base}/*train*"
            )


def _two_ranges(held: Sequence[tuple[EntryJob, EntryManifest]]) -> Iterator[str]:
    """Dimensions that reach from 0 to 1 in one train entry and from -1 to 1 in another: 0 would mean two things."""
    known = [
        (job, manifest, statistics)
        for job, manifest in held
        if job.split == "train" and (statistics := manifest.statistics) is not None
    ]
    for d in range(max((statistics.dim for *_, statistics in known), default=0)):
        found: dict[float, str] = {}
        for job, manifest, statistics in known:
            if d < statistics.dim and statistics.max[d] == 1 and statistics.min[d] in (0, -1):
                found.setdefault(float(statistics.min[d]), _name(job, manifest))
        if len(found) == 2:
            yield (
                f"{found[-1]}: dimension {d} of the actions reaches from -1 to 1, and that of {found[0]} from 0 to 1: a gripper "
                "written in two ways would be learned as two; convert one of them, if they mean the same"
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
