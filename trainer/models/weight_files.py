"""The weights in a base model's folder: are they whole, and are they all that the model needs?

transformers fills in random numbers for weights that it does not find, and says so in a table. A run that trained them would
begin from noise.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

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


def refuse_random(model: PreTrainedModel, report: Mapping[str, Collection[Any]], folder: str) -> None:
    """Raises ConfigError where the folder lacks weights of the model. report: `output_loading_info` of `from_pretrained`."""
    own = {name for name, _ in model.named_parameters()}
    missing = sorted(own.intersection(report["missing_keys"]))
    if not missing:
        return
    unknown = sorted(map(str, report["unexpected_keys"]))
    others = f"; it has {len(unknown)} that the model does not know, such as {unknown[0]}" if unknown else ""
    raise ConfigError(
        f"model.base_model_path is {folder!r}: it lacks {len(missing)} of the model's {len(own)} weights, such as {missing[0]}, "
        f"and they would begin at random{others}: name the folder of a whole model"
    )
