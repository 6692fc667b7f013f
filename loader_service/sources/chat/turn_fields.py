"""What a turn says beside its role and content: whether it is learned, and the reasoning before the answer.

{"role": "assistant", "content": "42", "reasoning_content": "six sevens are forty-two"}
{"role": "assistant", "content": "Hello", "weight": 0}           the same: train, trainable, loss, loss_weight ...: 0 or false
{"role": "assistant", "content": "Hello", "mask": true}          the same: masked
"""

from __future__ import annotations

from typing import Any

from loader_service.sources.half_characters import refuse_half
from stoker_proto.errors import DataError

LEARNED = ("weight", "loss_weight", "loss_scale", "train", "trainable", "training", "loss", "learn")
"""1 or true: the turn is learned; 0 or false: it is not."""
HIDDEN = ("mask", "masked")
"""True: the turn is not learned. False says nothing, as it stands on every other turn too."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning of an assistant's turn."""
_REASONING = frozenset(REASONING)
_IN_PARTS = ("train_detail", "training_detail")  # axolotl: spans of characters
KNOWN = frozenset((*LEARNED, *HIDDEN, *_IN_PARTS))


def weight_of(turn: dict[str, Any], field: str) -> bool | None:
    """Whether the turn's own flags say that it is learned; None: they say nothing. Raises DataError."""
    if KNOWN.isdisjoint(turn):
        return None
    learned: dict[str, bool] = {}
    for name in LEARNED:
        if turn.get(name) is not None:
            learned[name] = _flag(turn[name], f"{field}.{name}" if field else name)
    for name in HIDDEN:
        if turn.get(name) is not None and _flag(turn[name], f"{field}.{name}" if field else name):
            learned[name] = False
    for name in _IN_PARTS:
        if turn.get(name):
            raise DataError(
                "parts of a turn cannot be left out: mark whole turns with weight, or give token ids with labels",
                field=f"{field}.{name}",
            )
    if len(set(learned.values())) > 1:
        said = ", ".join(f"{name} {'learns' if value else 'does not learn'}" for name, value in learned.items())
        raise DataError(f"its flags contradict each other ({said}): keep one of them", field=field)
    return next(iter(learned.values()), None)


def reasoning_of(turn: dict[str, Any], field: str) -> str | None:
    """The reasoning, under whichever name; None: there is none. Raises DataError."""
    if _REASONING.isdisjoint(turn):
        return None
    found: dict[str, str] = {}
    for name in REASONING:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            refuse_half(value, f"{field}.{name}" if field else name)
            raise DataError(f"{type(value).__name__}: a text is expected", field=f"{field}.{name}" if field else name)
        if value.strip():
            found[name] = value
    if len(set(found.values())) > 1:
        raise DataError(f"{' and '.join(found)} differ: keep one of them", field=field)
    return next(iter(found.values()), None)


def _flag(value: Any, field: str) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, int | float) or value not in (0, 1):
        shown = repr(value)[:60]
        if isinstance(value, int | float):
            raise DataError(
                f"{shown}: 0 or 1 is expected; every label has the same weight in training, and other weights are not supported",
                field=field,
            )
        raise DataError(f"{shown}: 0 or 1 is expected", field=field)
    return bool(value)
