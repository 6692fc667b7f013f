"""Git LFS pointers: small texts that stand in a clone where `git lfs pull` has not put the files yet.

version https://git-lfs.github.com/spec/v1
oid sha256:4d7a...
size 12345
"""

from __future__ import annotations

MAGIC = b"version https://git-lfs"
REASON = "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"


def is_pointer(content: bytes) -> bool:
    """Whether a file with this content, or with this beginning, is a pointer."""
    return content.startswith(MAGIC)
