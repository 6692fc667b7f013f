"""A RecordEncoder that keeps encoded records on disk, across runs (`loader.disk_cache_gb`).

A record's key is a hash of all that decides its bytes:

    settings    what the fingerprints of a run are made of: processor, dataset, device; versions of libraries; Stoker's own code
    content     the row that names the record; name, size and CRC-32 of each array of its NPZ, the file's size and time of change

Not kept: records that depend on the epoch (augmented frames), and records whose dataset class cannot name their content.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import loader_service
import stoker_proto
from loader_service.disk_cache.store import DiskCache
from loader_service.manifest import EntryManifest
from loader_service.pieces.changed_shards import changed_shards, check_files, shard_of
from loader_service.pieces.device_images import image_libraries
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.excluded import Excluded
from loader_service.pieces.piece import EncodedRecord, Outcome
from loader_service.pieces.stored_record import LAYOUT, from_bytes, to_bytes
from loader_service.sources.base import RecordContent
from stoker_proto.config import DataConfig, LoaderConfig
from stoker_proto.errors import StokerError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.stages import READ, switch
from stoker_proto.host.trouble import host_error
from stoker_proto.processor import Processor

logger = logging.getLogger(__name__)

_LIBRARIES = ("numpy", "tokenizers", "pybase64", "pillow", "av", "pyarrow", "orjson")
"""Whose versions may decide a record's bytes, beside those of the fingerprint `image_libraries`."""
_CODE = {loader_service: ("sources", "pieces", "paths.py"), stoker_proto: ("",)}
"""Where the code is that decides it."""


class CachingEncoder(RecordEncoder):
    """Takes records from the cache, and keeps there what it had to encode."""

    def __init__(
        self, data: DataConfig, processor: Processor, loader: LoaderConfig, excluded: Excluded, disk: DiskCache
    ) -> None:
        super().__init__(data, processor, loader, excluded)
        self.disk = disk
        self._loader = replace(loader, allow_mixed_devices=False)  # what is kept names its device in any case
        self._settings: dict[tuple[str, int], bytes | None] = {}  # of each entry

    def preload(self, manifests: Iterable[EntryManifest]) -> None:
        """As `RecordEncoder.preload`; makes the keys' common part too, so that the first ticket does not wait for it."""
        manifests = list(manifests)
        super().preload(manifests)
        for manifest in manifests:
            self._settings_of(manifest)

    def encode_all(self, places: Sequence[tuple[EntryManifest, int]], epoch: int) -> list[Outcome]:
        """As `RecordEncoder.encode_all`: the same samples, and the same errors."""
        switch(READ)
        keys = [self._key(manifest, number) for manifest, number in places]
        outcomes: list[Outcome | None] = [None if key is None else self._kept(key) for key in keys]
        changed = changed_shards([place for place, found in zip(places, outcomes, strict=True) if found is not None])
        if changed:  # since its key was made
            outcomes = [
                changed.get(shard_of(*place), found) if found is not None else None
                for place, found in zip(places, outcomes, strict=True)
            ]
        missing = [place for place, found in zip(places, outcomes, strict=True) if found is None]
        encoded = iter(super().encode_all(missing, epoch) if missing else ())
        return [
            self._keep(key, next(encoded)) if found is None else found
            for key, found in zip(keys, outcomes, strict=True)
        ]

    def _kept(self, key: bytes) -> EncodedRecord | None:
        data = self.disk.get(key)
        if data is None:
            return None
        try:
            return from_bytes(data)
        except ValueError as error:
            logger.debug("a record on disk: %s", error)
            self.disk.damaged(key)
            return None

    def _keep(self, key: bytes | None, outcome: Outcome) -> Outcome:
        if key is not None and isinstance(outcome, EncodedRecord):
            before = switch(READ)
            data = to_bytes(outcome)
            if data is not None:
                self.disk.put(key, data)
            switch(before)
        return outcome

    def _key(self, manifest: EntryManifest, number: int) -> bytes | None:
        """16 bytes; None for a record that is not kept, or whose files differ from the scan: encoding it raises the error."""
        settings = self._settings_of(manifest)
        content = None if settings is None else self._content(manifest, number)
        if settings is None or content is None:
            return None
        excluded = sorted(self.excluded_of(manifest, number))
        digest = hashlib.blake2b(digest_size=16)
        for part in (settings, *_parts(manifest, number, content), repr(excluded).encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()

    def _content(self, manifest: EntryManifest, number: int) -> RecordContent | None:
        shard, offset, size = manifest.place(number)
        try:
            content = self.dataset_of(manifest).content(shard, offset, size)
            is_known = content is not None and check_files(manifest, number, content.files)
        except StokerError:  # reading the record raises it again, with its place
            return None
        except Exception as error:  # a dataset class may be anybody's, and a host may be in trouble
            if host_error(error) is None:
                logger.exception("%s: its content is not known, so it is not kept", shard)
            return None
        return content if is_known else None

    def _settings_of(self, manifest: EntryManifest) -> bytes | None:
        """Hash of the settings that decide the bytes of the entry's records; None if they depend on the epoch."""
        key = manifest.split, manifest.entry
        if key not in self._settings:
            is_augmented = self.data.augment.enabled and manifest.split == "train"
            self._settings[key] = None if is_augmented else self._hash_settings(manifest)
        return self._settings[key]

    def _hash_settings(self, manifest: EntryManifest) -> bytes:
        dataset = self.dataset_of(manifest)
        found = self.processor.fingerprints()
        settings = {
            "layout": LAYOUT,
            "code": code_fingerprint(),
            "libraries": dict(library_versions()),
            "processor": {**found, "image_libraries": image_libraries(found["image_libraries"], self._loader)},
            "class": f"{type(dataset).__module__}:{type(dataset).__qualname__}",
            "read": dataset.read_identity(),
            "learn_padding": self.data.action.learn_padding or manifest.split != "train",
        }
        return fingerprint(settings).encode()


def _parts(manifest: EntryManifest, number: int, content: RecordContent) -> Iterator[bytes]:
    """What is hashed of a record's content."""
    if content.row is not None:
        yield content.row
    else:
        place = int(manifest.shard_index[number]), int(manifest.offsets[number]), int(manifest.sizes[number])
        yield repr((manifest.content, *place)).encode()
    files = content.files
    yield b"" if files is None else repr((files.content, files.changed_ns)).encode()


def code_files() -> Iterator[tuple[Path, Path]]:
    """(folder of the package, file) of the Python files that decide a record's bytes."""
    for package, names in _CODE.items():
        root = Path(next(iter(package.__path__)))
        for name in names:
            found = [root / name] if name.endswith(".py") else sorted((root / name).rglob("*.py"))
            yield from ((root, file) for file in found)


@cache
def code_fingerprint() -> str:
    """Of these files: other code makes another key, whatever its version says."""
    digest = hashlib.sha256()
    for root, file in code_files():
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def library_versions() -> Iterator[tuple[str, str]]:
    """(name, version) of the libraries that are installed."""
    for name in _LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "none"
