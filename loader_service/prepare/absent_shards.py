"""An entry of which some shards are not on this host. The cache, a copy of that of a host with all of them, lists them.

    where loader-prepare ran   demos/  train-00 ... train-19   .stoker/
    where a loader runs        demos/  train-00 ... train-09   .stoker/ (copied)    loader-serve --shards 'demos/train-0*.jsonl'

The order of an epoch follows from the whole entry, and its manifest is in the cache. So the bytes of other shards are not needed.
Those that are here must be what was scanned: they are hashed once; from then on their stamps are known.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loader_service.cache_folder import writable
from loader_service.prepare.entry import EntryJob
from loader_service.prepare.parts import hash_part
from loader_service.prepare.scan_pool import PoolOptions, run_all
from stoker_proto.errors import ConfigError, DataError, ManifestError

logger = logging.getLogger(__name__)


def with_absent(job: EntryJob) -> EntryJob:
    """The job, with the shards that its cached manifest lists and that are not here. The same job where all are here.

    Raises ConfigError where some are not here, and others are here that are not listed.
    """
    state = job.read_state()
    if state is None or job.shards.versions:
        return job
    here = dict(zip(job.shards.names, job.shards.paths, strict=True))
    listed = [shard["name"] for shard in state["shards"]]
    absent = frozenset(listed).difference(here)
    if not absent:
        return job
    first = next(name for name in listed if name in absent)
    new = sorted(here.keys() - set(listed))
    if new:
        raise ConfigError(
            f"{job.path}: {new[0]} is not among the {len(listed)} shards that its manifest lists, and {first} is, but not here. "
            f"Run loader-prepare where all shards are and copy {job.root} from there; or run it here, if the entry is what is "
            "here now"
        )
    logger.info(
        "%s: of the %d shards that its manifest lists, %d are not here (the first is %s): other loaders must serve them. If "
        "there are no such shards any more, run loader-prepare again",
        job.path, len(listed), len(absent), first,
    )  # fmt: skip
    paths = tuple(here.get(name, job.shards.base / name) for name in listed)
    return replace(job, shards=replace(job.shards, names=tuple(listed), paths=paths), absent=absent)


def confirm(jobs: Sequence[EntryJob], pool: PoolOptions) -> None:
    """Compare the shards that are here with what was scanned, and note their stamps. The caller holds the locks.

    jobs: with absent shards, of one dataset. Raises DataError where a shard differs, ManifestError for a damaged manifest.
    """
    for job in {job.folder: job for job in jobs}.values():
        state = job.read_state()
        if state is None:
            raise ManifestError("it vanished while it was used: copy it again", file=str(job.folder))
        tasks = [task for task in job.tasks() if task.digest is None]
        digests = run_all(hash_part, tasks, [task.stop - task.start for task in tasks], job.dataset, pool)
        found: dict[str, list[list[Any]]] = {}
        for task, digest in zip(tasks, digests, strict=True):
            found.setdefault(task.shard, []).append([task.start, task.stop, digest])
        shards = []
        for (_, path, stamp), shard in zip(job.stamped(state), state["shards"], strict=True):
            if found.get(str(path), shard["parts"]) != shard["parts"]:
                raise DataError(
                    f"not the file that was scanned, and other shards of {job.path} are not here, so it is not scanned anew: "
                    f"copy the file again; or run loader-prepare where all shards are, and copy {job.root} from there",
                    file=str(path),
                )
            shards.append({**shard, "stamp": list(stamp)})
        confirmed = {**state, "shards": shards}
        job.load(confirmed)
        with writable(job.root):
            job.write_state(confirmed)
