"""`data.options` -> a dataset's own frozen dataclass, strictly: unknown names and wrong types are errors with the way out."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar

from stoker_proto.errors import ConfigError

Options = TypeVar("Options")


def read_options(kind: type[Options], options: dict[str, Any], dataset_type: str) -> Options:
    """An instance of the dataclass `kind`.

    Its fields are bool, int, float, str, tuple[str, ...], dict[str, str], Literal of texts, or one of these or None.
    Raises ConfigError."""
    hints = typing.get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # a dataclass by contract
    values = {}
    for key, value in options.items():
        _check_known(key, known, dataset_type)
        values[key] = _convert(key, value, hints[key])
    return kind(**values)


def read_each(
    options: Mapping[str, Any], readers: Mapping[str, Callable[[str, object], Any]], dataset_type: str
) -> dict[str, Any]:
    """The values of the options by name, each made by its reader, which is given the key as errors name it.

    Raises ConfigError. For options that the types of `read_options` do not say."""
    values = {}
    for key, value in options.items():
        _check_known(key, readers, dataset_type)
        values[key] = readers[key](f"data.options.{key}", value)
    return values


def _check_known(key: object, known: Iterable[str], dataset_type: str) -> None:
    """Raises ConfigError for a key of `data.options` that the dataset does not have."""
    known = sorted(known)
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{dataset_type} takes {', '.join(known)}"
        raise ConfigError(f"data.options.{key}: unknown option; {hint}")


def _convert(key: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"data.options.{key} is {value!r}: choose one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"data.options.{key} is {value!r}: a list of texts is expected")
        return tuple(names)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(one, str) for pair in value.items() for one in pair):
            raise ConfigError(f"data.options.{key} is {value!r}: texts by name are expected, e.g. {{text: body}}")
        return dict(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is not hint:
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint]
        raise ConfigError(f"data.options.{key} is {value!r}: {expected} is expected")
    return value
