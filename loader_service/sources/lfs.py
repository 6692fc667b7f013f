"""Refuses Git LFS pointers in the place of files (`stoker_proto.host.lfs`)."""

from __future__ import annotations

from pathlib import Path

from stoker_proto.errors import DataError
from stoker_proto.host.lfs import MAGIC, REASON, is_pointer
from stoker_proto.host.trouble import check_host


def refuse_pointer(path: Path | str) -> None:
    """Raises DataError naming the file if it is a pointer; a file that cannot be opened is left to its reader."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(len(MAGIC))
    except OSError as error:
        check_host(error, str(path))
        return
    if is_pointer(head):
        raise DataError(REASON, file=str(path))
