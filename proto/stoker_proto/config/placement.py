"""`cluster.component_placement`: which accelerator slots train and how many loaders are started.

{trainer: 0-3, dataloader: 4-7}   ->   Placement(trainer=(0, 1, 2, 3), dataloader=(4, 5, 6, 7))
"""

from __future__ import annotations

from dataclasses import dataclass

from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Slots, counted over the cluster in node order. With no `trainer` slots the launcher decides how many ranks start."""

    trainer: tuple[int, ...] = ()
    dataloader: tuple[int, ...] = ()


def parse_slots(value: object, key: str) -> tuple[int, ...]:
    """The slots in `4-7`, `0,2-3` or a plain `4` (which YAML reads as a number). Raises ConfigError.

    >>> parse_slots("0,2-3", "trainer"), parse_slots([0, 1], "trainer")
    ((0, 2, 3), (0, 1))
    """
    rule = "slots are written `4-7`, `0,2` or `4`"
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{key} is {value!r}: {rule}")
    slots: list[int] = []
    for part in str(value).split(",") if value != "" else []:
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise ConfigError(f"{key} is {value!r}: {rule}")
        low, high = int(first), int(last) if dash else int(first)
        if high < low or high - low > 1_000_000:
            raise ConfigError(f"{key} is {value!r}: a range runs upwards; {rule}")
        slots.extend(range(low, high + 1))
    if len(set(slots)) != len(slots):
        raise ConfigError(f"{key} is {value!r}: a slot is named twice")
    return tuple(slots)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
