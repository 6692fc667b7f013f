"""The safetensors files of a base model: whether they are whole, and the shapes of their weights. Only headers are read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from stoker_proto.errors import ConfigError
from stoker_proto.host.lfs import MAGIC, REASON, is_pointer
from stoker_proto.host.trouble import check_host

_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library limits it
_LENGTH = struct.Struct("<Q")


def check_files(folder: Path) -> None:
    """Read the headers of all safetensors files. Raises ConfigError that names a damaged one."""
    for file in sorted(folder.glob("*.safetensors")):
        shapes_in(file)


def shapes_in(file: Path) -> list[list[int]]:
    """The shape of each weight in a safetensors file, from its header. Raises ConfigError for a damaged one."""
    try:
        size = file.stat().st_size
        with file.open("rb") as content:
            head = content.read(max(_LENGTH.size, len(MAGIC)))
            if is_pointer(head):
                raise ConfigError(f"{file}: {REASON}")
            (length,) = _LENGTH.unpack(head[: _LENGTH.size])
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            content.seek(_LENGTH.size)
            header: dict[str, Any] = json.loads(content.read(length))
        weights = [entry for name, entry in header.items() if name != "__metadata__"]
        needed = _LENGTH.size + length + max((int(entry["data_offsets"][1]) for entry in weights), default=0)
        if size < needed:
            raise ValueError(f"{size} bytes, and its header promises {needed}")
        return [[int(side) for side in entry["shape"]] for entry in weights]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        check_host(error, str(file))
        raise ConfigError(f"{file}: not a safetensors file ({error}); download the model again") from error
