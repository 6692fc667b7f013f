"""A dict of plain values -> a dataclass, strictly: an unknown name or a wrong value is an error that lists what is allowed.

Shared by the YAML (`reader.py`) and by a dataset's own options (`loader_service.sources.options`). Each brings the function that
reads one value of one type, because the YAML takes numbers written as text and `data.options` does not.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, Union

from stoker_proto.errors import ConfigError

Instance = TypeVar("Instance")
ReadValue = Callable[[Any, Any, str], Any]
"""(type hint, value, its key for messages) -> the value that the field takes. Raises ConfigError."""
DescribeUnknown = Callable[[str, str | None], str]
"""(unknown name, the known name most like it or None) -> the error message."""


def read_dataclass(
    kind: type[Instance], tree: Mapping[str, Any], prefix: str, read_value: ReadValue, describe_unknown: DescribeUnknown
) -> Instance:
    """An instance of the dataclass `kind` from the values of its fields by name.

    prefix: stands in front of each name in messages, e.g. "data.order.". Raises ConfigError for an unknown name and for a
    missing value without a default.
    """
    hints = hints_of(kind)  # type: ignore[arg-type]  # a class is hashable
    check_names(tree, list(hints), describe_unknown)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # a dataclass by contract
        if field.name in tree:
            values[field.name] = read_value(hints[field.name], tree[field.name], prefix + field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{field.name} is missing: it has no default, set it in the file or with --set")
    return kind(**values)


@functools.cache
def hints_of(kind: type[Any]) -> dict[str, Any]:
    """Name -> type of each field of a dataclass. To be read only: all callers get the same dictionary."""
    return typing.get_type_hints(kind)


def check_names(names: Iterable[object], known: Sequence[str], describe_unknown: DescribeUnknown) -> None:
    """Raises ConfigError for the first name that is not known."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ConfigError(describe_unknown(str(name), near[0] if near else None))


def split_optional(hint: Any) -> tuple[Any, bool]:
    """(X, True) for the type hint `X | None`; (hint, False) for any other."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType) and type(None) in arguments:
        return next(one for one in arguments if one is not type(None)), True
    return hint, False


def read_choice(hint: Any, value: Any, key: str) -> Any:
    """The value, if the `Literal` type hint lists it. Raises ConfigError."""
    choices = typing.get_args(hint)
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    raise ConfigError(f"{key} is {value!r}: choose one of {', '.join(map(str, choices))}")
