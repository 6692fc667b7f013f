"""Git LFS pointers: small texts that stand in a clone where `git lfs pull` has not put the files yet.

version https://git-lfs.github.com/spec/v1
oid sha256:4d7a...
size 12345
"""

from __future__ import annotations

from pathlib import Path

from stoker_proto.errors import DataError
from stoker_proto.host.trouble import check_host

MAGIC = b"version https://git-lfs"
REASON = "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"


def refuse_pointer(path: Path | str) -> None:
    """Raises DataError naming the file if it is a pointer; a file that cannot be opened is left to its reader."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(len(MAGIC))
    except OSError as error:
        check_host(error, str(path))
        return
    if head == MAGIC:
        raise DataError(REASON, file=str(path))
