"""Files and folders that appear whole or not at all, and locks between processes. Linux and other POSIX systems.

    with whole_folder(path) as unfinished:        # a folder beside `path`, renamed to it at the end of the block
        ...
    descriptor = open_lock_file(folder / "lock")
    if not try_lock(descriptor): ...              # another process has it; it ends with that process, however that ends

See rename(2), fsync(2) and flock(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# -- whole or not at all


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name to write in the block; renamed to `path` at its end, removed if the block fails (a full disk, say)."""
    unfinished = _temporary_name(path)
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new one."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


@contextmanager
def whole_folder(path: Path, *, unfinished: Path | None = None) -> Iterator[Path]:
    """A folder to fill in the block; replaces `path` at its end, removed if the block fails.

    unfinished: its name until then; default: a random one beside `path`. Pass a fixed name where only one process writes at a
    time: a folder that a killed process left under that name is removed first.
    """
    folder = unfinished or _temporary_name(path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        if path.exists():
            shutil.rmtree(path)
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses: processes in several containers that share the folder may have the same
    number."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


# -- reading what others wrote


def read_regular(path: str | Path, most_bytes: int) -> bytes:
    """The content of a regular file of at most `most_bytes`.

    Raises OSError: also EINVAL for a pipe, a device or a folder, of which no byte is read, and EFBIG for a larger file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer must not block
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, and at most {most_bytes} are read", str(path))
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read(most_bytes)
    finally:
        os.close(descriptor)


# -- on the disk


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` everything in a folder, and the folder itself. Raises OSError."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


# -- locks


def open_lock_file(path: Path) -> int:
    """Descriptor of a lock file, created where it is missing. Closing it, or the end of the process, frees the lock. OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting; False while another process has it. Raises OSError on file systems without locks.

    shared: several may hold it together, but not beside an exclusive one. A descriptor that holds one kind changes to the other.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
