"""`convert`: list, estimate, write what is missing in several processes, put the JSONL together, count."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from loader_service.convert.episode import EpisodeRef, EpisodeSource
from loader_service.convert.write import is_done, read_back, remove_leftovers, write_episode
from loader_service.prepare.cache import write_whole
from stoker_proto.errors import ConfigError, DataError, StokerError
from stoker_proto.hashing import fingerprint

STATE_FILE, LOCK_FILE = ".convert.json", ".convert.lock"
_PROBES = 3  # episodes that are read for the estimate
_AHEAD = 4  # tasks per process that wait: results are small, so this only bounds what a Ctrl-C throws away

Written = tuple[int, str | None]
"""An episode's number, and why it is bad, where such ones are skipped."""

_source: EpisodeSource | None = None  # of this worker process


@dataclass(frozen=True, slots=True)
class Converted:
    """What was done."""

    jsonl: Path
    num_episodes: int
    num_new: int
    num_actions: int
    bad: tuple[str, ...] = ()
    """Why episodes were left out, one reason each; only with `skip_bad`."""


def convert(
    source: EpisodeSource, out: Path, *, jobs: int = 0, compress: bool = False, limit: int | None = None,
    jsonl: str = "train.jsonl", progress: bool = False, skip_bad: bool = False,
) -> Converted:  # fmt: skip
    """Write episodes into `out` and `jsonl` beside them. Run again after an interruption, it goes on where it was.

    Args:
        jobs: processes; 0: one per core.
        compress: deflate the NPZ: smaller, and more work for the loader.
        limit: only the first so many episodes.
        skip_bad: leave bad episodes out and say which; their numbers stay free.

    Raises:
        ConfigError: `out` holds another conversion, cannot be written, or has too little room.
        DataError: an episode is not what its format promises; those before and beside it are kept.
    """
    refs = source.episodes()
    if not refs:
        raise DataError("there is no episode in what was named")
    identity = fingerprint(
        [source.identity(), compress, [(ref.source, ref.place, ref.size_bytes) for ref in refs], _written_at(refs)]
    )
    refs = refs[:limit]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}): name another folder") from error
    with _locked(out):
        _check_identity(out, identity)
        remove_leftovers(out)
        todo = [number for number in range(len(refs)) if not is_done(out, number)]
        bad: dict[int, str] = {}
        if todo:
            _check_room(source, [refs[number] for number in todo], out, skip_bad=skip_bad)
            bad = _write_all(source, refs, todo, out, compress, jobs, progress, skip_bad=skip_bad)
        if len(bad) == len(refs):
            raise DataError(f"all {len(bad)} episodes are bad; the first: {bad[min(bad)]}")
        num_actions = _assemble(out, jsonl, [number for number in range(len(refs)) if number not in bad])
    reasons = tuple(bad[number] for number in sorted(bad))
    return Converted(out / jsonl, len(refs) - len(bad), len(todo) - len(bad), num_actions, reasons)


def _write_all(
    source: EpisodeSource, refs: Sequence[EpisodeRef], todo: Sequence[int], out: Path, compress: bool, jobs: int,
    progress: bool, *, skip_bad: bool,
) -> dict[int, str]:  # fmt: skip
    """Number -> reason of each bad episode, where these are skipped."""
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(todo))
    bad: dict[int, str] = {}
    with tqdm(total=len(refs), initial=len(refs) - len(todo), unit="episode", disable=not progress) as bar:
        if jobs == 1:
            for number in todo:
                _note(_write_one(source, number, refs[number], out, compress, skip_bad), bad, bar)
            return bad
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(source,))
        waiting: set[Future[Written]] = set()
        try:
            for number in todo:
                if len(waiting) >= jobs * _AHEAD:
                    waiting = _collect(waiting, bad, bar)
                waiting.add(executor.submit(_in_worker, number, refs[number], out, compress, skip_bad))
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


def _start_worker(source: EpisodeSource) -> None:
    global _source
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    _source = source
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent leaves its workers waiting for ever otherwise."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(number: int, ref: EpisodeRef, out: Path, compress: bool, skip_bad: bool) -> Written:
    if _source is None:
        raise StokerError("this process was not started by convert")
    return _write_one(_source, number, ref, out, compress, skip_bad)


def _write_one(
    source: EpisodeSource, number: int, ref: EpisodeRef, out: Path, compress: bool, skip_bad: bool
) -> Written:
    try:
        episode = source.read(ref)
        episode.check(ref)
    except DataError as error:
        if not skip_bad:
            raise
        return number, str(error)
    try:
        write_episode(out, number, ref, episode, compress=compress)
    except OSError as error:
        raise ConfigError(f"--out {out}: episode {number} cannot be written ({error.strerror or error})") from error
    return number, None


def _check_room(source: EpisodeSource, refs: Sequence[EpisodeRef], out: Path, *, skip_bad: bool) -> None:
    """Raises ConfigError if the frames, as they are stored, will not fit: judged by some of the episodes."""
    probes = [refs[len(refs) * i // _PROBES] for i in range(min(_PROBES, len(refs)))]
    raw = probed = 0
    for ref in probes:
        try:
            episode = source.read(ref)
        except DataError:
            if not skip_bad:
                raise
            continue  # told where it is written
        raw += episode.rgb.nbytes + (0 if episode.depth is None else episode.depth.nbytes)
        probed += ref.size_bytes
    needed = raw * sum(ref.size_bytes for ref in refs) // max(1, probed)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ConfigError(
            f"about {needed / 1e9:.1f} GB of frames are to be written, and {out} has {free / 1e9:.1f} GB left: name another "
            "--out, use --limit, or make room (--compress may save some of it, but that cannot be foreseen)"
        )


def _written_at(refs: Sequence[EpisodeRef]) -> list[int]:
    """mtime_ns of each file, in their order: one that was recorded anew often has as many episodes of the same size."""
    files = dict.fromkeys(ref.file for ref in refs)
    try:
        return [Path(file).stat().st_mtime_ns for file in files]
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror})", file=error.filename) from error


def _check_identity(out: Path, identity: str) -> None:
    """One folder holds one conversion: other episodes under the same numbers would be taken for done."""
    file = out / STATE_FILE
    if file.exists():
        try:
            known = orjson.loads(file.read_bytes())["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        if known != identity:
            raise ConfigError(
                f"--out {out} holds the conversion of other files (or of these before they were written again) or with other "
                "options: name another folder, or delete it"
            )
        return
    if any(out.glob("traj_*")):
        raise ConfigError(f"--out {out} holds trajectories that did not come from here: name another folder")
    write_whole(file, orjson.dumps({"identity": identity}))


def _assemble(out: Path, jsonl: str, numbers: Sequence[int]) -> int:
    """Write the JSONL from all rows in order. Returns the number of actions."""
    total, temporary = 0, out / f".{jsonl}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        for number in numbers:
            line, num_actions = read_back(out, number)
            file.write(line)
            total += num_actions
    temporary.replace(out / jsonl)
    return total


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out {out}: another loader-convert is writing there") from None
        yield
