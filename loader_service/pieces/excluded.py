"""`data.exclude`: samples that keep their places and lose their labels.

    # entry in the config       offset  sample  file, or the end of its path (it may have blanks)
    data.train_data_paths[0]    5310    7       demos.jsonl
    data.sources[1].paths[0]    0       *       part 2/rows.parquet

`*`: all samples of the record. `stoker-batch --worst-loss K --exclude-lines` writes such lines. A name says the same on every
host, wherever its data lies; `loader-serve` looks each one up in the manifests and rejects what is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from loader_service.manifest import EntryManifest
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.trouble import check_host

_MOST_BYTES = 64 << 20
_LINE = re.compile(r"(\S+)\s+([0-9]+)\s+([0-9]+|\*)\s+(\S.*)")
_ALL = -1


class Name(NamedTuple):
    """One line."""

    split: str
    entry: int
    offset: int
    sample: int
    """-1: all of the record."""
    shard: str
    line: int


@dataclass(frozen=True)
class Excluded:
    """The names of one file."""

    file: str
    names: tuple[Name, ...]

    @classmethod
    def read(cls, data: DataConfig) -> Self:
        """The file that data.exclude names; no names without one. Raises ConfigError that names the line."""
        if data.exclude is None:
            return cls("", ())
        path = Path(data.exclude).expanduser()
        try:
            with path.open("rb") as file:
                content = file.read(_MOST_BYTES + 1)
            text = content.decode()
        except (OSError, UnicodeDecodeError) as error:
            check_host(error, str(path))
            raise ConfigError(f"data.exclude: {path} cannot be read ({error}): name a text file, or null") from error
        if len(content) > _MOST_BYTES:
            raise ConfigError(
                f"data.exclude: {path} has more than {_MOST_BYTES >> 20} MiB: leave files out of the paths"
            )
        keys = {
            data.path_key(split, entry): (split, entry)
            for split in ("train", "val")
            for entry in range(len(data.paths(split)))
        }
        names = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                names.append(_parse(line.strip(), f"data.exclude: {path}, line {number}", number, keys))
        return cls(str(path), tuple(names))

    def to_json(self) -> dict[str, Any]:
        """For `from_json`, in another process."""
        return {"file": self.file, "names": [list(name) for name in self.names]}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        """The same names."""
        return cls(tree["file"], tuple(Name(*fields) for fields in tree["names"]))

    def fingerprint(self) -> str:
        """Of the names, whatever their order, wherever the data lies."""
        return fingerprint(sorted({name[:-1] for name in self.names}))

    def check(self, manifests: Iterable[EntryManifest]) -> None:
        """Raises ConfigError that names the line for a sample that is in none of these entries, which are all that are held."""
        for manifest in manifests:
            self.of(manifest)

    def of(self, manifest: EntryManifest) -> dict[int, frozenset[int]]:
        """Record of the entry -> its samples that are excluded. Raises ConfigError that names the line."""
        names = [name for name in self.names if (name.split, name.entry) == (manifest.split, manifest.entry)]
        if not names:
            return {}
        shards = {shard: self._shard(shard, manifest, line) for shard, line in {n.shard: n.line for n in names}.items()}
        wanted = np.flatnonzero(np.isin(manifest.offsets, np.array([name.offset for name in names], np.int64)))
        at = {(int(manifest.shard_index[i]), int(manifest.offsets[i])): int(i) for i in wanted}
        found: dict[int, set[int]] = {}
        for name in names:
            record = at.get((shards[name.shard], name.offset))
            if record is None:
                raise self._error(name.line, f"no record of {name.shard} begins at offset {name.offset}")
            count = int(manifest.num_samples[record])
            if name.sample >= count:
                raise self._error(name.line, f"the record has {count} samples, counted from 0, not {name.sample}")
            found.setdefault(record, set()).update(range(count) if name.sample == _ALL else [name.sample])
        return {record: frozenset(samples) for record, samples in found.items()}

    def _shard(self, name: str, manifest: EntryManifest, line: int) -> int:
        matching = [i for i, shard in enumerate(manifest.shards) if f"/{shard}".endswith(f"/{name}")]
        if len(matching) != 1:
            how = "no file" if not matching else f"{len(matching)} files"
            way_out = "write the end of its path, as stoker-batch does" if matching else "was it renamed?"
            raise self._error(line, f"{how} of the entry {manifest.path} is called {name}: {way_out}")
        return matching[0]

    def _error(self, line: int, reason: str) -> ConfigError:
        return ConfigError(f"data.exclude: {self.file}, line {line}: {reason}; correct the line, or delete it")


def _parse(text: str, where: str, number: int, keys: Mapping[str, tuple[str, int]]) -> Name:
    match = _LINE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{where}: {text[:200]!r}: ENTRY OFFSET SAMPLE FILE is expected, e.g. {next(iter(keys))} 5310 7 a.jsonl"
        )
    key, offset, sample, shard = match.groups()
    if key not in keys:
        raise ConfigError(f"{where}: there is no entry {key}: the config has {', '.join(list(keys)[:20])}")
    if max(len(offset), len(sample)) > 18:
        raise ConfigError(f"{where}: offset {offset}, sample {sample}: no data is that large")
    return Name(*keys[key], int(offset), _ALL if sample == "*" else int(sample), shard, number)


def exclude_line(data: DataConfig, manifest: EntryManifest, shard: str, offset: int, sample: int) -> str:
    """The line that takes a sample out. The shard's name is as much of its path as no other shard of the entry ends with."""
    parts = shard.split("/")
    names = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    name = next(name for name in names if _is_unique(name, manifest.shards))
    return f"{data.path_key(manifest.split, manifest.entry)} {offset} {sample} {name}"


def _is_unique(name: str, shards: Sequence[str]) -> bool:
    return sum(f"/{shard}".endswith(f"/{name}") for shard in shards) == 1
