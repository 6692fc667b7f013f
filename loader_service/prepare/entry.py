"""One entry, from its shards to its manifest: what the cache holds, what must be scanned, how parts become columns."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from loader_service.cache_folder import save_arrays
from loader_service.manifest import (
    ACTIONS_FILE,
    COLUMNS,
    FORMAT_VERSION,
    ROW_STARTS,
    ROW_TOKENS,
    STATES_FILE,
    Description,
    EntryManifest,
    NamedEntry,
    load_manifest,
    read_fingerprint,
)
from loader_service.pieces.text_samples import Counting
from loader_service.prepare import parts as parts_module
from loader_service.prepare.actions_state import (
    SAMPLE_CAPACITY,
    GatheredActions,
    actions_needed,
    actions_to_keep,
    check_same_width,
    sampled_chunk,
)
from loader_service.prepare.cleanup import note_use
from loader_service.prepare.parts import Part, PartResult, PartTask, RemotePart, load_part
from loader_service.shards import EntryShards, Stamp
from loader_service.sources.base import BaseSFTDataset
from stoker_proto.errors import DataError, ManifestError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.files import whole_folder, write_whole
from stoker_proto.host.trouble import check_host

logger = logging.getLogger(__name__)

_MAX_ERRORS = 20


@dataclass(frozen=True, slots=True)
class EntryJob:
    """An entry that this loader holds, and how it is scanned."""

    split: str
    entry: int
    path: str
    shards: EntryShards
    root: Path
    """Cache folder."""
    dataset: BaseSFTDataset
    counting: Counting | None = None
    """How text becomes rows, where the scan counts them."""
    served: frozenset[str] | None = None
    """Paths of the shards that this loader serves; None: all."""
    absent: frozenset[str] = frozenset()
    """Names of the shards that are not here, only in the cached manifest (`prepare.absent_shards`)."""

    @property
    def scan_identity(self) -> str:
        """Fingerprint of every setting that decides what a scan finds."""
        identity = [FORMAT_VERSION, parts_module.PART_BYTES, self.dataset.scan_identity(), self.shards.identity]
        if self.sampled_chunk:
            identity.append(self.sampled_chunk)
        if self.counting is not None:
            identity.append(self.counting.fingerprint)
        return fingerprint(identity)

    @property
    def cache_identity(self) -> str:
        """Key of the scan in the cache: `scan_identity`, and the bytes of the tokenizer.json that counted."""
        return fingerprint([self.scan_identity, self.counting.file_hash]) if self.counting else self.scan_identity

    @property
    def sampled_chunk(self) -> int:
        """Timesteps of the chunks that are sampled; 0: none."""
        return sampled_chunk(self.dataset.config.action)

    @property
    def folder(self) -> Path:
        """Folder of this entry's state in the cache."""
        key = fingerprint([self.cache_identity, self.shards.pattern])
        return self.root / "entries" / key[:16]

    def current(self) -> EntryManifest | None:
        """The cached manifest, if no shard changed since it was made; else None."""
        state = self.read_state()
        if state is None:
            return None
        seen = [(shard["name"], Stamp(*shard["stamp"])) for shard in state["shards"]]
        if seen != [(name, stamp) for name, _, stamp in self.stamped(state)]:
            return None
        try:
            manifest = self.load(state)
        except ManifestError as error:
            logger.info("a manifest is made anew: %s", error)
            return None
        note_use(self.folder / "state.json")
        note_use(manifest.folder / "manifest.json")
        return manifest

    def shard_hashes(self) -> dict[str, str]:
        """Path of each shard -> hash of its bytes, as the last scan found them; empty before a scan."""
        state = self.read_state() or {"shards": []}
        known = {shard["name"]: _shard_hash(shard["parts"]) for shard in state["shards"]}
        pairs = zip(self.shards.names, self.shards.paths, strict=True)
        return {str(path): known[name] for name, path in pairs if name in known}

    def tasks(self, *, rescan: bool = False) -> list[PartTask]:
        """The parts of all shards, in order. Parts of unchanged shards have their digest. rescan: use no cached scan."""
        state = self.read_state() or {"shards": []}
        known = {shard["name"]: shard for shard in state["shards"]}
        ranges: list[tuple[Path, Stamp, int, int, str | None]] = []
        is_remote = bool(self.shards.versions)
        for name, path, stamp in self.stamped(state):
            if stamp.size == 0:
                raise DataError("an empty shard (0 bytes): write it again, or remove it", file=str(path))
            before = known.get(name)
            if before is not None and Stamp(*before["stamp"]) == stamp:
                ranges.extend((path, stamp, start, stop, digest) for start, stop, digest in before["parts"])
            elif is_remote:
                ranges.append((path, stamp, 0, stamp.size, None))
            else:
                with self.dataset.reading():
                    cuts = self.dataset.cut(path, parts_module.PART_BYTES)
                ranges.extend((path, stamp, a, b, None) for a, b in itertools.pairwise(cuts))
        total = sum(stop - start for _, _, start, stop, _ in ranges)
        return [
            PartTask(
                shard=str(path),
                start=start,
                stop=stop,
                stamp=stamp,
                digest=digest,
                keep=actions_to_keep(stop - start, total),
                chunk=self.sampled_chunk,
                identity=self.cache_identity,
                folder=str(self.root / "parts"),
                remote=RemotePart(total) if is_remote else None,
                rescan=rescan,
            )
            for path, stamp, start, stop, digest in ranges
        ]

    def kept_too_few(self, results: Sequence[PartResult]) -> dict[int, PartTask]:
        """Number of a result -> the task that scans its part again, so that it keeps its share of the sample of the fit."""
        actions, states = sum(r.num_actions for r in results), sum(r.num_states for r in results)
        again: dict[int, PartTask] = {}
        for number, result in enumerate(results):
            needed = max(
                actions_needed(result.num_actions, actions, result.task.chunk),
                actions_needed(result.num_states, states, 0),
            )
            if result.task.keep < needed:
                again[number] = replace(result.task, digest=result.digest, keep=needed, rescan=False)
        return again

    def assemble(self, results: Sequence[PartResult]) -> EntryManifest:
        """Write the manifest from the parts in the cache."""
        shards: dict[str, dict[str, Any]] = {
            str(path): {"name": name, "parts": [], "num_records": 0}
            for name, path in zip(self.shards.names, self.shards.paths, strict=True)
        }
        for result in results:
            task, shard = result.task, shards[result.task.shard]
            shard["parts"].append((task.start, task.stop, result.digest))
            shard["stamp"] = (task.stamp.size, task.stamp.mtime_ns, task.stamp.ctime_ns, task.stamp.inode)
            shard["num_records"] += result.num_records
        for path, shard in shards.items():
            if shard["num_records"] == 0:
                raise DataError("a shard without a record: write it again, or remove it", file=path)
        hashes = [[shard["name"], _shard_hash(shard["parts"])] for shard in shards.values()]
        content = fingerprint({"scan": self.scan_identity, "shards": hashes})
        files = fingerprint([r.files for r in results]) if any(r.files for r in results) else ""
        if not self._is_whole(content, files):  # files touched without a change: others may be reading these columns
            with whole_folder(self._columns(content, files)) as folder:
                self._write_columns(folder, results, content, files)
        parts = [result.task.cache_path(result.digest).stem for result in results]
        state = {
            "version": FORMAT_VERSION,
            "content": content,
            "files": files,
            "shards": list(shards.values()),
            "parts": parts,
        }
        self.write_state(state)
        return self.load(state)

    def stamped(self, state: Mapping[str, Any]) -> list[tuple[str, Path, Stamp]]:
        """(name, path, stamp) of each shard now. For remote shards it is what their host reports, for absent ones what the cache
        has."""
        names, paths = self.shards.names, self.shards.paths
        if self.shards.versions:
            stamps = [Stamp(size, version, 0, 0) for size, version in self.shards.versions]
        else:
            known = {shard["name"]: shard["stamp"] for shard in state["shards"] if shard["name"] in self.absent}
            stamps = [
                Stamp(*known[name]) if name in known else Stamp.of(path)
                for name, path in zip(names, paths, strict=True)
            ]
        return list(zip(names, paths, stamps, strict=True))

    def load(self, state: Mapping[str, Any]) -> EntryManifest:
        """The manifest that a state names. Raises ManifestError if it is damaged."""
        return self._load(state["content"], state["files"], [Stamp(*shard["stamp"]) for shard in state["shards"]])

    def _columns(self, content: str, files: str) -> Path:
        """Folder of the columns: others may be reading those of files that have changed since."""
        return self.folder / (fingerprint([content, files]) if files else content)[:32]

    def _load(self, content: str, files: str, stamps: Sequence[Stamp] = ()) -> EntryManifest:
        named = NamedEntry(
            split=self.split,
            entry=self.entry,
            path=self.path,
            shards=tuple(map(str, self.shards.paths)),
            fingerprint=read_fingerprint(content, self.dataset.read_identity()),
            stamps=() if self.shards.versions else tuple((stamp.size, stamp.mtime_ns) for stamp in stamps),
            held=self._held(),
            beside=self.dataset.beside(self.shards.paths),
        )
        manifest = load_manifest(self._columns(content, files), named)
        if (manifest.content, manifest.files_fingerprint) != (content, files):
            raise ManifestError("it belongs to other data; run loader-prepare again", file=str(manifest.folder))
        return manifest

    def _is_whole(self, content: str, files: str) -> bool:
        try:
            self._load(content, files)
        except ManifestError:
            return False
        return True

    def _held(self) -> frozenset[int] | None:
        """Numbers of the shards that are served; None: all."""
        numbers = frozenset(
            number for number, path in enumerate(self.shards.paths) if self.served is None or str(path) in self.served
        )
        return None if len(numbers) == len(self.shards.paths) else numbers

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Keep it in the cache, for `current`."""
        write_whole(self.folder / "state.json", orjson.dumps(state))

    def read_state(self) -> dict[str, Any] | None:
        """What the last scan saw: {content, files, shards: [{name, stamp, parts, num_records}]}; None where there is none."""
        try:
            state = orjson.loads((self.folder / "state.json").read_bytes())
        except (OSError, ValueError) as error:
            check_host(error, str(self.folder))
            return None
        return state if isinstance(state, dict) and state.get("version") == FORMAT_VERSION else None

    def _write_columns(self, folder: Path, results: Sequence[PartResult], content: str, files: str) -> None:
        num_records = sum(result.num_records for result in results)
        columns: dict[str, Any] = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(num_records,))
            for name, dtype in COLUMNS.items()
        }
        numbers = {str(path): number for number, path in enumerate(self.shards.paths)}
        row_tokens: list[NDArray[np.uint32]] = []
        is_divided = False
        merged: dict[str, GatheredActions] = {}
        position = num_bad = num_bad_samples = total_samples = 0
        errors: list[str] = []
        notes: Counter[str] = Counter()
        for result in results:
            task = result.task
            part = load_part(task.cache_path(result.digest), task.keep, task.chunk)
            if part is None:
                raise ManifestError("it vanished while it was used; run loader-prepare again", file=task.folder)
            rows = slice(position, position + len(part.offsets))
            _fill(columns, rows, part, numbers[task.shard], task.start)
            position = rows.stop
            in_part = int(part.num_samples.sum(dtype=np.int64))
            row_tokens.append(np.ones(in_part, np.uint32) if part.row_tokens is None else part.row_tokens)
            is_divided = is_divided or part.row_tokens is not None
            total_samples += in_part
            num_bad += part.num_bad
            num_bad_samples += part.num_bad_samples
            errors.extend(part.errors[: _MAX_ERRORS - len(errors)])
            parts_module.count_notes(notes, part.notes)
            for what, found, chunk in (("actions", part.actions, task.chunk), ("states", part.states, 0)):
                if found is not None:
                    before = merged.setdefault(what, GatheredActions.empty(found.dim, chunk))
                    check_same_width([found.dim], task.shard, before, what)
                    before.merge(found)
        if is_divided:
            starts = np.cumsum(columns["num_samples"], dtype=np.int64) - columns["num_samples"]
            np.save(folder / f"{ROW_STARTS}.npy", starts)
            np.save(folder / f"{ROW_TOKENS}.npy", np.concatenate(row_tokens))
        for column in columns.values():
            column.flush()
        for what, file in (("actions", ACTIONS_FILE), ("states", STATES_FILE)):
            if what in merged:
                save_arrays(folder / file, merged[what].to_arrays(SAMPLE_CAPACITY))
        Description(
            content=content,
            files=files,
            num_shards=len(numbers),
            num_records=num_records,
            total_samples=total_samples,
            is_divided=is_divided,
            num_bad=num_bad,
            num_bad_samples=num_bad_samples,
            errors=errors,
            notes=dict(sorted(notes.items())),
            statistics=merged["actions"].statistics.finish()[0] if "actions" in merged else None,
            states=merged["states"].statistics.finish()[0] if "states" in merged else None,
        ).write(folder)


def _fill(columns: dict[str, Any], rows: slice, part: Part, shard: int, start: int) -> None:
    """Write the rows of a part that begins at byte `start` of shard number `shard`."""
    columns["shard_index"][rows] = shard
    columns["offsets"][rows] = part.offsets + start
    columns["sizes"][rows] = part.sizes
    columns["num_samples"][rows] = part.num_samples
    columns["num_tokens"][rows] = part.num_tokens
    if part.files is not None:  # else the file stays a hole of zeros, which takes no room on disk
        columns["files"][rows], columns["file_times"][rows] = part.files.T


def _shard_hash(parts: list[tuple[int, int, str]]) -> str:
    """Hash of a shard's content, from the digests of its parts, which depend on the content alone."""
    digest = hashlib.blake2b(digest_size=16)
    for start, stop, part in parts:
        digest.update(f"{start}-{stop}:{part}\n".encode())
    return digest.hexdigest()
