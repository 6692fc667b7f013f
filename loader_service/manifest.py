"""The manifest: what `loader-prepare` found in one entry of the data paths. Seven columns over its records, and a fingerprint.

    record   shard_index   offset   size   num_samples   num_tokens          files          file_times
    0        0             0        5310   26            0 (not counted)     75312...214    1757...000
    1        0             5311     4102   20            0                   0 (no file)    0

The columns are .npy files. All processes of a host map them and share their pages: 24 bytes per record, and 16 more where records
name files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from stoker_proto.actions.statistics import ActionStatistics
from stoker_proto.errors import DataError, ManifestError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.trouble import check_host

FORMAT_VERSION = 4
"""Version of everything in the cache folder; another version means a new scan."""
COLUMNS: dict[str, type[np.generic]] = {
    "shard_index": np.uint32,
    "offsets": np.int64,
    "sizes": np.uint32,
    "num_samples": np.uint32,
    "num_tokens": np.uint32,
    "files": np.int64,
    "file_times": np.int64,
}
_as_path = lru_cache(maxsize=4096)(Path)  # making one, and its hash, costs more than reading a row
ROW_STARTS, ROW_TOKENS = "row_starts", "row_tokens"
"""Two more columns, where a chat template divides dialogues: int64[R], where a record's samples begin in uint32[S], the tokens of
each sample."""
ACTIONS_FILE, STATES_FILE = "actions.npz", "states.npz"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedEntry:
    """An entry as a config names it and this host finds it. The fields are those of `EntryManifest`."""

    split: str
    entry: int
    path: str
    shards: tuple[str, ...]
    fingerprint: str
    stamps: tuple[tuple[int, int], ...] = ()
    held: frozenset[int] | None = None
    beside: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """`manifest.json` beside the columns. The fields without a comment are those of `EntryManifest`."""

    content: str
    files: str
    """`EntryManifest.files_fingerprint`."""
    num_shards: int
    num_records: int
    total_samples: int
    is_divided: bool
    """Whether there are the columns `row_starts` and `row_tokens`."""
    num_bad: int
    num_bad_samples: int
    errors: Sequence[str]
    notes: Mapping[str, int]
    statistics: ActionStatistics | None
    states: ActionStatistics | None

    def write(self, folder: Path) -> None:
        """Write it, after the columns and arrays of the folder."""
        tree = {
            "version": FORMAT_VERSION,
            "content": self.content,
            "files": self.files,
            "num_shards": self.num_shards,
            "num_records": self.num_records,
            "total_samples": self.total_samples,
            "is_divided": self.is_divided,
            "num_bad": self.num_bad,
            "num_bad_samples": self.num_bad_samples,
            "errors": self.errors,
            "notes": self.notes,
            "actions_bytes": _size(folder / ACTIONS_FILE),
            "statistics": None if self.statistics is None else self.statistics.to_json(),
            "states_bytes": _size(folder / STATES_FILE),
            "states": None if self.states is None else self.states.to_json(),
        }
        (folder / "manifest.json").write_bytes(orjson.dumps(tree, option=orjson.OPT_INDENT_2))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises ManifestError for a damaged folder or another version."""
        tree = _read_tree(folder / "manifest.json")
        try:
            statistics, states = (
                None if tree[name] is None else ActionStatistics.from_json(tree[name])
                for name in ("statistics", "states")
            )
        except (DataError, TypeError, ValueError, AttributeError) as error:
            raise ManifestError(
                f"damaged statistics ({error}); run loader-prepare again", file=str(folder / "manifest.json")
            ) from error
        for kept, file, size in ((statistics, ACTIONS_FILE, "actions_bytes"), (states, STATES_FILE, "states_bytes")):
            if kept is not None and _size(folder / file) != tree[size]:
                raise ManifestError("damaged; run loader-prepare again", file=str(folder / file))
        known = {name: tree[name] for name in _REQUIRED if not name.endswith("_bytes")}
        known |= {"statistics": statistics, "states": states, "is_divided": tree.get("is_divided", False)}
        return cls(**known)


