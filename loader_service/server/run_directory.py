"""A loader's private folder: its workers' socket, their job, and the plans that they map."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_PREFIX = "stoker-loader-"


@contextmanager
def run_directory() -> Iterator[Path]:
    """A folder of mode 0700 below TMPDIR, removed at the end; also removes those of killed loaders."""
    base = Path(tempfile.gettempdir())
    for old in base.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # loaders that start together find the same ones
            if old.stat().st_uid == os.getuid() and not _is_alive(old.name.removeprefix(_PREFIX).split("-")[0]):
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(owner: str) -> bool:
    """Whether the process of a folder's name is there; a name that is not ours is nobody's to remove."""
    try:
        return psutil.pid_exists(int(owner))
    except (ValueError, OverflowError):
        return True
