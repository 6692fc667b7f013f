"""YAML text -> `Config`, strictly: an unknown key or a wrong type is an error that names the key and the way out.

YAML 1.1 reads `2e-5` as text, `010` as eight, `1:30` as ninety, a date as a date, and lets the last of two equal keys win.
Here numbers are what they look like, a path such as `007` stays text, and a repeated key is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from stoker_proto.config.placement import Placement, parse_slots
from stoker_proto.config.root import Config
from stoker_proto.config.rules import check_ranges
from stoker_proto.config.strict import check_names, read_choice, read_dataclass, split_optional
from stoker_proto.errors import ConfigError

Section = typing.TypeVar("Section")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE` and `--set a.b=value`, the arguments of `load_config`, the same in every program."""
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML that loaders and trainers share")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=V", help="override one key of it; repeatable"
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the file, apply `a.b=value` overrides in order (values are YAML) and check everything. Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: the configuration cannot be read ({error}); name a YAML file with --config"
        ) from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a mapping with cluster, model, data, trainer is expected, not {type(tree).__name__}"
        )
    for override in overrides:
        apply_override(tree, override)
    return config_from_tree(tree)


def config_from_tree(tree: Any) -> Config:
    """The inverse of `config_to_tree`. Raises ConfigError where the tree is not valid for this version."""
    config = typing.cast(Config, _read(Config, tree, ""))
    config.check()
    return config


def read_section(kind: type[Section], tree: Any, path: str) -> Section:
    """A dataclass from a mapping that the file keeps as it is, read and checked as the file's own sections are.

    path: the key of the mapping, for messages. Raises ConfigError.
    """
    section = typing.cast(Section, _read_dataclass(kind, tree, path))
    check_ranges(section, f"{path}.")
    return section


def config_to_tree(value: Any) -> Any:
    """A config as plain lists, dicts and numbers, as checkpoints store and compare it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: config_to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [config_to_tree(item) for item in value]
    if isinstance(value, dict):
        return {key: config_to_tree(item) for key, item in value.items()}
    return value


def _parse_yaml(text: str, name: str) -> Any:
    try:
        loader = _ConfigLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error


class _ConfigLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's decimal numbers, without dates; a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value} stands twice in one mapping: keep one of them", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_RESOLVED_ANEW = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _RESOLVED_ANEW]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)\Z"), list("-+0123456789")
)
_ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)\Z"),
    list("-+.0123456789"),
)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` to a tree, whose values are YAML. Raises ConfigError."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r}: write it as a.b=value, e.g. --set trainer.lr=2e-5")
    node = tree
    for key in keys[:-1]:
        below = node.setdefault(key, {})
        if below is None:
            below = node[key] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override!r}: {key} holds a value, not keys")
        node = below
    node[keys[-1]] = _parse_yaml(text, f"--set {path}")


def _read(kind: Any, value: Any, path: str) -> Any:
    """Turn a YAML value into the annotated type `kind`; `path` is the key, for the message."""
    if kind is Placement:
        return _read_placement(value, path)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type, kind), value, path)
    kind, is_optional = split_optional(kind)
    if is_optional:
        return None if value is None else _read(kind, value, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return read_choice(kind, value, path)
    if origin is tuple:
        return _read_tuple(arguments, value, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path} is {value!r}: a mapping is expected")
        return dict(value)
    return _read_scalar(kind, value, path)


def _read_dataclass(kind: type, value: Any, path: str) -> Any:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path or 'the file'} is {value!r}: a mapping of keys is expected")
    prefix = f"{path}." if path else ""
    names = [field.name for field in dataclasses.fields(kind)]

    def describe_unknown(name: str, near: str | None) -> str:
        hint = f"did you mean {prefix}{near}?" if near else f"known here: {', '.join(names)}"
        return f"{prefix}{name}: unknown key; {hint}"

    return read_dataclass(kind, value, prefix, _read, describe_unknown)


def _read_placement(value: Any, path: str) -> Placement:
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is {value!r}: write {{trainer: 0-3, dataloader: 4-7}}")
    names = [field.name for field in dataclasses.fields(Placement)]
    check_names(value, names, lambda name, _: f"{path}.{name}: unknown component; known here: {', '.join(names)}")
    return Placement(**{key: parse_slots(slots, f"{path}.{key}") for key, slots in value.items()})


def _read_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str):  # one path where a list of paths may stand
        value = [value]
    if not isinstance(value, list):
        raise ConfigError(f"{path} is {value!r}: a list is expected")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
        raise ConfigError(f"{path} is {value!r}: {len(kinds)} values are expected")
    return tuple(_read(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _read_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is Any:
        return value
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise ConfigError(f"{path} is {value!r}: a number is expected") from None
        if not math.isfinite(number):
            raise ConfigError(f"{path} is {value!r}: a finite number is expected")
        return number
    if kind is int and isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]{1,18}", value.strip(), re.ASCII):
        return int(value)
    if kind is str and type(value) is int:
        return str(value)
    if type(value) is not kind:
        names = {int: "a whole number", bool: "true or false", str: "text (in quotes)", float: "a number"}
        raise ConfigError(f"{path} is {value!r}: {names.get(kind, str(kind))} is expected")
    return value
