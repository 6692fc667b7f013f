"""`convert`: list the episodes, find those that are done, estimate the size, write the others, assemble the JSONL, count."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loader_service.convert.episode import Episode, EpisodeRef, EpisodeSource
from loader_service.convert.folder import (
    assemble,
    locked,
    look,
    register,
    remove_leftovers,
    remove_stale,
    stamps_of,
    writable,
)
from loader_service.convert.write import write_episode
from stoker_proto.errors import ConfigError, DataError, StokerError
from stoker_proto.hashing import fingerprint
from stoker_proto.host.process import end_with_parent
from stoker_proto.host.trouble import check_host, host_errors

_PROBES = 3  # episodes that are read for the estimate
_AHEAD = 4  # tasks per process that wait: results are small, so this only bounds what a Ctrl-C throws away

Written = tuple[int, str | None]
"""(number of the episode, why it is bad or None)."""

_source: EpisodeSource | None = None  # of this worker process


@dataclass(frozen=True, slots=True)
class Output:
    """What is written, and where."""

    folder: Path
    """Of the episodes and the JSONL."""
    _: KW_ONLY
    jsonl: str = "train.jsonl"
    """Name of the file."""
    limit: int | None = None
    """Write only the first so many episodes."""
    compress: bool = False
    """Deflate the NPZ: smaller, and more work for the loader."""
    skip_bad: bool = False
    """Leave bad episodes out and return the reasons, their numbers stay free; else the first one raises."""


@dataclass(frozen=True, slots=True)
class Task:
    """An episode that is to be written."""

    number: int
    ref: EpisodeRef
    stamp: bytes


@dataclass(frozen=True, slots=True)
class Converted:
    """What was done."""

    jsonl: Path
    num_episodes: int
    num_new: int
    num_actions: int
    bad: tuple[str, ...] = ()
    """Why episodes were left out, one reason each; only with `skip_bad`."""


def convert(source: EpisodeSource, output: Output, *, jobs: int = 0, progress: bool = False) -> Converted:
    """Write the episodes and their JSONL. After an interruption, a second call resumes.

    Episodes whose file has another size or time than when they were written are written anew, those of other files are kept.

    Args:
        jobs: processes; 0: one per core.
        progress: show a bar on stderr.

    Raises:
        ConfigError: the folder holds another conversion, cannot be written, or has too little room.
        DataError: an episode is not what its format promises; those before and beside it are kept.
        HostError: this host cannot read now (descriptors, memory, its disk); what is written is kept.
    """
    out = output.folder
    refs = _episodes(source, output)
    stamps = stamps_of(refs)
    files = dict.fromkeys(ref.file for ref in refs)
    identity = fingerprint([source.identity(), output.compress, [file.rpartition("/")[2] for file in files]])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}): name another folder") from error
    with locked(out):
        register(out, identity, output.jsonl)
        remove_leftovers(out)
        found = look(out, stamps)
        if found.stale:
            remove_stale(out, found.stale)
        numbers = found.numbers[: output.limit]
        todo = [Task(*one) for one in zip(numbers, refs, stamps, strict=False) if one[0] not in found.done]
        bad: dict[int, str] = {}
        if todo:
            _check_room(source, [task.ref for task in todo], output)
            with tqdm(
                total=len(numbers), initial=len(numbers) - len(todo), unit="episode", disable=not progress
            ) as bar:
                bad = _write_all(source, todo, output, jobs, bar)
            _check_unchanged(refs, stamps, todo)
        reasons = tuple(bad[number] for number in numbers if number in bad)
        if len(reasons) == len(numbers):
            raise DataError(f"all {len(reasons)} episodes are bad; the first: {reasons[0]}")
        num_actions = assemble(out, output.jsonl, [number for number in numbers if number not in bad])
    return Converted(out / output.jsonl, len(numbers) - len(bad), len(todo) - len(bad), num_actions, reasons)


def _episodes(source: EpisodeSource, output: Output) -> list[EpisodeRef]:
    """All of them. Raises DataError where there is none, and for a bad one of those that are to be written."""
    with host_errors("the list of episodes"):
        refs = source.episodes()
    for ref in refs:
        if ref.error is not None:
            check_host(ref.error)
    if not refs:
        raise DataError("there is no episode in what was named")
    if not output.skip_bad:
        for ref in refs[: output.limit]:
            if ref.error is not None:
                raise ref.error
    return refs


def _write_all(source: EpisodeSource, todo: Sequence[Task], output: Output, jobs: int, bar: Any) -> dict[int, str]:
    """Number -> reason of each bad episode, where these are left out."""
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(todo))
    bad: dict[int, str] = {}
    if jobs == 1:
        for task in todo:
            _note(_write_one(source, task, output), bad, bar)
        return bad
    executor = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(), source),
    )
    waiting: set[Future[Written]] = set()
    try:
        for task in todo:
            if len(waiting) >= jobs * _AHEAD:
                waiting = _collect(waiting, bad, bar)
            waiting.add(executor.submit(_in_worker, task, output))
        while waiting:
            waiting = _collect(waiting, bad, bar)
    except BrokenProcessPool as error:
        raise StokerError(
            "a process was killed (out of memory?): run the command again with fewer --jobs; what is written is kept"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    return bad


def _collect(waiting: set[Future[Written]], bad: dict[int, str], bar: Any) -> set[Future[Written]]:
    done, left = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        _note(future.result(), bad, bar)
    return left


def _note(written: Written, bad: dict[int, str], bar: Any) -> None:
    number, reason = written
    if reason is not None:
        bad[number] = reason
    bar.update()


def _start_worker(parent: int, source: EpisodeSource) -> None:
    global _source
    if not end_with_parent(parent):  # a killed parent would leave this process waiting for ever
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    _source = source


def _in_worker(task: Task, output: Output) -> Written:
    if _source is None:
        raise StokerError("this process was not started by convert")
    return _write_one(_source, task, output)


def _write_one(source: EpisodeSource, task: Task, output: Output) -> Written:
    try:
        episode = _read(source, task.ref)
        episode.check(task.ref)
    except DataError as error:
        if not output.skip_bad:
            raise
        return task.number, str(error)
    with writable(output.folder, f"episode {task.number}"):
        write_episode(output.folder, task.number, task.ref, episode, compress=output.compress, stamp=task.stamp)
    return task.number, None


def _read(source: EpisodeSource, ref: EpisodeRef) -> Episode:
    """Raises DataError for a bad episode, HostError where this host cannot read now."""
    if ref.error is not None:
        raise ref.error
    with host_errors(ref.file):
        return source.read(ref)


def _check_room(source: EpisodeSource, refs: Sequence[EpisodeRef], output: Output) -> None:
    """Raises ConfigError if the frames will not fit on the disk, estimated from a few episodes."""
    probes = [refs[len(refs) * i // _PROBES] for i in range(min(_PROBES, len(refs)))]
    raw = probed = 0
    for ref in probes:
        try:
            episode = _read(source, ref)
        except DataError:
            if not output.skip_bad:
                raise
            continue  # told where it is written
        raw += episode.rgb.nbytes + (0 if episode.depth is None else episode.depth.nbytes)
        raw += sum(frames.nbytes for frames in episode.more_cameras.values())
        probed += ref.size_bytes
    needed = raw * sum(ref.size_bytes for ref in refs) // max(1, probed)
    folder = output.folder
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"about {needed / 1e9:.1f} GB of frames are to be written, and {folder} has {free / 1e9:.1f} GB left: name another "
            "--out, use --limit, or make room (--compress may save some of it, but that cannot be foreseen)"
        )


def _check_unchanged(refs: Sequence[EpisodeRef], stamps: Sequence[bytes], todo: Sequence[Task]) -> None:
    """Raises DataError if an input file changed while it was read: its episodes may mix two versions."""
    written = {task.ref.file for task in todo}
    for ref, before, after in zip(refs, stamps, stamps_of(refs), strict=True):
        if before != after and ref.file in written:
            raise DataError("it was written again while it was read: run the command again", file=ref.file)
