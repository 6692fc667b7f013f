"""Which values a number of the file may have: its field says so, and `check_ranges` checks all fields.

lanes: int = field(default=32, metadata=at_least(1))
--set data.order.lanes=0     ->     "data.order.lanes is 0: it must be at least 1"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stoker_proto.errors import ConfigError

_RANGES = "ranges"


@dataclass(frozen=True, slots=True)
class Range:
    """One rule for a number."""

    rule: str
    """As the error message states it."""
    holds: Callable[[Any], bool]


Metadata = dict[str, tuple[Range, ...]]
"""What `dataclasses.field(metadata=...)` takes."""


def at_least(limit: float) -> Metadata:
    """The limit and all above it."""
    rule = "it must not be negative" if limit == 0 else f"it must be at least {limit}"
    return allowed(rule, lambda number: number >= limit)


def above(limit: float) -> Metadata:
    """All above the limit."""
    return allowed(f"it must be above {limit}", lambda number: number > limit)


def between(low: float, high: float) -> Metadata:
    """Both limits and all between them."""
    return allowed(f"it must lie in [{low}, {high}]", lambda number: low <= number <= high)


def allowed(rule: str, holds: Callable[[Any], bool]) -> Metadata:
    """A rule with its own text."""
    return {_RANGES: (Range(rule, holds),)}


def both(first: Metadata, second: Metadata) -> Metadata:
    """Two rules for one number, checked in this order."""
    return {_RANGES: first[_RANGES] + second[_RANGES]}


def check_ranges(section: Any, prefix: str = "") -> None:
    """Check a dataclass, also those in its fields and tuples. Raises ConfigError with the key, its value and the rule.

    prefix: the keys in front, e.g. "data.order.".
    """
    for key, value, one in _ranges(section, prefix):
        if not one.holds(value):
            raise ConfigError(f"{key} is {value}: {one.rule}")


def _ranges(section: Any, prefix: str) -> Iterator[tuple[str, Any, Range]]:
    for field in dataclasses.fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        for one in field.metadata.get(_RANGES, ()):
            yield key, value, one
        if dataclasses.is_dataclass(value):
            yield from _ranges(value, f"{key}.")
        elif isinstance(value, tuple):
            for number, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    yield from _ranges(item, f"{key}[{number}].")
