"""Libraries that only some kinds of data need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from stoker_proto.errors import ConfigError
from stoker_proto.host.trouble import check_host

_EXTRAS = {
    "pyarrow": ("reading parquet and Arrow files", "tables"),
    "zstandard": ("reading .zst files", "tables"),
    "av": ("reading videos", "lerobot"),
}
"""Package -> (what needs it, Stoker's extra that installs it)."""


def library(module: str) -> Any:
    """The module, e.g. `pyarrow.parquet`. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        check_host(error, module)
        package = module.partition(".")[0]
        purpose, extra = _EXTRAS[package]
        raise ConfigError(f"{purpose} needs {package} ({error}): pip install 'stoker[{extra}]'") from error
