"""Memory of batches that is used again when nobody holds the batch any more.

A new array of some megabytes is memory that the kernel fills with zeros first: 0.02 ms for each image of 256x256. So the memory
of a large array comes back here when the array and all its views, tensors among them, are gone.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_LEAST_BYTES = 1 << 18
"""Smaller arrays are left to numpy: the C library keeps their memory anyway."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MOST_FREE = 4
"""Pieces of memory that wait for the next batch: about as many as are given back at once."""


class _Lease:
    """Memory on loan: the base of an array. It outlives the array's last view, and then gives the memory back."""

    def __init__(self, memory: NDArray[np.uint8], free: deque[NDArray[np.uint8]]) -> None:
        self._memory, self._free = memory, free
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._memory)


class ReusedMemory:
    """An `Allocate` that keeps the last few large pieces of memory. Thread-safe."""

    def __init__(self) -> None:
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=_MOST_FREE)  # the oldest goes first
        self._lock = threading.Lock()

    def __call__(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array whose values are undefined."""
        kind = np.dtype(dtype)
        size_bytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if size_bytes < _LEAST_BYTES:
            return np.empty(shape, kind)
        return np.asarray(_Lease(self._take(size_bytes), self._free)).view(kind).reshape(shape)

    def _take(self, size_bytes: int) -> NDArray[np.uint8]:
        with self._lock:  # a lease that ends meanwhile only appends, which needs no lock
            for _ in range(len(self._free)):
                memory = self._free.popleft()
                if len(memory) == size_bytes:
                    return memory
                self._free.append(memory)
        return np.empty(size_bytes, np.uint8)


reused_memory = ReusedMemory()
"""The default of `Allocate`, for all feeds of the process."""


def keep_freed_frames() -> None:
    """The C library keeps freed memory of up to 32 MiB apiece and 64 MiB in all, where it has glibc's `mallopt`.

    ZeroMQ allocates each frame, and another thread frees it a moment later. Frames of pixels are so large that their memory would
    go back to the kernel each time, and the kernel would fill it with zeros again. glibc itself may raise its limits to these
    values.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
