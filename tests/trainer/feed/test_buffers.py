"""Memory of batches: used again when the batch is gone, and never before."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from trainer.feed.buffers import ReusedMemory

SHAPE = (8, 256, 256, 3)


def address(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_when_the_last_view_is_gone() -> None:
    allocate = ReusedMemory()
    first = allocate(SHAPE, np.uint8)
    assert (first.shape, first.dtype, first.flags.writeable, first.flags.c_contiguous) == (SHAPE, np.uint8, True, True)
    place = address(first)
    tensor = torch.from_numpy(first[2:])
    tensor.fill_(7)
    del first
    second = allocate(SHAPE, np.uint8)
    second.fill(9)
    assert address(second) != place
    assert int(tensor.min()) == 7
    del tensor
    third = allocate((8 * 256 * 256 * 3 // 4,), np.float32)  # as many bytes, as other values
    assert address(third) == place


def test_what_is_kept_is_bounded_and_small_arrays_are_not_kept() -> None:
    allocate = ReusedMemory()
    places = [address(array) for array in [allocate(SHAPE, np.uint8) for _ in range(6)]]
    again = [allocate(SHAPE, np.uint8) for _ in range(6)]
    assert [address(array) in places for array in again[:4]] == [True] * 4
    assert allocate((0, 256, 256, 3), np.uint8).shape == (0, 256, 256, 3)
    small = allocate((4, 8), np.int64)
    assert small.flags.owndata


COUNT_FAULTS = """
import ctypes, resource, sys
from trainer.feed.buffers import keep_freed_frames
if sys.argv[1] == "keep":
    keep_freed_frames()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def frames():
    held = [libc.malloc(12_000_000) for _ in range(4)]
    for frame in held:
        ctypes.memset(frame, 1, 12_000_000)
    for frame in held:
        libc.free(frame)
frames()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    frames()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is meant")
def test_freed_frames_are_kept() -> None:
    faults = [
        int(subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("plain", "keep")
    ]
    assert faults[1] < faults[0] / 4, faults
