"""Libraries that only some containers need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from stoker_proto.errors import ConfigError


def require(module: str, purpose: str) -> Any:
    """The module of the extra `tables`. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"{purpose} needs {package} ({error}): pip install 'stoker[tables]'") from error
