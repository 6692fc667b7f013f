"""Libraries that only some containers need, imported where they are used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from stoker_proto.errors import ConfigError, DataError


def require(module: str, purpose: str) -> Any:
    """The module of the extra `tables`. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"{purpose} needs {package} ({error}): pip install 'stoker[tables]'") from error


def guarded(read: Callable[[], Any], kind: str) -> Any:
    """What `read` gives; what pyarrow says of a damaged file of this kind becomes a DataError."""
    arrow = require("pyarrow", f"reading {kind}")
    try:
        return read()
    except (arrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"unreadable {kind} ({type(error).__name__}: {reason}): copy or write it again") from error


def rows_of(batch: Any, kind: str) -> list[dict[str, Any] | DataError]:
    """The rows of a pyarrow batch; a row whose text is no UTF-8 is an error, and those beside it are well."""
    try:
        rows: list[dict[str, Any] | DataError] = guarded(batch.to_pylist, kind)
    except DataError:
        rows = []
        for i in range(batch.num_rows):
            try:
                rows.extend(guarded(batch.slice(i, 1).to_pylist, kind))
            except DataError as error:
                rows.append(error)
    return rows
