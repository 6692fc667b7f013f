"""`prepare`: the manifest of every entry that this loader holds, and the action codec. Scans only what the cache does not
hold."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loader_service.cache_folder import LOCK_DEADLINE_S, cache_root, locked, writable
from loader_service.manifest import EntryManifest
from loader_service.pieces.text_samples import Counting
from loader_service.prepare.absent_shards import confirm, with_absent
from loader_service.prepare.cleanup import tidy, use
from loader_service.prepare.entry import EntryJob
from loader_service.prepare.findings import scan_findings
from loader_service.prepare.fit import fitted_codec, given_codec, given_states, train_actions, train_states
from loader_service.prepare.parts import PartResult, PartTask, run_task
from loader_service.prepare.scan_pool import MIN_POOL_BYTES, PoolOptions, run_all
from loader_service.prepare.statistics_check import check_clamped
from loader_service.shards import refuse_broken
from loader_service.sources.base import BaseSFTDataset, make_datasets
from stoker_proto.actions import ActionCodec, ActionStatistics
from stoker_proto.config import Config, DataConfig
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.host.trouble import host_errors

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
Held = Mapping[str, Collection[int] | Mapping[int, frozenset[str] | None]]
"""split -> numbers of the entries that a loader serves, or number -> paths of their shards that it serves (None: all of them). Of
an entry with such paths, the others need not be here: see `absent_shards`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What loader-prepare knows of the data that a loader holds."""

    entries: dict[str, dict[int, EntryManifest]]
    """split -> number of the entry in the config -> its manifest."""
    codec: ActionCodec | None
    """None without actions."""
    states: ActionStatistics | None = None
    """Statistics of the train data's states, with `data.state: text`."""
    findings: tuple[str, ...] = ()
    """What is no error, and should be known before training (`findings`)."""

    @property
    def statistics(self) -> ActionStatistics | None:
        """Statistics of the actions that the codec was fitted on; None without a codec."""
        return None if self.codec is None else self.codec.statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanOptions:
    """How data is scanned that the cache does not hold."""

    processes: int = 0
    """0: one per core."""
    progress: bool = False
    """Show a bar on stderr."""
    rescan: bool = False
    """Scan again what the cache holds, since files that records name may have changed."""
    lock_deadline_s: float = LOCK_DEADLINE_S
    """How long to wait for another process that scans the same data."""


@host_errors("the data")
def prepare(
    config: Config,
    *,
    splits: Sequence[str] = SPLITS,
    held: Held | None = None,
    scan: ScanOptions = ScanOptions(),
    fit: bool = True,
) -> Prepared:
    """Manifests of the entries and the codec of the train entries, from the cache where nothing changed.

    Args:
        held: what this loader serves; None: all data.
        fit: also the codec and the statistics of the states; without, the result has neither.

    Raises:
        ConfigError: an entry names nothing, the cache cannot be written, or a codec cannot be fitted from what is here.
        DataError: a shard or a record is not what its format promises.
        HostError: this host cannot read now. Finished parts of the scan are kept.
    """
    data = config.data
    datasets = make_datasets(data)
    codec = given_codec(data.action) if fit and data.action.codec_path is not None else None
    jobs = _jobs(config, datasets, splits, held)
    roots = sorted({job.root for job in jobs})
    for root in roots:
        use(root)
    entries: dict[str, dict[int, EntryManifest]] = {split: {} for split in splits}
    for job, manifest in zip(jobs, _manifests(jobs, scan), strict=True):
        entries[job.split][job.entry] = manifest
    _check_not_empty(entries, data)
    _check_budget(entries, data)
    if fit and codec is None and "train" in splits:
        codec = _fit(entries["train"], jobs, data, datasets, scan.lock_deadline_s)
    _check_codec_width(codec, entries)
    if codec is not None and data.action.codec_path is not None:
        _check_given_codec(codec, entries.get("train", {}), data)
    findings = scan_findings(jobs, entries)
    for finding in findings:
        logger.warning("%s", finding)
    states = None
    if fit and data.state == "text":
        states = given_states(data.state_path) if data.state_path is not None else _states(entries, data, splits)
    for root in roots:
        tidy(root)
    return Prepared(entries=entries, codec=codec, states=states, findings=findings)


