"""Libraries that only some containers need, imported where they are used."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from stoker_proto.errors import ConfigError, DataError
from stoker_proto.host_trouble import check_host


def require(module: str, purpose: str) -> Any:
    """The module of the extra `tables`. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        check_host(error, module)
        package = module.partition(".")[0]
        raise ConfigError(f"{purpose} needs {package} ({error}): pip install 'stoker[tables]'") from error


def guarded(read: Callable[[], Any], kind: str) -> Any:
    """What `read` gives; what pyarrow says of a damaged file of this kind becomes a DataError."""
    arrow = require("pyarrow", f"reading {kind}")
    try:
        return read()
    except (arrow.ArrowException, OSError, ValueError) as error:
        check_host(error, kind)
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"unreadable {kind} ({type(error).__name__}: {reason}): copy or write it again") from error


def rows_of(batch: Any, kind: str) -> list[dict[str, Any] | DataError]:
    """The rows of a pyarrow batch; a row whose text is no UTF-8 is an error, and those beside it are well."""
    try:
        return [without_nan(row) for row in guarded(batch.to_pylist, kind)]
    except DataError:
        rows: list[dict[str, Any] | DataError] = []
        for i in range(batch.num_rows):
            try:
                rows.append(row_of(batch, i, kind))
            except DataError as error:
                rows.append(error)
        return rows


def row_of(batch: Any, number: int, kind: str) -> dict[str, Any]:
    """Row `number` of a pyarrow batch or table. Raises DataError."""
    [row] = guarded(batch.slice(number, 1).to_pylist, kind)
    return without_nan(row)


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """The row with None for NaN, which other programs write for what is missing."""
    return {name: none_if_nan(value) for name, value in row.items()}


def none_if_nan(value: Any) -> Any:
    """The value; None for a float that is no finite number."""
    return None if type(value) is float and not math.isfinite(value) else value
