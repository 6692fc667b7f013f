"""`data.order`: which sample comes when."""

from __future__ import annotations

from dataclasses import dataclass, field

from stoker_proto.config.rules import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderConfig:
    """The order of an epoch: a pure function of (manifest, these values, epoch). Another value gives another order."""

    seed: int = field(default=0, metadata=at_least(0))
    """Seed of the permutations and of the augmentation."""
    lanes: int = field(default=32, metadata=at_least(1))
    """Fixed streams of records per entry of the data paths. More lanes mix better and spread over more loaders."""
    window_records: int = field(default=8, metadata=at_least(1))
    """Consecutive records of a lane whose samples are shuffled together. Each record is decoded once per window."""
    cell: int = field(default=8, metadata=at_least(1))
    """Consecutive rows of one lane before the stream moves on to the next lane."""
    window_rows: int = field(default=128, metadata=at_least(1))
    """With `data.packing` or `data.group_by_length`: about this many rows are packed or sorted by length together, and then
    shuffled. It replaces `window_records`."""
