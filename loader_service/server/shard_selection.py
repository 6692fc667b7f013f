"""`--shards`: which entries of the data paths a loader holds, and which shards of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loader_service.manifest import EntryManifest
from loader_service.plan.token_counts import has_token_counts
from loader_service.remote.url import is_url
from loader_service.shards import expand_entry
from loader_service.sources.base import BaseSFTDataset, make_datasets
from stoker_proto.config import Config, DataConfig
from stoker_proto.errors import ConfigError


def held_shards(config: Config, globs: list[str] | None) -> dict[str, dict[int, frozenset[str] | None]] | None:
    """What the globs name: entries as they stand in the config, or shards of entries that are here. None without globs:
    everything.

    Raises ConfigError where they match nothing, or a part of an entry behind a URL."""
    if globs is None:
        return None
    datasets = make_datasets(config.data)
    named = {_place(path) for split in ("train", "val") for path in config.data.paths(split)}.intersection(
        map(_place, globs)
    )
    wanted = {path for pattern in globs if _place(pattern) not in named for path in _expand(pattern, datasets)}
    held: dict[str, dict[int, frozenset[str] | None]] = {"train": {}, "val": {}}
    for split, entries in held.items():
        sources = config.data.entry_sources(split)
        views = [dataset.for_split(split) for dataset in datasets]
        for entry, path in enumerate(config.data.paths(split)):
            try:
                view = views[sources[entry]]
                shards = (view.locate if _place(path) in named else view.locate_here)(path).paths
            except ConfigError:
                if _place(path) in named:
                    raise
                continue  # it lies on another loader's disk
            found = frozenset(str(shard) for shard in shards if _place(path) in named or shard.resolve() in wanted)
            if found and is_url(path) and len(found) < len(shards):
                raise ConfigError(
                    f"--shards matches {len(found)} of the {len(shards)} shards of {path} "
                    f"({config.data.path_key(split, entry)}): of an entry behind a URL a loader fetches what it is asked for; "
                    "name the whole entry"
                )
            if found:
                entries[entry] = None if _place(path) in named or is_url(path) else found
    if not held["train"] and not held["val"]:
        raise ConfigError(f"--shards {' '.join(globs)} matches no shard of the data paths")
    return held


def check_parts(entries: Mapping[str, Mapping[int, EntryManifest]], data: DataConfig) -> None:
    """Raises ConfigError for parts of entries that cannot be served."""
    for split, manifests in entries.items():
        for entry, manifest in manifests.items():
            if manifest.held is not None:
                _check_part(manifest, data, f"{data.path_key(split, entry)} ({manifest.path})")


def _check_part(manifest: EntryManifest, data: DataConfig, name: str) -> None:
    if data.packing and has_token_counts(manifest):
        raise ConfigError(
            f"--shards matches a part of {name}, and with data.packing a row is made of texts from any of its shards: name the "
            "whole entry, list the parts as entries of their own, or set data.packing to false"
        )
    if data.weigh_by == "tokens" and not manifest.num_tokens.any():
        raise ConfigError(
            f"--shards matches a part of {name}, and with data.weigh_by: tokens all loaders estimate its tokens by its first "
            "record, which others may not hold: name the whole entry, or use data.weigh_by: samples"
        )


def _place(path: str) -> str:
    """Normal form of an entry or a glob: equal for the same place."""
    return path.rstrip("/") if is_url(path) else str(Path(path).expanduser().resolve())


def _expand(pattern: str, datasets: Sequence[BaseSFTDataset]) -> Sequence[Path]:
    patterns = list(dict.fromkeys(["*", *(one for dataset in datasets for one in dataset.shard_patterns)]))
    store = next((dataset.remote for dataset in datasets if dataset.remote is not None), None)
    if store is not None and is_url(pattern):
        from loader_service.remote.listing import locate_remote

        return locate_remote(pattern, patterns, store).paths
    return expand_entry(pattern, patterns)
