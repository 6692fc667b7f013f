"""The packer: as a plain loop would do it, no row too long, every sample in one row."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loader_service.plan import packing
from loader_service.plan.packing import pack_windows

WINDOWS = st.lists(st.lists(st.integers(0, 12), max_size=30), min_size=1, max_size=6)


def pack_plainly(lengths: list[int], capacity: int) -> tuple[list[int], int]:
    """(row of each item, number of rows): best-fit decreasing, one item after another."""
    rows, room = [0] * len(lengths), list[int]()
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[item] == 0:
            continue
        fitting = [row for row, free in enumerate(room) if free >= lengths[item]]
        if fitting:
            rows[item] = min(fitting, key=lambda row: (room[row], row))
        else:
            rows[item] = len(room)
            room.append(capacity)
        room[rows[item]] -= lengths[item]
    return rows, len(room)


def as_arrays(windows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([length for window in windows for length in window], np.uint32)
    return lengths, np.cumsum([0, *map(len, windows)], dtype=np.int64)


@settings(deadline=None)
@given(WINDOWS, st.sampled_from([12, 13, 40, 40_000, 1 << 20]))
def test_it_is_best_fit_decreasing(windows: list[list[int]], capacity: int) -> None:
    lengths, bounds = as_arrays(windows)
    rows, num_rows = pack_windows(lengths, bounds, capacity)
    for number, window in enumerate(windows):
        expected, count = pack_plainly(window, capacity)
        found = rows[bounds[number] : bounds[number + 1]].tolist()
        assert [row for row, length in zip(found, window, strict=True) if length] == [
            row for row, length in zip(expected, window, strict=True) if length
        ]
        assert num_rows[number] == count


@settings(deadline=None)
@given(st.lists(st.integers(1, 2048), min_size=1, max_size=400))
def test_no_row_is_too_long_and_all_but_one_are_more_than_half_full(window: list[int]) -> None:
    lengths, bounds = as_arrays([window])
    rows, num_rows = pack_windows(lengths, bounds, 2048)
    filled = np.bincount(rows, weights=lengths, minlength=int(num_rows[0]))
    assert len(filled) == num_rows[0]
    assert filled.max() <= 2048
    assert (filled > 0).all()
    assert np.sort(filled)[:2].sum() > 2048 or len(filled) == 1  # two of them would have been one


def test_windows_do_not_know_of_each_other_nor_of_the_blocks_they_are_packed_in(monkeypatch: object) -> None:
    generator = np.random.default_rng(0)
    windows = [generator.integers(1, 100, 50).tolist() for _ in range(20)]
    lengths, bounds = as_arrays(windows)
    rows, num_rows = pack_windows(lengths, bounds, 100)
    monkeypatch.setattr(packing, "_BLOCK_ITEMS", 120)  # type: ignore[attr-defined]
    again = pack_windows(lengths, bounds, 100)
    np.testing.assert_array_equal(rows, again[0])
    np.testing.assert_array_equal(num_rows, again[1])
    alone = pack_windows(lengths[bounds[7] : bounds[8]], np.array([0, 50]), 100)
    np.testing.assert_array_equal(rows[bounds[7] : bounds[8]], alone[0])


def test_the_lengths_of_the_docstring() -> None:
    rows, num_rows = pack_windows(np.array([5, 3, 2, 6, 2, 7], np.uint32), np.array([0, 6]), 8)
    assert rows.tolist() == [2, 2, 1, 1, 3, 0]
    assert num_rows.tolist() == [4]
    assert pack_windows(np.zeros(0, np.uint32), np.array([0, 0]), 8)[1].tolist() == [0]
