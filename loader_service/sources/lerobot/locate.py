"""An entry of the data paths -> its data sets, and their data files as shards.

bridge/           a LeRobot data set: it has meta/info.json
robots/           a folder of LeRobot data sets
robots/*-left     what the glob finds
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from loader_service.remote.url import is_url, parse_url
from loader_service.shards import EntryShards, folder_without_wildcards, is_broken_link, natural_key
from loader_service.sources.lerobot.info import INFO_PATH
from loader_service.sources.lerobot.meta import Meta, Wanted, load_meta, selected
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.trouble import check_host

_PARTS = ("data", "meta", "videos")
"""Folders of a data set."""


def locate(path: str, wanted: Wanted, *, may_lack: bool = False) -> tuple[EntryShards, dict[Path, Meta]]:
    """The data files in which the chosen episodes begin, and the index of each data set. Raises ConfigError, DataError.

    may_lack: leave out data files that are not here; some must be.
    """
    named = Path(path).expanduser()
    base, pattern, roots = _roots(named)
    metas: dict[Path, Meta] = {}
    shards: dict[str, Path] = {}
    for root in roots:
        real = root.resolve()
        meta = metas[real] = load_meta(real, wanted)
        prefix = root.relative_to(base).as_posix() + "/" if root != base else ""
        chosen = selected(meta, wanted.options.episodes)
        for name, rows in meta.rows_of.items():
            if not chosen[rows].any():
                continue
            # Not resolved further: in a download cache the files are links, and the folder of the links names the data set.
            file = real / name
            if not file.is_file():
                if may_lack:
                    continue
                first = int(meta.episodes.index[rows[np.flatnonzero(chosen[rows])[0]]])
                raise DataError("meta/ names it, and it is missing: fetch it", file=str(file), record=str(first))
            shards[prefix + name] = file
    if may_lack and not shards:
        raise ConfigError(f"{path!r}: none of the data files that meta/ names is here")
    names = sorted(shards, key=natural_key)
    identity = fingerprint([[root.relative_to(base).as_posix(), metas[root.resolve()].fingerprint] for root in roots])
    found = EntryShards(
        base.resolve(),
        pattern,
        tuple(names),
        tuple(shards[name] for name in names),
        identity,
        broken=() if named in roots else _broken_links(named),
    )
    return found, metas


def named_sets(path: str) -> set[str]:
    """The data sets that an entry names, however it is spelled; the entry's own place where none is here, or behind a URL."""
    if is_url(path):
        return {parse_url(path).url()}
    named = Path(path).expanduser()
    try:
        return {str(root.resolve()) for root in _roots(named)[2]}
    except (
        ConfigError,
        OSError,
    ) as error:  # another loader's: `locate` says what is wrong with one that should be here
        check_host(error, path)
        return {str(named.resolve())}


def _roots(named: Path) -> tuple[Path, str, list[Path]]:
    """(base, pattern relative to it, folders of data sets, in order)."""
    if named.is_dir():
        base, pattern = named, ""
        found = [named] if _is_data_set(named) else list(named.iterdir())
    else:
        base = folder_without_wildcards(named)
        pattern = named.relative_to(base).as_posix()
        matches = glob.glob(str(named), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = list(map(Path, matches))
    roots = [folder for folder in found if _is_data_set(folder)]
    _refuse_unread(found, roots)
    if not roots:
        raise ConfigError(
            f"{str(named)!r} names no LeRobot data set: no {INFO_PATH} in it, nor in a folder that it matches (working folder: "
            f"{Path.cwd()})"
        )
    return base, pattern, sorted(roots, key=lambda root: natural_key(root.relative_to(base).as_posix()))


def _broken_links(named: Path) -> tuple[Path, ...]:
    """Links to folders that are not here, among those that the entry names: each may be a data set."""
    matches = named.iterdir() if named.is_dir() else map(Path, glob.glob(str(named), recursive=True))  # noqa: PTH207
    return tuple(sorted(match for match in matches if not match.name.startswith(".") and is_broken_link(match)))


def _refuse_unread(found: Sequence[Path], roots: Sequence[Path]) -> None:
    """Raises ConfigError for a folder that seems to be a data set, or to hold some, and would be left out in silence."""
    known = set(roots)
    for folder in sorted(found):
        if (
            folder in known
            or folder.name.startswith(".")
            or not folder.is_dir()
            or not known.isdisjoint(folder.parents)
        ):
            continue
        inner = sorted(folder.iterdir())
        refuse_unread(
            str(folder),
            [child.name for child in inner if child.is_dir()],
            [str(child) for child in inner if child not in known and _is_data_set(child)],
        )


def refuse_unread(folder: str, inside: Iterable[str], sets: Sequence[str]) -> None:
    """Raises ConfigError unless a folder without `meta/info.json` can be left out.

    inside: names of the folders in it; sets: data sets in it that the entry does not reach.
    """
    parts = [f"{part}/" for part in _PARTS if part in inside]
    if parts:
        raise ConfigError(
            f"{folder!r} has {' and '.join(parts)}, and no {INFO_PATH}: fetch the rest of this data set, or move it elsewhere"
        )
    if sets:
        raise ConfigError(
            f"{sets[0]!r} is a LeRobot data set that the entry does not reach: name {folder + '/*'!r} as well, or move "
            f"{folder!r} elsewhere"
        )


def _is_data_set(folder: Path) -> bool:
    return (folder / INFO_PATH).is_file()
