"""Unpacks compressed shards once into the cache folder, because a compressed stream has no random access.

    data/chats.jsonl.gz
    data/.stoker/unpacked/names/5d0f....json       stamp and BLAKE2b of the shard of this name
    data/.stoker/unpacked/3f09.../plain            its plain content, named by the compressed content
    data/.stoker/unpacked/77ab.../arrow-12...      columns of a parquet file, where `unpack_parquet` asks for it

A shard that is rewritten gets a new folder, and the old one is removed. Each loader unpacks what its cache folder does not hold;
of several processes one unpacks and the others wait.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from loader_service.cache_folder import LOCK_DEADLINE_S, cache_root, locked, writable
from loader_service.shards import Stamp
from loader_service.sources.extras import library
from loader_service.sources.tables.arrow import write_arrow
from loader_service.sources.tables.parquet import ParquetTable
from loader_service.sources.tables.table import PACKED_SUFFIXES
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.files import whole_file, write_whole

MIN_FREE_BYTES = 1 << 30
"""Unpacking stops rather than leave less than this on the disk."""
_ARROW_VERSION = 2
"""Of what `write_arrow` writes."""
_BLOCK = 1 << 20
_BLOCKS_PER_LOOK = 32  # at the free space
_ZSTD_PIECE = 1024  # compressed bytes: 4 of them can stand for 128 KiB, so this is at most 32 MiB of content


def plain_file(shard: Path, cache_dir: str | None) -> Path:
    """The shard itself, or its unpacked content in the cache.

    Raises DataError for damaged data, ConfigError where the cache has no room or cannot be written."""
    if shard.suffix.lower() not in PACKED_SUFFIXES:
        return shard
    return _made_once(shard, cache_dir, "plain", lambda target: _unpack(shard, target))


def arrow_file(
    shard: Path, path: Path, cache_dir: str | None, columns: tuple[str, ...] | None, needed: tuple[str, ...] = ()
) -> Path:
    """The parquet file in `path`, the plain content of `shard`, as an Arrow file of its needed columns in the cache.

    needed: see `ParquetTable`."""
    name = f"arrow-{fingerprint([_ARROW_VERSION, columns])[:16]}"
    return _made_once(
        shard,
        cache_dir,
        name,
        lambda target: write_arrow(ParquetTable(path, columns, needed), target, lambda: _check_room(shard, target)),
    )


def _made_once(shard: Path, cache_dir: str | None, name: str, make: Callable[[Path], None]) -> Path:
    """The file of this name in the folder of the shard's content; made there, whole or not at all, if it is missing."""
    root = cache_root(shard.parent, None if cache_dir is None else Path(cache_dir)) / "unpacked"
    with _full_disk_said(shard, root):
        path = root / _digest_of(shard, root) / name
        if not path.exists():
            with locked(path.parent, LOCK_DEADLINE_S):
                if not path.exists():
                    with writable(path.parent), whole_file(path) as unfinished:
                        make(unfinished)
    return path


def _digest_of(shard: Path, root: Path) -> str:
    """BLAKE2b of the compressed file, kept under its stamp."""
    name = hashlib.blake2b(os.fsencode(shard), digest_size=16).hexdigest()
    note = root / "names" / f"{name}.json"
    stamp = list(Stamp.of(shard))
    known = _read_note(note)
    if known is not None and known["stamp"] == stamp:
        return str(known["digest"])
    with shard.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    if list(Stamp.of(shard)) != stamp:
        raise DataError("it changed while it was read: run loader-prepare again when it is written", file=str(shard))
    with locked(root, LOCK_DEADLINE_S), writable(root):
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, orjson.dumps({"shard": str(shard), "stamp": stamp, "digest": digest}))
        if known is not None and known["digest"] != digest:
            used = {other["digest"] for path in note.parent.glob("*.json") if (other := _read_note(path)) is not None}
            if known["digest"] not in used:
                shutil.rmtree(root / known["digest"], ignore_errors=True)
    return digest


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        known = orjson.loads(note.read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(known, dict) and isinstance(known.get("digest"), str) and len(known["digest"]) == 32
    return known if whole and known["digest"].isalnum() and "stamp" in known else None


def _unpack(shard: Path, target: Path) -> None:
    with target.open("wb") as file:
        for number, block in enumerate(_blocks(shard)):
            if number % _BLOCKS_PER_LOOK == 0:
                _check_room(shard, target)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _check_room(shard: Path, target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < MIN_FREE_BYTES + _BLOCKS_PER_LOOK * _BLOCK:
        raise _no_room(shard, target.parent, f"{free >> 20} MiB free, {MIN_FREE_BYTES >> 20} MiB are left alone")


def _no_room(shard: Path, folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{shard}: no room to unpack it in {folder} ({why}): name a folder on another disk with --cache-dir or data.cache_dir, "
        "or unpack the file yourself"
    )


@contextmanager
def _full_disk_said(shard: Path, root: Path) -> Iterator[None]:
    """Replaces the ConfigError of `writable` about a full disk by one that names the shard."""
    try:
        yield
    except ConfigError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(shard, root, str(error.__cause__.strerror)) from error
        raise


def _blocks(shard: Path) -> Iterator[bytes]:
    """The plain content, in blocks of bounded size."""
    return _gzip_blocks(shard) if shard.suffix.lower() == ".gz" else _zstd_blocks(shard)


def _gzip_blocks(shard: Path) -> Iterator[bytes]:
    try:
        with gzip.open(shard, "rb") as stream:
            while block := stream.read(_BLOCK):
                yield block
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"damaged gzip data ({error}): copy it again", file=str(shard)) from error


def _zstd_blocks(shard: Path) -> Iterator[bytes]:
    """Frame after frame. zstandard's own reader accepts a file that ends within a frame; this one does not."""
    zstandard = library("zstandard")
    decompressor = zstandard.ZstdDecompressor()  # refuses frames that ask for more than 128 MiB of history
    frame, block = decompressor.decompressobj(), bytearray()
    started = False
    try:
        with shard.open("rb") as file:
            while piece := file.read(_ZSTD_PIECE):
                while piece:
                    block += frame.decompress(piece)
                    started = not frame.eof
                    piece = frame.unused_data if frame.eof else b""
                    if frame.eof:
                        frame = decompressor.decompressobj()
                if len(block) >= _BLOCK:
                    yield bytes(block)
                    block.clear()
    except zstandard.ZstdError as error:
        raise DataError(f"damaged zstd data ({error}): copy it again", file=str(shard)) from error
    if started:
        raise DataError("damaged zstd data: the file ends within a frame; copy it again", file=str(shard))
    if block:
        yield bytes(block)
