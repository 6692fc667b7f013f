"""`data.sources`: the parts of a mixture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One of `data.sources`: a dataset, and how much of the mixture it is."""

    dataset_type: str
    """As `data.dataset_type`."""
    paths: tuple[str, ...]
    """As `data.train_data_paths`."""
    val_paths: tuple[str, ...] = ()
    """As `data.val_data_paths`."""
    weight: float | None = None
    """Its part of the mixture, against the weights of the others; all sources have one, or none has."""
    name: str | None = None
    """What its loss is called in the logs; default: its dataset_type, numbered where two have the same."""
    options: dict[str, Any] = field(default_factory=dict)
    """As `data.options`."""
