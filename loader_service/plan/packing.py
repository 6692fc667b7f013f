"""Samples of text -> rows of at most `capacity` tokens: best-fit decreasing, in all windows at the same time.

    capacity 8, a window of lengths 5 3 2 6 2 7   ->   the longest first: 7 | 6 2 | 5 3 | 2   ->   rows 2 2 1 1 3 0

Each sample, the longest first, goes into the row that it fills best (the first of equal ones), or begins a new row. The loop runs
over the positions of a window and places one sample in every window at a time: a million samples take about 0.15 s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_WINDOW_ITEMS = 1 << 15
"""Items of one window at most: its rows, and the samples of a row, are counted in uint16."""
_BLOCK_ITEMS = 1 << 20  # packed together: some 40 bytes each while it lasts
_FIRST_ROWS = 8


def pack_windows(
    lengths: NDArray[np.uint32], bounds: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """(rows uint16[R], num_rows int64[W]): the row of each item inside its window, and how many rows each window has.

    Window w holds the items [bounds[w], bounds[w + 1]), at most MAX_WINDOW_ITEMS. lengths: uint32[R], none above `capacity`,
    which is below 2**31; an item of length 0 is in no row (its value in `rows` has no meaning).
    """
    rows, num_rows = np.zeros(len(lengths), np.uint16), np.zeros(len(bounds) - 1, np.int64)
    step = max(1, _BLOCK_ITEMS // max(1, int(np.diff(bounds).max(initial=0))))
    for first in range(0, len(num_rows), step):
        block = bounds[first : first + step + 1]
        low, high = int(block[0]), int(block[-1])
        num_rows[first : first + step] = _pack(lengths[low:high], block - low, capacity, rows[low:high])
    return rows, num_rows


def _pack(
    lengths: NDArray[np.uint32], bounds: NDArray[np.int64], capacity: int, rows: NDArray[np.uint16]
) -> NDArray[np.int64]:
    """Fill `rows`; returns int64[W], the number of rows of each window."""
    order, sizes = _longest_first(lengths, bounds)  # [P, W] each
    # In unsigned arithmetic room - size is huge where an item does not fit, so the smallest difference is the best fit.
    dtype = np.uint16 if capacity < 1 << 15 else np.uint32
    room: NDArray[Any] = np.full((len(bounds) - 1, _FIRST_ROWS), capacity, dtype)
    begun = np.zeros(len(room), np.int64)  # [W]
    windows = np.arange(len(room))
    for items, size in zip(order, sizes.astype(dtype), strict=True):
        most = int(begun.max(initial=0))
        if most == room.shape[1]:
            room = np.concatenate((room, np.full_like(room, capacity)), axis=1)
        row = (room[:, : most + 1] - size[:, None]).argmin(axis=1)  # [W]: one of the begun ones, or the first empty one
        room[windows, row] -= size
        inside = size > 0
        np.maximum(begun, (row + 1) * inside, out=begun)
        rows[items[inside]] = row[inside]
    return begun


def _longest_first(
    lengths: NDArray[np.uint32], bounds: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """(items int64[P, W], lengths uint32[P, W]): the i-th longest item of each window, of equal ones the first; then 0s."""
    sizes = np.diff(bounds)  # [W]
    window = np.repeat(np.arange(len(sizes)), sizes)  # [R]
    place = np.arange(len(lengths)) - bounds[window]  # [R]
    # One number to sort by: the length, then the place counted from the end.
    keys = np.zeros((len(sizes), int(sizes.max(initial=0))), np.uint64)
    keys[window, place] = lengths.astype(np.uint64) << np.uint64(16) | (MAX_WINDOW_ITEMS - place).astype(np.uint64)
    keys.sort(axis=1)
    keys = np.ascontiguousarray(keys[:, ::-1].T)
    items = bounds[:-1] + MAX_WINDOW_ITEMS - (keys & np.uint64(0xFFFF)).astype(np.int64)
    return items, (keys >> np.uint64(16)).astype(np.uint32)
