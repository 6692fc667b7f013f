"""`data.order`: which sample comes when."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """The epoch's order: a pure function of (manifest, these values, epoch). Changing one makes another order."""

    seed: int = 0
    """Of the permutations and of the augmentation."""
    lanes: int = 32
    """Fixed streams of records per entry of the data paths; more lanes mix better and spread over more loaders."""
    window_records: int = 8
    """Consecutive records of a lane whose samples are shuffled among themselves; they are decoded once, together."""
    cell: int = 8
    """Consecutive rows of one lane before the next lane has its turn."""
    window_rows: int = 128
    """With `data.packing` or `data.group_by_length`: about so many rows are packed, or sorted by length, together, and then
    shuffled among themselves. It takes the place of `window_records`."""
