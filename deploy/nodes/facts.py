"""What must be the same on all nodes of a run: the versions, Stoker's own code, and the config."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from stoker_proto.config import Config
from stoker_proto.config.reader import config_to_tree
from stoker_proto.wire.digests import RULE

_PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "pyzmq")
_CODE = ("stoker_proto", "loader_service", "trainer")
_MAY_DIFFER = ("loader.", "data.cache_dir", "cluster.loader_addresses", "cluster.security.")
"""Keys that describe one machine: its cores and folders. Beginnings of key names."""
_MUST_AGREE = ("loader.device", "loader.jpeg")
"""Keys among them that change what is in a batch."""
_SHOWN = 120


def versions() -> dict[str, str]:
    """Name -> version, of what computes a batch or a gradient."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a node that only runs loaders needs no torch
            found[name] = ""
    return {**found, "the rule of row digests (2 needs xxhash)": str(RULE), "the code of Stoker": code_digest()}


def code_digest() -> str:
    """Short digest of all Python files of Stoker's packages, as this process would import them."""
    digest = hashlib.sha256()
    specs = (importlib.util.find_spec(name) for name in _CODE)
    folders = [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin is not None]
    for folder in (*folders, Path(__file__).resolve().parent.parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def config_values(config: Config) -> dict[str, str]:
    """Key -> value as JSON, of the keys that must be the same on all nodes."""
    values = _flat(config_to_tree(config), "")
    return {key: value for key, value in values if key in _MUST_AGREE or not key.startswith(_MAY_DIFFER)}


def _flat(tree: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(tree, dict) and tree:
        return [pair for key, value in tree.items() for pair in _flat(value, f"{name}.{key}" if name else str(key))]
    return [(name, json.dumps(tree, sort_keys=True, default=str))]


def difference(nodes: Sequence[tuple[str, Mapping[str, Mapping[str, str]]]]) -> str | None:
    """One line about the first difference from node 0; None if there is none.

    nodes: (what to call the node, {"versions": ..., "config": ...}) of each, node 0 first.
    """
    first_name, first = nodes[0]
    for name, other in nodes[1:]:
        for what, here in first["versions"].items():
            there = other["versions"].get(what, "")
            if there != here and here and there:
                return f"versions differ: {what} is {here} on {first_name} and {there} on {name}; install the same on all nodes"
        for key in sorted({*first["config"], *other["config"]}):
            values = [side["config"].get(key, "missing")[:_SHOWN] for side in (first, other)]
            if first["config"].get(key) != other["config"].get(key):
                return f"configs differ: {key} is {values[0]} on {first_name} and {values[1]} on {name}; use one config"
    return None
