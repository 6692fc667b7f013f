"""Data sets behind URLs: `meta/` is brought here whole, data files are shards, videos come when an episode is read.

s3://robots/bridge           a data set
s3://robots                  a folder of data sets
https://host/bridge          a data set; HTTP has no folders, so its files are found by the names that meta/ gives them
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from loader_service.remote.filesystem import FileInfo
from loader_service.remote.listing import located
from loader_service.remote.store import RemoteStore
from loader_service.remote.url import Place, parse_url
from loader_service.shards import EntryShards, natural_key
from loader_service.sources.lerobot.info import INFO_PATH, load_info
from loader_service.sources.lerobot.locate import refuse_unread
from loader_service.sources.lerobot.meta import Meta, Wanted, load_meta, selected
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.hashing import fingerprint

_V2_EPISODES, _V2_TASKS = "meta/episodes.jsonl", "meta/tasks.jsonl"
_V3_TASKS, _V3_EPISODES = "meta/tasks.parquet", "meta/episodes"
_THREADS = 16


def locate_remote(url: str, wanted: Wanted, store: RemoteStore) -> tuple[EntryShards, dict[Path, Meta]]:
    """As `locate.locate`. Raises ConfigError, DataError, FetchError."""
    place = parse_url(url)
    base, pattern, keys = _roots(place, store)
    metas: dict[Path, Meta] = {}
    infos: dict[str, FileInfo] = {}
    identity = []
    for key in keys:
        root = store.folder / store.key_of(place, key)
        meta = metas[root] = remote_meta(root, store, wanted, is_new=True)
        chosen = selected(meta, wanted.options.episodes)
        begin = {
            name: int(rows[np.flatnonzero(chosen[rows])[0]])
            for name, rows in meta.rows_of.items()
            if chosen[rows].any()
        }
        prefix = key[len(base) + 1 if base else 0 :]
        found = _infos(place, key, list(begin), store)
        for name, row in begin.items():
            if name not in found:
                episode = str(int(meta.episodes.index[row]))
                raise DataError(
                    "meta/ names it, and it is missing: fetch it",
                    file=_at(place, f"{key}/{name}").url(),
                    record=episode,
                )
            infos[f"{prefix}/{name}" if prefix else name] = found[name]
        identity.append([prefix or ".", meta.fingerprint])
    names = sorted(infos, key=natural_key)
    shards = located(place, base, pattern, {name: infos[name] for name in names}, store)
    return replace(shards, identity=fingerprint(identity)), metas


def remote_meta(root: Path, store: RemoteStore, wanted: Wanted, *, is_new: bool = False) -> Meta:
    """The index of the data set in the folder of copies.

    is_new: take it as it is now, and remember its version; else it must be of the version that is remembered.
    """
    with store.pins.reading():
        _bring(root, [INFO_PATH], store, is_new)
        info = load_info(root)
        if not info.is_v3:
            _bring(root, [_V2_EPISODES, *([_V2_TASKS] if wanted.tasks else [])], store, is_new)
        else:
            names = _episode_files(root, store)
            for left in (root / _V3_EPISODES).glob("*/*.parquet"):
                if left.relative_to(root).as_posix() not in names:  # of a version before
                    left.unlink(missing_ok=True)
            _bring(root, [*([_V3_TASKS] if wanted.tasks else []), *names], store, is_new)
        return load_meta(root, wanted)


def _roots(place: Place, store: RemoteStore) -> tuple[str, str, list[str]]:
    """(base, pattern relative to it, keys of the data sets, in order)."""
    files, base = store.files(place), place.folder_key
    pattern = place.key[len(base) + 1 if base else 0 :] if place.has_wildcards else ""
    folders = place.key if pattern else f"{place.key}/*"
    if not pattern:
        try:
            files.info(_at(place, f"{place.key}/{INFO_PATH}"))
            return place.key, "", [place.key]
        except FileNotFoundError:
            pass
    found = files.glob(place, f"{folders}/{INFO_PATH}") if pattern or place.has_listing else {}
    keys = [key.removesuffix(f"/{INFO_PATH}") for key, info in found.items() if not info.is_folder]
    if place.has_listing:
        _refuse_unread(place, folders, keys, store)
    if not keys:
        raise ConfigError(
            f"{place.url()!r} names no LeRobot data set: no {INFO_PATH} in it, nor in a folder that it matches"
        )
    return base, pattern, sorted(keys, key=natural_key)


def _refuse_unread(place: Place, folders: str, keys: list[str], store: RemoteStore) -> None:
    """As `locate` does with folders of this host. folders: the keys that the entry matches."""
    files, known = store.files(place), set(keys)
    for key, info in sorted(files.glob(place, folders).items()):
        is_inside = any(key.startswith(f"{root}/") for root in known)
        if not info.is_folder or key in known or is_inside or key.rpartition("/")[2].startswith("."):
            continue
        inside = [inner.rpartition("/")[2] for inner, found in files.glob(place, f"{key}/*").items() if found.is_folder]
        sets = [inner.removesuffix(f"/{INFO_PATH}") for inner in files.glob(place, f"{key}/*/{INFO_PATH}")]
        refuse_unread(_at(place, key).url(), inside, [_at(place, root).url() for root in sorted({*sets} - known)])


def _bring(root: Path, names: list[str], store: RemoteStore, is_new: bool) -> None:
    place = store.place_of(root / names[0])
    key = place.key.removesuffix(f"/{names[0]}")
    if is_new:
        found = _infos(place, key, names, store)
        store.known_shards([(_at(place, f"{key}/{name}"), info) for name, info in found.items()])
    for name in names:
        store.local(str(root / name))


def _episode_files(root: Path, store: RemoteStore) -> list[str]:
    """The parquets of the table of episodes: chunk-000/file-000, file-001, ..., chunk-001/file-000, ..."""
    place = store.place_of(root / _V3_EPISODES)
    files = store.files(place)
    if place.has_listing:
        start = len(place.key) - len(_V3_EPISODES)
        return sorted(key[start:] for key in files.glob(place, f"{place.key}/*/*.parquet"))
    names: list[str] = []
    chunk = number = 0
    while True:
        name = f"chunk-{chunk:03d}/file-{number:03d}.parquet"
        try:
            files.info(_at(place, f"{place.key}/{name}"))
        except FileNotFoundError:
            if number == 0:
                return names
            chunk, number = chunk + 1, 0
            continue
        names.append(f"{_V3_EPISODES}/{name}")
        number += 1


def _infos(place: Place, root: str, names: list[str], store: RemoteStore) -> dict[str, FileInfo]:
    """What the names, relative to the root, are; those that are not there are left out."""
    files = store.files(place)
    if place.has_listing and len(names) > _THREADS:
        folders = {name.rpartition("/")[0] for name in names}
        found = {
            key[len(root) + 1 :]: info
            for folder in sorted(folders)
            for key, info in files.glob(place, f"{root}/{folder}/*").items()
            if not info.is_folder
        }
        return {name: found[name] for name in names if name in found}

    def info(name: str) -> FileInfo | None:
        try:
            return files.info(_at(place, f"{root}/{name}"))
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return {name: found for name, found in zip(names, pool.map(info, names), strict=True) if found is not None}


def _at(place: Place, key: str) -> Place:
    return Place(place.protocol, place.host, key)
