"""The output folder: which conversion it belongs to, which of its episodes are up to date, and its JSONL.

    .convert.json   {"identity": "5d41...", "jsonl": ["train.jsonl"]}: one conversion, and the JSONL files it may replace
    .convert.lock   held while one runs
    train.jsonl     the lines of the episodes, in the order of the input

An episode is recognised by its stamp, stored as `traj_NNNNNN/input.json`: size and time of its input file and its place in it.
So it is kept when other episodes of the input were recorded again.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson

from loader_service.convert.episode import EpisodeRef
from loader_service.convert.write import STAMP_FILE, episode_folder, read_back, read_stamp, to_disk
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.hashing import canonical_json
from stoker_proto.host.files import open_lock_file, try_lock, whole_file
from stoker_proto.host.trouble import check_host

logger = logging.getLogger(__name__)

STATE_FILE, LOCK_FILE = ".convert.json", ".convert.lock"
_FOLDER = re.compile(r"traj_(\d{6,})")
_LEFTOVER = re.compile(r"\.(traj_\d{6,}|.+\.jsonl|\.convert\.json)\.[0-9a-f]+\.tmp")


@dataclass(frozen=True, slots=True)
class Found:
    """Which episodes of the input the folder holds."""

    numbers: list[int]
    """Number of each episode's folder, in the order of the input: its place in that order, unless that is taken."""
    done: set[int]
    """Numbers that are written."""
    stale: list[int]
    """Numbers of episodes whose input changed, or that lack their row."""


def stamps_of(refs: Sequence[EpisodeRef]) -> list[bytes]:
    """The stamp of each episode. The file's time is part of it: a file recorded again often has episodes of the same sizes."""
    seen: dict[str, list[int | str]] = {}
    try:
        for file in dict.fromkeys(ref.file for ref in refs):
            status = Path(file).stat()
            # Files of several folders may have one name, and one time; their order is part of the identity.
            seen[file] = [len(seen), file.rpartition("/")[2], status.st_size, status.st_mtime_ns]
    except OSError as error:
        check_host(error)
        raise DataError(f"the file cannot be read ({error.strerror})", file=error.filename) from error
    return [canonical_json([*seen[ref.file], ref.name, ref.place, ref.size_bytes]).encode() for ref in refs]


def register(out: Path, identity: str, jsonl: str) -> None:
    """Register the folder for this conversion. Raises ConfigError if it holds another conversion or foreign files."""
    file = out / STATE_FILE
    names: list[str] = []
    if file.exists():
        try:
            known = orjson.loads(file.read_bytes())
            names, found = list(known["jsonl"]), known["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            check_host(error, str(file))
            found = None
        if found != identity:
            raise ConfigError(
                f"--out {out} holds the conversion of other files, of another version, or with other options: name another "
                "folder, or delete it"
            )
    elif any(out.glob("traj_*")):
        raise ConfigError(f"--out {out} holds trajectories that did not come from here: name another folder")
    if jsonl not in names:
        if os.path.lexists(out / jsonl):
            raise ConfigError(
                f"--out {out} holds a {jsonl} that did not come from here: name another folder, or another file with --name"
            )
        with _synced_file(out, STATE_FILE) as state:
            state.write(orjson.dumps({"identity": identity, "jsonl": [*names, jsonl]}))


def look(out: Path, stamps: Sequence[bytes]) -> Found:
    """Find the episodes with these stamps in the folder."""
    there = [int(match[1]) for folder in out.glob("traj_*") if (match := _FOLDER.fullmatch(folder.name))]
    # A folder without a stamp is foreign: it stays, and its number is not used.
    written = [number for number in sorted(there) if (episode_folder(out, number) / STAMP_FILE).exists()]
    held: defaultdict[bytes | None, list[int]] = defaultdict(list)
    for number in reversed(written):
        held[read_stamp(out, number)].append(number)
    mine = [held[stamp].pop() if held.get(stamp) else None for stamp in stamps]
    done = {number for number in mine if number is not None}
    taken = done | set(there) - set(written)
    spare = (number for number in itertools.count(len(stamps)) if number not in taken)
    numbers = [
        number if number is not None else place if place not in taken else next(spare)
        for place, number in enumerate(mine)
    ]
    return Found(numbers, done, [number for number in written if number not in done])


def remove_stale(out: Path, numbers: Sequence[int]) -> None:
    """Remove the JSONL files first: no line may name frames of another version."""
    logger.warning(
        "--out %s: what was made of %d episodes is removed, and the JSONL with it: their files were written again since",
        out,
        len(numbers),
    )
    with writable(out, "what is out of date"):
        for name in orjson.loads((out / STATE_FILE).read_bytes())["jsonl"]:
            (out / name).unlink(missing_ok=True)
        for number in numbers:
            folder = episode_folder(out, number)
            temporary = out / f".{folder.name}.{os.getpid()}.tmp"
            folder.rename(temporary)  # so that an interruption leaves no part of it under its name
            shutil.rmtree(temporary)


def remove_leftovers(out: Path) -> None:
    """Remove unfinished files of interrupted runs."""
    with writable(out, "what was left behind"):
        for path in out.glob(".*.tmp"):
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def assemble(out: Path, jsonl: str, numbers: Sequence[int]) -> int:
    """Write the JSONL from the rows of these episodes. Returns the number of actions."""
    total = 0
    with _synced_file(out, jsonl) as file:
        for number in numbers:
            line, num_actions = read_back(out, number)
            file.write(line)
            total += num_actions
    return total


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One conversion at a time."""
    with writable(out, LOCK_FILE):
        descriptor = open_lock_file(out / LOCK_FILE)
    try:
        if not try_lock(descriptor):
            raise ConfigError(f"--out {out}: another loader-convert is writing there")
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writable(out: Path, what: str) -> Iterator[None]:
    """An OSError in the block becomes a ConfigError that says how to continue."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--out {out}: {what} cannot be written ({error.strerror or error}); run the command again once it can: the "
            "episodes that are written are kept"
        ) from error


@contextmanager
def _synced_file(out: Path, name: str) -> Iterator[IO[bytes]]:
    """A file to write, which appears whole or not at all, also after a loss of power."""
    with writable(out, name), whole_file(out / name) as unfinished, unfinished.open("wb") as file:
        yield file
        to_disk(file)
