"""Whether shards, and the files that their records name, are still those that were scanned.

A shard that is rewritten while it is served has other records at the same offsets. Their rows would be mixed into a run whose
other loaders and whose checkpoint know the old content. The rows do not show it, so size and time of the last change are compared
after each batch of reading. The NPZ and the videos of a record are compared when they are opened (`sources.named_files`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from loader_service.manifest import EntryManifest
from loader_service.sources.named_files import NamedFiles
from stoker_proto.errors import FetchError
from stoker_proto.host.trouble import host_error

Shard = tuple[EntryManifest, int]
"""(manifest of the entry, number of the shard in it)."""


def shard_of(manifest: EntryManifest, record: int) -> Shard:
    """The shard that holds a record."""
    return manifest, int(manifest.shard_index[record])


def changed_shards(places: Iterable[tuple[EntryManifest, int]]) -> dict[Shard, FetchError]:
    """Shards of these records (manifest, record) that changed since the scan -> what changed."""
    changed = {}
    for shard in {shard_of(*place) for place in places}:
        error = _change(*shard)
        if error is not None:
            changed[shard] = error
    return changed


def _change(manifest: EntryManifest, number: int) -> FetchError | None:
    """A FetchError and no DataError: the data may be good, so policy `skip` must not skip it."""
    if not manifest.stamps:
        return None
    path, known = manifest.shards[number], manifest.stamps[number]
    try:
        status = os.stat(path)  # noqa: PTH116 - called for every batch
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


def check_files(manifest: EntryManifest, record: int, files: NamedFiles | None) -> bool:
    """Whether the record's files are as at the scan, in time too: False where only the time of change differs.

    Raises FetchError where their content differs. Files of which nothing is known are as they were."""
    known = int(manifest.files[record])
    if files is None or not known:
        return True
    if files.content != known:
        shard, offset, _ = manifest.place(record)
        raise FetchError(
            f"{shard}: the NPZ or the video of the record at {offset} changed since it was scanned: put it back as it was, or "
            "run `loader-prepare --rescan` and start all loaders again; a run that began with the old content refuses the new one"
        )
    return not files.changed_ns or files.changed_ns == int(manifest.file_times[record])