def _manifests(jobs: Sequence[EntryJob], scan: ScanOptions) -> list[EntryManifest]:
    """The manifest of each job, from the cache or from a scan."""
    manifests: dict[int, EntryManifest] = {}
    if not scan.rescan:
        manifests = {number: manifest for number, job in enumerate(jobs) if (manifest := job.current()) is not None}
    stale = [number for number in range(len(jobs)) if number not in manifests]
    if stale:
        with ExitStack() as stack:
            for root in sorted({jobs[number].root for number in stale}):  # so ordered, two never wait for each other
                stack.enter_context(locked(root, scan.lock_deadline_s))
            for dataset in dict.fromkeys(jobs[number].dataset for number in stale):
                own = [number for number in stale if jobs[number].dataset is dataset]
                confirm([jobs[number] for number in own if jobs[number].absent], _pool(scan, "compare"))
                manifests.update(zip(own, _scan([jobs[number] for number in own], dataset, scan), strict=True))
        for root in sorted({job.root for job in jobs}):
            use(root)  # those that were not there before
    return [manifests[number] for number in range(len(jobs))]


def _pool(scan: ScanOptions, verb: str, min_weight: int | None = None) -> PoolOptions:
    return PoolOptions(processes=scan.processes, progress=verb if scan.progress else None, min_weight=min_weight)


def _check_given_codec(codec: ActionCodec, train: Mapping[int, EntryManifest], data: DataConfig) -> None:
    """Raises ConfigError if the codec of data.action.codec_path was fitted to other actions than those that are here."""
    with_actions = [entry for entry in train.values() if entry.statistics is not None]
    if with_actions:
        own, sample = train_actions(with_actions, data.action)
        check_clamped(codec, sample, own, data.action)


def _jobs(
    config: Config,
    datasets: Sequence[BaseSFTDataset],
    splits: Sequence[str],
    held: Held | None,
) -> list[EntryJob]:
    data, jobs = config.data, []
    cache_dir = None if data.cache_dir is None else Path(data.cache_dir)
    counting = [Counting.needed(config, dataset) for dataset in datasets]
    for split in splits:
        views = [dataset.for_split(split) for dataset in datasets]
        for number, (path, source) in enumerate(zip(data.paths(split), data.entry_sources(split), strict=True)):
            dataset = views[source]
            here: Collection[int] = (number,) if held is None else held.get(split, ())
            if number not in here:
                continue
            served = here[number] if isinstance(here, Mapping) else None
            try:
                shards = dataset.locate(path) if served is None else dataset.locate_here(path)
                if served is None:
                    refuse_broken(shards)
            except ConfigError as error:
                raise ConfigError(f"{data.path_key(split, number)}: {error}") from None
            root = cache_root(shards.base, cache_dir)
            job = EntryJob(split, number, path, shards, root, dataset, counting[source], served)
            jobs.append(job if served is None else with_absent(job))
    return jobs


