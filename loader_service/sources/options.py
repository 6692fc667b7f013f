"""`data.options` -> a dataset's own frozen dataclass, strictly: unknown names and wrong types are errors with the way out."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from stoker_proto.config.strict import hints_of, read_choice, read_dataclass, split_optional
from stoker_proto.errors import ConfigError

Options = TypeVar("Options")


Reader = Callable[[str, object], Any]
"""(key as errors name it, value) -> the field's value. Raises ConfigError."""


def read_options(
    kind: type[Options],
    options: Mapping[str, Any],
    dataset_type: str,
    readers: Mapping[str, Reader] = MappingProxyType({}),
) -> Options:
    """An instance of the dataclass `kind`. Raises ConfigError naming the key.

    Fields are bool, int, float, str, tuple[str, ...], dict[str, str], Literal of texts, or one of these or None. `readers`: by
    name, for fields whose values have rules beyond that."""
    known = hints_of(kind)  # type: ignore[arg-type]  # a class is hashable

    def read(hint: Any, value: Any, key: str) -> Any:
        reader = readers.get(key.removeprefix("data.options."))
        return _read(hint, value, key) if reader is None else reader(key, value)

    return read_dataclass(kind, options, "data.options.", read, _describe_unknown(known, dataset_type))


def _describe_unknown(known: Iterable[str], dataset_type: str) -> Callable[[str, str | None], str]:
    def describe(name: str, near: str | None) -> str:
        hint = f"did you mean {near}?" if near else f"{dataset_type} takes {', '.join(sorted(known))}"
        return f"data.options.{name}: unknown option; {hint}"

    return describe


def _read(hint: Any, value: Any, key: str) -> Any:
    hint, is_optional = split_optional(hint)
    if is_optional and value is None:
        return None
    origin = typing.get_origin(hint)
    if origin is Literal:
        return read_choice(hint, value, key)
    if origin is tuple:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"{key} is {value!r}: a list of texts is expected")
        return tuple(names)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(one, str) for pair in value.items() for one in pair):
            raise ConfigError(f"{key} is {value!r}: texts by name are expected, e.g. {{text: body}}")
        return dict(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is not hint:
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint]
        raise ConfigError(f"{key} is {value!r}: {expected} is expected")
    return value
