"""Whether shards are still the files that were scanned.

A shard that is written while it is served has its records elsewhere, or other ones at the same places: what is read there would
be mixed into a run whose other loaders, and whose checkpoint, know the old content. Nobody can tell from the rows, so the file
system is asked: size and time of the last change, behind each turn of reading.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from loader_service.manifest import EntryManifest
from stoker_proto.errors import FetchError
from stoker_proto.host_trouble import host_error

Shard = tuple[EntryManifest, int]
"""Of an entry, its number there."""


def shard_of(manifest: EntryManifest, record: int) -> Shard:
    """That a record lies in."""
    return manifest, int(manifest.shard_index[record])


def changed_shards(places: Iterable[tuple[EntryManifest, int]]) -> dict[Shard, FetchError]:
    """Shards of the records (manifest, record) that changed since they were scanned, and how."""
    changed = {}
    for shard in {shard_of(*place) for place in places}:
        error = _change(*shard)
        if error is not None:
            changed[shard] = error
    return changed


def _change(manifest: EntryManifest, number: int) -> FetchError | None:
    """No DataError: the data may be well, so it is not skipped."""
    if not manifest.stamps:
        return None
    path, known = manifest.shards[number], manifest.stamps[number]
    try:
        status = os.stat(path)  # noqa: PTH116 - in each turn of a thread
    except OSError as error:
        if (trouble := host_error(error, path)) is not None:
            return trouble
        return FetchError(f"{path}: it cannot be read any more ({error.strerror}): put it back as it was")
    if (status.st_size, status.st_mtime_ns) == known:
        return None
    return FetchError(
        f"{path}: it changed since it was scanned ({known[0]} bytes then, {status.st_size} now): start the loader again, which "
        "scans it anew; a run that began with the old content refuses the new one"
    )