def _scan(jobs: Sequence[EntryJob], dataset: BaseSFTDataset, scan: ScanOptions) -> list[EntryManifest]:
    """Their manifests. The caller holds the locks; what another process has just scanned is used, unless `scan.rescan`."""
    # Data that is named twice is scanned once.
    left = {job.folder: job for job in jobs if scan.rescan or job.current() is None}
    tasks = [job.tasks(rescan=scan.rescan) for job in left.values()]
    flat = [task for of_job in tasks for task in of_job]
    counting = jobs[0].counting if jobs else None  # all of them are of one dataset
    pool = _pool(scan, "scan", None if counting is None else MIN_POOL_BYTES // 16)  # tokenising is that much more work

    def run(tasks: Sequence[PartTask]) -> list[list[PartResult]]:
        weights = [task.stop - task.start for task in tasks]
        return run_all(partial(run_task, counting=counting), tasks, weights, dataset, pool)

    found = iter(run(flat))
    results = [[part for _ in of_job for part in next(found)] for of_job in tasks]
    again = [job.kept_too_few(parts) for job, parts in zip(left.values(), results, strict=True)]
    more = iter(run([task for of_job in again for task in of_job.values()]))
    for job, parts, of_job in zip(left.values(), results, again, strict=True):
        for number in of_job:
            [parts[number]] = next(more)
        with writable(job.root):
            job.assemble(parts)
    done: list[EntryManifest] = []
    for job in jobs:
        manifest = job.current()
        if manifest is None:
            raise DataError("its shards changed while they were scanned: run loader-prepare again", file=job.path)
        done.append(manifest)
    return done


def _fit(
    train: dict[int, EntryManifest],
    jobs: Sequence[EntryJob],
    data: DataConfig,
    datasets: Sequence[BaseSFTDataset],
    lock_deadline_s: float,
) -> ActionCodec | None:
    sources = data.entry_sources("train")
    missing = [n for n, source in enumerate(sources) if n not in train and not datasets[source].is_text]
    if not train and not missing:
        return None  # text has nothing to fit, here or elsewhere
    if not missing:
        of_train = [job for job in jobs if job.split == "train"]
        keys = {job.dataset.action_key for job in of_train if train[job.entry].statistics is not None}
        dimensions = set().union(*(job.dataset.action_names(job.shards.paths) for job in of_train))
        return fitted_codec(list(train.values()), data.action, of_train[0].root, keys, dimensions, lock_deadline_s)
    if train and all(entry.statistics is None for entry in train.values()):
        return None
    names = ", ".join(data.path_key("train", number) for number in missing)
    raise ConfigError(
        f"{names} {'is' if len(missing) == 1 else 'are'} not here, and the action codec is fitted on all train data: run "
        "`loader-prepare --codec-out FILE` where all of it is, and name that file in data.action.codec_path"
    )


def _states(
    entries: Mapping[str, Mapping[int, EntryManifest]], data: DataConfig, splits: Sequence[str]
) -> ActionStatistics | None:
    if "train" not in splits:
        return None
    if len(entries["train"]) < len(data.paths("train")):
        raise ConfigError(
            "data.state is text, its scale is fitted on all train data, and not all of that is here: run `loader-prepare "
            "--state-out FILE` where it is, and name that file in data.state_path"
        )
    return train_states(list(entries["train"].values()))


def _check_not_empty(entries: Mapping[str, Mapping[int, EntryManifest]], data: DataConfig) -> None:
    for split, manifests in entries.items():
        for number, manifest in manifests.items():
            if manifest.total_samples == 0:
                reasons = [f"{count} records: {note}" for note, count in manifest.notes.items()]
                if data.action.drop_noops:
                    reasons.append("data.action.drop_noops is true")
                raise DataError(
                    f"no sample in all its {manifest.num_records} records ({'; '.join(reasons) or 'they are empty'}): change "
                    f"what leaves them out, or remove {data.path_key(split, number)}",
                    file=manifest.path,
                )


def _check_budget(entries: Mapping[str, Mapping[int, EntryManifest]], data: DataConfig) -> None:
    bad = [manifest for manifests in entries.values() for manifest in manifests.values() if manifest.num_bad]
    num_bad = sum(manifest.num_bad_samples for manifest in bad)
    for manifest in bad:
        logger.warning("%s: %d bad records are skipped, e.g. %s", manifest.path, manifest.num_bad, manifest.errors[0])
    if num_bad > data.bad_sample_budget:
        raise DataError(
            f"{num_bad} samples of {sum(manifest.num_bad for manifest in bad)} bad records, and data.bad_sample_budget is "
            f"{data.bad_sample_budget}; the first: {bad[0].errors[0]}"
        )


def _check_codec_width(codec: ActionCodec | None, entries: Mapping[str, Mapping[int, EntryManifest]]) -> None:
    for manifests in entries.values():
        for manifest in manifests.values():
            if codec is not None and manifest.statistics is not None and manifest.statistics.dim != codec.dim:
                raise DataError(
                    f"actions of {manifest.statistics.dim} dimensions, and the action codec has {codec.dim}: use data "
                    "with the same number, or another data.action.codec_path",
                    file=manifest.path,
                    field="actions",
                )
