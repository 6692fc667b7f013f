"""Files that survive a power failure, and folders that vanish at once. See fsync(2): a name is durable once its folder is."""

from __future__ import annotations

import logging
import os
import shutil
from itertools import count
from pathlib import Path

log = logging.getLogger(__name__)

DELETED = ".deleted"
"""Suffix of what is out of sight, and still to be removed."""


def sync(path: Path) -> None:
    """Have the disk take what this machine wrote to a file, or the names in a folder. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Everything in a folder, and the folder. Raises OSError."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def hide(folder: Path) -> Path:
    """Rename a folder away; where it is now. A deletion cut short leaves no half folder under a whole one's name."""
    hidden = (folder.with_name(f"{folder.name}.{n}{DELETED}") for n in count())
    target = next(path for path in hidden if not path.exists())
    folder.rename(target)
    return target


def remove(folder: Path) -> None:
    """Remove a folder that nobody needs; one that cannot be removed is no reason to end a run."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s cannot be removed (%s): it is tried again at the next checkpoint", folder, error)
