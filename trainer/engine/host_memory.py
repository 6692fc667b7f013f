"""Host memory that the processes of this container or job may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_bytes(groups: Path = _GROUPS, own_group: Path = _OWN_GROUP) -> int:
    """The host's available memory in bytes, or less where a control group (version 2) has less left.

    Kubernetes, Slurm and systemd limit memory through control groups, and end a process that takes more.
    """
    free: int = psutil.virtual_memory().available
    return min([free, *_left_in_groups(groups, own_group)])


def _left_in_groups(groups: Path, own_group: Path) -> list[int]:
    """Bytes left in this process's group and in those above it, of each that has a limit."""
    try:
        lines = own_group.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return []
    paths = [line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")]
    folders = [folder for path in paths for folder in (groups / path, *(groups / path).parents)]
    return [left for folder in folders if folder.is_relative_to(groups) and (left := _left(folder)) is not None]


def _left(folder: Path) -> int | None:
    """None without a limit. Cached files count as used in a group, but give way."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        pairs = [line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines()]
    except OSError:  # the group is not visible from here, or version 1
        return None
    cached = next((int(number) for name, number in pairs if name == "inactive_file"), 0)
    return max(0, int(limit) - used + cached)
