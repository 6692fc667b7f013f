"""The C allocator of a rank: memory that a step frees is kept for the next step.

A step on the CPU frees and allocates the same megabytes again. By default glibc gives blocks above 128 KB back to the kernel.
The kernel must then map and clear each page anew: a tenth of the CPU time of a small model's step.
"""

from __future__ import annotations

import ctypes
import os

LARGEST_KEPT_BYTES = 32 << 20
"""Larger blocks go back to the kernel at once; glibc accepts no larger value."""
MOST_KEPT_BYTES = 256 << 20
"""Above it, free memory at the end of the heap goes back."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Call it early, once. Returns False where it changes nothing: the user tuned malloc, or this is not glibc."""
    tuned = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
    if any(name in os.environ for name in tuned):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES), mallopt(_M_TRIM_THRESHOLD, MOST_KEPT_BYTES)
    return all(kept)