_REQUIRED = (
    "content",
    "files",
    "num_shards",
    "num_records",
    "total_samples",
    "num_bad",
    "num_bad_samples",
    "errors",
    "notes",
    "statistics",
    "actions_bytes",
    "states",
    "states_bytes",
)
"""Names that `manifest.json` must hold."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EntryManifest:
    """One entry of `data.train_data_paths` or `data.val_data_paths`, with R records. A pickle of it holds the folder's name
    only."""

    split: str
    entry: int
    path: str
    """The entry as it stands in the config."""
    shards: tuple[str, ...]
    """Absolute and without links, in natural order of their names."""
    shard_index: NDArray[np.uint32]  # [R]
    offsets: NDArray[np.int64]  # [R]
    sizes: NDArray[np.uint32]  # [R]
    num_samples: NDArray[np.uint32]  # [R]
    num_tokens: NDArray[np.uint32]  # [R], of all samples of the record; 0 where they were not counted
    files: NDArray[np.int64]  # [R], `NamedFiles.content`; 0 where it is not known
    file_times: NDArray[np.int64]  # [R], `NamedFiles.changed_ns` on this host
    content: str
    """Fingerprint of the shards' names and bytes, and of every setting that decides what a scan finds."""
    fingerprint: str
    """Fingerprint of `content` and of every setting that decides what `read` returns. Equal data on another host has an equal
    fingerprint. Files that a shard only names (NPZ, videos) are not part of it, but of `files_fingerprint`."""
    files_fingerprint: str
    """Fingerprint of the column `files`; empty where nothing is known of such files (none, or behind a URL)."""
    total_samples: int
    statistics: ActionStatistics | None
    """Statistics of the entry's actions, without a mask; None without actions."""
    states: ActionStatistics | None
    """Statistics of the robot's states; None without states."""
    num_bad: int
    """Records on which `read` will fail (policy `skip`)."""
    num_bad_samples: int
    """Samples of these records, at least one each: what one pass over the entry uses up of data.bad_sample_budget."""
    errors: tuple[str, ...]
    """Examples of the reasons."""
    notes: Mapping[str, int]
    """What was repaired or left out -> in how many records."""
    folder: Path
    """Holds the columns."""
    row_starts: NDArray[np.int64] | None = None  # [R], index in row_tokens of the record's first sample
    row_tokens: NDArray[np.uint32] | None = None  # [S], tokens of each sample; None where num_tokens determines them
    stamps: tuple[tuple[int, int], ...] = ()
    """(bytes, time of the last change in ns) of each shard at the scan. Empty for remote shards: their copies never change."""
    held: frozenset[int] | None = None
    """Numbers of the shards that this loader serves; None: all. The columns are those of the whole entry in any case, since the
    order of an epoch follows from them."""
    beside: str = ""
    """`BaseSFTDataset.beside` when the entry was located; empty: not known, or nothing lies beside the shards."""

    @property
    def num_records(self) -> int:
        """R."""
        return len(self.num_samples)

    def place(self, record: int) -> tuple[Path, int, int]:
        """(shard, offset, size) of a record, as `BaseSFTDataset.read` takes them."""
        shard = _as_path(self.shards[int(self.shard_index[record])])
        return shard, int(self.offsets[record]), int(self.sizes[record])

    @property
    def named(self) -> NamedEntry:
        """What the columns do not hold."""
        return NamedEntry(
            split=self.split,
            entry=self.entry,
            path=self.path,
            shards=self.shards,
            fingerprint=self.fingerprint,
            stamps=self.stamps,
            held=self.held,
            beside=self.beside,
        )

    def holds(self, record: int) -> bool:
        """Whether this loader serves the record."""
        return self.held is None or int(self.shard_index[record]) in self.held

    def first_records(self, count: int) -> list[int]:
        """Those of the first `count` records served here that have samples."""
        records = np.arange(min(count, self.num_records))
        if self.held is not None:
            records = np.flatnonzero(np.isin(self.shard_index, sorted(self.held)))[:count]
        found: list[int] = records[self.num_samples[records] > 0].tolist()
        return found

    def held_shards(self) -> list[str]:
        """Paths of the shards that this loader serves."""
        return [shard for number, shard in enumerate(self.shards) if self.held is None or number in self.held]

    def missing_ranges(self) -> list[tuple[int, int]]:
        """Ranges [first, stop) of shards that this loader does not serve, in order."""
        if self.held is None:
            return []
        edges = [-1, *sorted(self.held), len(self.shards)]
        return [(before + 1, after) for before, after in itertools.pairwise(edges) if before + 1 < after]

    def __reduce__(self) -> tuple[Any, ...]:
        return load_manifest, (self.folder, self.named)


