"""An entry of the data paths that is a URL -> its shards, by the rules of `loader_service.shards`.

s3://robots/bridge/           every file in it that matches the dataset's patterns
s3://robots/*/train.jsonl     what the glob finds; names are relative to the folder before the first wildcard
https://host/train.jsonl      that file; HTTP has no folders
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from loader_service.remote.filesystem import FileInfo
from loader_service.remote.store import RemoteStore
from loader_service.remote.url import Place, check_name, parse_url
from loader_service.shards import EntryShards, natural_key
from stoker_proto.errors import ConfigError


def locate_remote(url: str, patterns: Sequence[str], store: RemoteStore) -> EntryShards:
    """The entry's shards. Only names, sizes and versions are fetched. Raises ConfigError, FetchError."""
    place = parse_url(url)
    try:
        base, pattern, found = _find(place, patterns, store)
    except FileNotFoundError:
        base, pattern, found = "", "", {}
    if not found:
        raise ConfigError(
            f"{url!r} names no shard: it is no file, no folder with {' or '.join(patterns)} in it, and no glob that matches"
        )
    start = len(base) + 1 if base else 0
    names = sorted((key[start:] for key in found), key=natural_key)
    for name in names:
        reason = check_name(name)
        if reason is not None:
            raise ConfigError(f"{url!r} holds {name!r}: {reason}; rename it, or name the other files")
    return located(place, base, pattern, {name: found[base + "/" + name if base else name] for name in names}, store)


def located(place: Place, base: str, pattern: str, infos: dict[str, FileInfo], store: RemoteStore) -> EntryShards:
    """Shards below the key `base`, by their names relative to it, in their order."""
    places = [Place(place.protocol, place.host, f"{base}/{name}" if base else name) for name in infos]
    store.known_shards(list(zip(places, infos.values(), strict=True)))
    folder = store.folder / store.key_of(place, base)
    return EntryShards(
        folder,
        pattern,
        tuple(infos),
        tuple(folder / name for name in infos),
        versions=tuple((info.size, _number(info.version)) for info in infos.values()),
    )


def _find(place: Place, patterns: Sequence[str], store: RemoteStore) -> tuple[str, str, dict[str, FileInfo]]:
    """(base, pattern, key -> information of the file)."""
    files = store.files(place)
    if place.has_wildcards:
        base = place.folder_key
        found: dict[str, FileInfo] = {}
        for key, info in _visible(base, files.glob(place, place.key)).items():
            found |= _in_folder(place, key, patterns, store) if info.is_folder else {key: info}
        return base, place.key[len(base) + 1 if base else 0 :], found
    info = files.info(place)
    if info.is_folder:
        return place.key, "", _in_folder(place, place.key, patterns, store)
    base, _, name = place.key.rpartition("/")
    return base, name, {place.key: info}


def _in_folder(place: Place, folder: str, patterns: Iterable[str], store: RemoteStore) -> dict[str, FileInfo]:
    found: dict[str, FileInfo] = {}
    for pattern in patterns:
        matches = store.files(place).glob(place, f"{folder}/{pattern}" if folder else pattern)
        found |= {key: info for key, info in _visible(folder, matches).items() if not info.is_folder}
    return found


def _visible(folder: str, infos: dict[str, FileInfo]) -> dict[str, FileInfo]:
    start = len(folder) + 1 if folder else 0
    return {
        key: info for key, info in infos.items() if not any(part.startswith(".") for part in key[start:].split("/"))
    }


def _number(version: str) -> int:
    """The version as an integer of 63 bits, for a stamp."""
    return int.from_bytes(hashlib.blake2b(version.encode(), digest_size=8).digest()) >> 1
