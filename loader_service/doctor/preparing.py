"""The scan: manifests of all entries and the codec, by loader-prepare's own code; where that fails, entry by entry.

1. As the config says. 2. If data is bad: with policy `skip`, so that every bad record is found at once. 3. If that fails too:
each entry by itself, so that one unreadable entry hides no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from loader_service.doctor.facts import EntryFacts, Examined
from loader_service.doctor.finding import Finding, is_lfs_pointer, of_error
from loader_service.prepare.run import SPLITS, Prepared, ScanOptions, prepare
from loader_service.sources.base import BaseSFTDataset, make_datasets
from stoker_proto.config import Config, DataConfig
from stoker_proto.errors import ConfigError, HostError, StokerError
from stoker_proto.model_folder import ModelFolder
from stoker_proto.processor import Processor
from stoker_proto.text.tokenizer import TextTokenizer

_SAMPLED_SHARDS = 64
"""Shards of an entry whose first bytes are looked at."""
_NO_BUDGET = 2**62


def examine_config(config: Config, *, progress: bool) -> Examined:
    """Entries with their manifests, codec and processor, as far as they can be made; `findings` says what cannot.

    Raises HostError where this host cannot read now.
    """
    examined = Examined(config=config)
    try:
        datasets = make_datasets(config.data)
    except ConfigError as error:
        examined.findings.append(of_error(error, "config"))
        return examined
    examined.entries = list(_entries(config.data, datasets, examined.findings))
    states = None
    if examined.entries:
        prepared = _prepared(config, examined, ScanOptions(progress=progress))
        if prepared is not None:
            examined.codec, states = prepared.codec, prepared.states
    try:
        folder = ModelFolder(config.model.base_model_path)
        examined.processor = Processor.build(config, examined.codec, states)
        examined.special_tokens = tuple(filter(None, TextTokenizer.from_folder(folder).control_tokens()))
        examined.stop_ids = frozenset({examined.processor.end_id, *_stop_ids(folder)})
    except ConfigError as error:
        examined.findings.append(of_error(error, "model"))
    return examined


def _entries(data: DataConfig, datasets: tuple[BaseSFTDataset, ...], findings: list[Finding]) -> Iterator[EntryFacts]:
    """The entries that are found; a finding for each other one."""
    for split in SPLITS:
        for number, (path, source) in enumerate(zip(data.paths(split), data.entry_sources(split), strict=True)):
            key, dataset = data.path_key(split, number), datasets[source]
            try:
                shards = dataset.for_split(split).locate(path)
            except HostError:
                raise
            except StokerError as error:
                findings.append(of_error(error, "entries", key))
                continue
            if not shards.versions:
                step = max(1, len(shards.paths) // _SAMPLED_SHARDS)
                pointers = [shard for shard in shards.paths[::step] if is_lfs_pointer(shard)]
                if pointers:
                    problem = (
                        f"{len(pointers)} of {len(shards.paths[::step])} shards are Git LFS pointers, not the data"
                    )
                    fetch = "fetch the files with `git lfs pull`"
                    findings.append(Finding("error", "lfs_pointers", str(pointers[0]), key, problem, fetch))
                    continue
            yield EntryFacts(
                split=split, entry=number, key=key, path=path, source=source, dataset=dataset, manifest=None
            )


def _prepared(config: Config, examined: Examined, scan: ScanOptions) -> Prepared | None:
    """What the scan found, with the manifests given to the entries. None where only single entries could be scanned."""
    data, findings = config.data, examined.findings
    complete = len(examined.entries) == sum(len(data.paths(split)) for split in SPLITS)
    tolerant = replace(data, on_bad_sample="skip", bad_sample_budget=_NO_BUDGET)
    if complete:
        try:
            return _with_manifests(prepare(config, scan=scan), examined)
        except HostError:
            raise
        except StokerError as error:
            findings.append(of_error(error, "scan"))
        if data.on_bad_sample == "fail":
            try:
                return _with_manifests(prepare(replace(config, data=tolerant), scan=scan), examined)
            except HostError:
                raise
            except StokerError as error:
                findings.append(of_error(error, "scan"))
    for entry in examined.entries:
        _scan_alone(entry, replace(config, data=tolerant), findings, scan)
    if any(entry.manifest is not None and entry.manifest.statistics is not None for entry in examined.entries):
        problem = "not every entry can be scanned, so no codec is fitted and its round trip is not checked"
        findings.append(Finding("note", "scan", "", "", problem, "mend the errors first, then run it again"))
    return None


def _with_manifests(prepared: Prepared, examined: Examined) -> Prepared:
    for entry in examined.entries:
        entry.manifest = prepared.entries[entry.split][entry.entry]
        _report_bad(entry, examined.findings)
    return prepared


def _scan_alone(entry: EntryFacts, config: Config, findings: list[Finding], scan: ScanOptions) -> None:
    data = config.data.of_source(entry.source)
    is_train = entry.split == "train"
    # The other split's paths decide which episodes an entry may have (`for_split`), so of val only its own side is narrowed.
    paths = {"train_data_paths": (entry.path,), "val_data_paths": ()} if is_train else {"val_data_paths": (entry.path,)}
    try:
        alone = prepare(replace(config, data=replace(data, **paths)), splits=(entry.split,), scan=scan)
    except HostError:
        raise
    except StokerError as error:
        findings.append(of_error(error, "scan", entry.key))
        return
    entry.manifest = alone.entries[entry.split][0]
    _report_bad(entry, findings)


def _report_bad(entry: EntryFacts, findings: list[Finding]) -> None:
    """The bad records that the scan found under policy `skip`."""
    manifest = entry.manifest
    assert manifest is not None
    findings.extend(Finding("error", "scan", "", "", reason, "") for reason in manifest.errors)
    if manifest.num_bad > len(manifest.errors):
        problem = f"{manifest.num_bad:,} bad records in all; the first {len(manifest.errors)} are named"
        findings.append(Finding("error", "scan", entry.path, "", problem, "mend them, or leave them out"))
    for note, count in manifest.notes.items():
        findings.append(Finding("note", "scan", entry.path, "", f"{count:,} records: {note}", ""))


def _stop_ids(folder: ModelFolder) -> Iterator[int]:
    """`eos_token_id` of the model's generation_config.json. Raises ConfigError for a file that is no JSON."""
    found = folder.json("generation_config.json", optional=True).get("eos_token_id")
    yield from (number for number in (found if isinstance(found, list) else [found]) if type(number) is int)