def load_manifest(folder: Path, named: NamedEntry) -> EntryManifest:
    """Map the columns of a folder that `EntryJob` wrote. Raises ManifestError for a damaged folder or another version."""
    description = Description.read(folder)
    if len(named.shards) != description.num_shards:
        raise ManifestError(
            f"{len(named.shards)} shards, and {description.num_shards} when it was made; run loader-prepare again",
            file=str(folder),
        )
    return EntryManifest(
        split=named.split,
        entry=named.entry,
        path=named.path,
        shards=named.shards,
        content=description.content,
        fingerprint=named.fingerprint,
        files_fingerprint=description.files,
        total_samples=description.total_samples,
        statistics=description.statistics,
        states=description.states,
        num_bad=description.num_bad,
        num_bad_samples=description.num_bad_samples,
        errors=tuple(description.errors),
        notes=description.notes,
        folder=folder,
        stamps=named.stamps,
        held=named.held,
        beside=named.beside,
        **_map_columns(folder, description),
    )


def read_fingerprint(content: str, read_identity: Mapping[str, Any]) -> str:
    """`EntryManifest.fingerprint`."""
    return fingerprint({"content": content, "read": read_identity})


def _size(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def _map_columns(folder: Path, description: Description) -> dict[str, Any]:
    """Name -> array, mapped from the disk. Raises ManifestError."""
    shapes = {name: (dtype, description.num_records) for name, dtype in COLUMNS.items()}
    if description.is_divided:
        shapes[ROW_STARTS] = (np.int64, description.num_records)
        shapes[ROW_TOKENS] = (np.uint32, description.total_samples)
    columns: dict[str, Any] = {}
    for name, (dtype, length) in shapes.items():
        try:
            column = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            check_host(error, str(folder))
            reason = f"damaged ({type(error).__name__}); run loader-prepare again"
            raise ManifestError(reason, file=str(folder), field=name) from error
        if column.dtype != dtype or column.shape != (length,):
            raise ManifestError("damaged; run loader-prepare again", file=str(folder), field=name)
        columns[name] = column
    return columns


def _read_tree(file: Path) -> dict[str, Any]:
    """The JSON, with every required name. Raises ManifestError."""
    try:
        tree = orjson.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        check_host(error, str(file))
        raise ManifestError(f"it cannot be read ({error}); run loader-prepare again", file=str(file)) from error
    if not isinstance(tree, dict) or tree.get("version") != FORMAT_VERSION:
        found = tree.get("version") if isinstance(tree, dict) else None
        raise ManifestError(
            f"a manifest of version {found}, this program writes {FORMAT_VERSION}; run loader-prepare again",
            file=str(file),
        )
    if tree.get("num_bad") == 0:  # as in files from before these were counted
        tree.setdefault("num_bad_samples", 0)
    missing = set(_REQUIRED) - set(tree)
    if missing:
        raise ManifestError(f"{', '.join(sorted(missing))} missing; run loader-prepare again", file=str(file))
    return tree
