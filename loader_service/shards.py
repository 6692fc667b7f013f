"""An entry of `data.train_data_paths` -> its shards, in an order that depends on their names alone.

demos/              ->  every file in it that matches the dataset's patterns
demos/train.jsonl   ->  that file
demos/**/*.jsonl    ->  what the glob finds; names are relative to `demos`, the part without wildcards
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from loader_service.paths import hub_blobs
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.host.trouble import check_host

CACHE_FOLDER = ".stoker"


class Stamp(NamedTuple):
    """What the file system says of a file. While it is the same, the content is the same."""

    size: int
    """Bytes."""
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, shard: Path) -> Stamp:
        """The shard's stamp now. Raises DataError, HostError."""
        try:
            status = shard.stat()
        except OSError as error:
            check_host(error, str(shard))
            raise DataError(f"the shard cannot be read ({error.strerror})", file=str(shard)) from error
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class EntryShards:
    """The shards of one entry of the data paths."""

    base: Path
    """Folder that the names are relative to."""
    pattern: str
    """What the config names, relative to `base`; empty for the folder itself."""
    names: tuple[str, ...]
    """Relative to `base`, with `/`, in natural order. A name identifies a shard on every host."""
    paths: tuple[Path, ...]
    """The same shards, absolute and without links (in a Hugging Face cache's snapshot: without those of folders)."""
    identity: str = ""
    """Fingerprint of an index beside the shards that decides what a scan finds (LeRobot's `meta/`); empty without one."""
    versions: tuple[tuple[int, int], ...] = ()
    """Remote shards: size in bytes, and a number that changes with the content, as the host of the files reports them. `paths`
    are then the places of the local copies (`BaseSFTDataset.local` fetches them). Empty for local files."""
    broken: tuple[Path, ...] = ()
    """Links in the entry's folders that would be shards, and whose targets are not here."""


def expand_entry(path: str, patterns: Sequence[str]) -> list[Path]:
    """The entry's shards as absolute paths in natural order. patterns: which files of a folder are shards. Raises ConfigError."""
    return list(locate_entry(path, patterns).paths)


def locate_entry(path: str, patterns: Sequence[str]) -> EntryShards:
    """The entry's shards with their names. Raises ConfigError if there are none."""
    named = Path(path).expanduser()
    pattern, broken = "", list[Path]()
    if named.is_file():
        base, pattern, found = named.parent, named.name, [named]
    elif named.is_dir():
        base, found = named, list(_in_folder(named, patterns, broken))
    else:
        base = folder_without_wildcards(named)
        pattern = named.relative_to(base).as_posix()
        _refuse_unreadable(base, pattern)
        found = []
        for match in map(Path, glob.glob(str(named), recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute pattern
            found.extend(_in_folder(match, patterns, broken) if match.is_dir() else [match])
    shards: dict[Path, tuple[str, Path]] = {}
    for file in sorted(set(found), key=lambda file: natural_key(file.relative_to(base).as_posix())):
        real = file.resolve()
        shards.setdefault(
            real, (file.relative_to(base).as_posix(), _place(file, real))
        )  # two names of a file: one shard
    if not shards:
        raise ConfigError(
            f"{path!r} names no shard: it is no file, no folder with {' or '.join(patterns)} in it, and no glob that "
            f"matches (working folder: {Path.cwd()})"
        )
    names, paths = zip(*shards.values(), strict=True)
    return EntryShards(base.resolve(), pattern, names, paths, broken=tuple(sorted(set(broken))))


def _refuse_unreadable(base: Path, pattern: str) -> None:
    """Raises ConfigError for a folder that the pattern reaches and that cannot be listed: its shards would be missing in silence.

    Python's glob passes over such folders. Hidden ones and `lost+found` are no data."""

    def refuse(error: OSError) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return
        check_host(error, str(error.filename))
        raise ConfigError(
            f"{error.filename}: this folder cannot be listed ({error.strerror}), and {pattern!r} below {base} may name shards in "
            "it: make it readable for the user of this process, or write a glob that does not reach it"
        ) from error

    parts = Path(pattern).parts
    deepest = None if "**" in parts else len(parts) - 1  # folders below `base` that the glob looks into
    seen = {os.path.realpath(base)}  # a link may lead back up
    for folder, folders, _ in os.walk(base, onerror=refuse, followlinks=True):
        depth = len(Path(folder).relative_to(base).parts)
        inner = [name for name in folders if not name.startswith(".") and name != "lost+found"]
        if deepest is not None:
            folders[:] = [name for name in inner if depth < deepest and fnmatchcase(name, parts[depth])]
            continue
        places = {os.path.realpath(os.path.join(folder, name)): name for name in inner}  # noqa: PTH118 - many folders
        folders[:] = [name for place, name in places.items() if place not in seen]
        seen.update(places)


def _place(file: Path, real: Path) -> Path:
    """The file without links. In a snapshot of a download cache the last link stays: what the shard names lies beside it."""
    folder = file.parent.resolve()
    blobs = hub_blobs(str(folder))
    return folder / file.name if blobs and real.is_relative_to(blobs) else real


def natural_key(name: str) -> tuple[list[tuple[str, int]], str]:
    """Sorts `part-2` before `part-10`.

    >>> sorted(["part-10", "part-2", "a"], key=natural_key)
    ['a', 'part-2', 'part-10']
    """
    pieces = re.findall(r"([^0-9]*)([0-9]*)", name)
    return [(text, int(digits) if digits else -1) for text, digits in pieces], name


def _in_folder(folder: Path, patterns: Iterable[str], broken: list[Path]) -> Iterable[Path]:
    """The files that match. Links to nothing are added to `broken`. Raises ConfigError for a folder that cannot be listed."""
    for pattern in patterns:
        _refuse_unreadable(folder, pattern)
        for file in folder.glob(pattern):
            if any(part.startswith(".") for part in file.relative_to(folder).parts):
                continue
            if file.is_file():
                yield file
            elif is_broken_link(file):
                broken.append(file)


def is_broken_link(path: Path) -> bool:
    """Whether it is a link whose target is not here."""
    return path.is_symlink() and not path.exists()


def refuse_broken(shards: EntryShards) -> None:
    """Call it where the entry must be here as a whole. Raises ConfigError: what a link stands for would be missing in silence."""
    if shards.broken:
        link = shards.broken[0]
        raise ConfigError(
            f"{link} is a link to {link.readlink()}, which is not here ({len(shards.broken)} such links in the entry): mount or "
            "copy what it points to, or remove the link"
        )


def folder_without_wildcards(path: Path) -> Path:
    """The part of a glob that names a folder."""
    parts = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts) if parts else Path()
