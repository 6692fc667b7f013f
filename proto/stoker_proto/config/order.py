"""`data.order`: which sample comes when."""

from __future__ import annotations

from dataclasses import dataclass, field

from stoker_proto.config.rules import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """The epoch's order: a pure function of (manifest, these values, epoch). Changing one makes another order."""

    seed: int = field(default=0, metadata=at_least(0))
    """Of the permutations and of the augmentation."""
    lanes: int = field(default=32, metadata=at_least(1))
    """Fixed streams of records per entry of the data paths; more lanes mix better and spread over more loaders."""
    window_records: int = field(default=8, metadata=at_least(1))
    """Consecutive records of a lane whose samples are shuffled among themselves; they are decoded once, together."""
    cell: int = field(default=8, metadata=at_least(1))
    """Consecutive rows of one lane before the next lane has its turn."""
    window_rows: int = field(default=128, metadata=at_least(1))
    """With `data.packing` or `data.group_by_length`: about so many rows are packed, or sorted by length, together, and then
    shuffled among themselves. It takes the place of `window_records`."""
