"""Folders of the datasets library -> their Arrow files.

chats/                        `Dataset.save_to_disk("chats")`
  data-00000-of-00002.arrow
  data-00001-of-00002.arrow
  dataset_info.json           features and size
  state.json                  {"_data_files": [{"filename": "data-00000-of-00002.arrow"}, ...], ...}
chats/train/ chats/test/      `DatasetDict.save_to_disk("chats")`, with chats/dataset_dict.json: one folder per split

LLaMA-Factory also keeps a dataset_info.json beside its data. No file of this name is data.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from loader_service.shards import EntryShards
from loader_service.sources.tables.table import ARROW_SUFFIX
from stoker_proto.errors import ConfigError
from stoker_proto.host.trouble import check_host

_INFO, _STATE, _DICT = "dataset_info.json", "state.json", "dataset_dict.json"
DESCRIPTIONS = (_INFO, _STATE, _DICT)
"""Files that describe the data beside them."""


def check_not_splits(folder: Path) -> None:
    """Raises ConfigError for a folder of splits, each of which is a data set."""
    described = folder / _DICT
    if not described.is_file():
        return
    splits = _read(described).get("splits")
    names = ", ".join(str(folder / str(name)) for name in splits) if isinstance(splits, list) else "its folders"
    raise ConfigError(f"{folder} holds splits (dataset_dict.json): name the one that is meant, of {names}")


def only_data(shards: EntryShards) -> EntryShards:
    """The entry without files that describe data, and with just those Arrow files that a saved data set consists of.

    Raises ConfigError, also where nothing else is there."""
    folders = {path.parent for path in shards.paths if path.suffix.lower() == ARROW_SUFFIX}
    meant = {folder: _data_files(folder) for folder in folders}
    named = set(shards.paths)
    for folder, files in meant.items():
        missing = [file.name for file in files or () if not file.exists() and file not in named]
        if missing:
            raise ConfigError(f"{folder / _STATE} names {missing[0]}, and there is no such file: copy the folder again")
    kept = [
        number
        for number, path in enumerate(shards.paths)
        if path.name not in (_INFO, _DICT) and not (path.parent in folders and _is_beside(path, meant[path.parent]))
    ]
    if not kept:
        first = shards.base / shards.names[0]
        found = sorted(path.name for path in first.parent.iterdir() if path.is_dir()) if first.parent.is_dir() else []
        inner = [name for name in found if not name.startswith(".")][:8]
        below = f"; it has the folders {', '.join(inner)}" if inner else ""
        raise ConfigError(
            f"{first} describes a data set and holds no row of it: name the files of the data, or their folder{below}"
        )
    return replace(
        shards,
        names=tuple(shards.names[i] for i in kept),
        paths=tuple(shards.paths[i] for i in kept),
        versions=tuple(shards.versions[i] for i in kept) if shards.versions else (),
    )


def _is_beside(path: Path, meant: tuple[Path, ...] | None) -> bool:
    if path.name in DESCRIPTIONS:
        return True
    if path.suffix.lower() != ARROW_SUFFIX:
        return False
    # Results of map and filter, which datasets keeps beside the data.
    return path.name.startswith(("cache-", "indices-")) if meant is None else path not in meant


def _data_files(folder: Path) -> tuple[Path, ...] | None:
    """What `state.json` names; None where there is none (the cache of datasets, remote data)."""
    state = folder / _STATE
    if not state.is_file():
        return None
    tree = _read(state)
    if tree.get("_indices_data_files") or tree.get("_indices_files"):
        raise ConfigError(f"{state}: it selects rows by indices: save it again with flatten_indices()")
    files = tree.get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) and "filename" in file for file in files):
        return None  # another program's file of this name
    return tuple((folder / Path(str(file["filename"])).name).resolve() for file in files)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        check_host(error, str(path))
        raise ConfigError(f"{path} cannot be read ({error}): copy the folder again") from error
    return tree if isinstance(tree, dict) else {}
