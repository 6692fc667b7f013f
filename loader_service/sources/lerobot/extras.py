"""The libraries that only this dataset needs, imported where they are used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from stoker_proto.errors import ConfigError

LIBRARIES = ("pyarrow", "av")


def check_installed() -> None:
    """Raises ConfigError if a library is missing; imports none, so that a loader's start stays short."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"data.dataset_type lerobot needs the library {name}: run `pip install 'stoker[lerobot]'`"
            )


def library(name: str) -> Any:
    """`av`, `pyarrow`, `pyarrow.parquet`."""
    return importlib.import_module(name)
