"""Codecs by name, imported on first use, and their files.

A codec file is one JSON object, `{"version": 1, "name": "vq", ...}`; nothing in it can execute.
"""

import importlib
import json
import secrets
from pathlib import Path
from typing import Any

from stoker_proto.actions.base import ActionCodec, Float32Array
from stoker_proto.actions.statistics import ActionStatistics
from stoker_proto.errors import ConfigError, DataError, located
from stoker_proto.hashing import canonical_json

CODECS: dict[str, str] = {
    "vq": "stoker_proto.actions.vq:VectorQuantizer",
    "bins": "stoker_proto.actions.bins:UniformBins",
    "fast": "stoker_proto.actions.fast:FastCodec",
}
"""name -> "module:Class"."""

CODEC_VERSION = 1
"""Version of the JSON that codecs write. Raise it when the same file would decode to other actions."""


def codec_class(name: str) -> type[ActionCodec]:
    """The class registered under `name`. Raises ConfigError."""
    if name not in CODECS:
        raise ConfigError(f"action codec {name!r} is unknown; there are {', '.join(sorted(CODECS))}")
    module, _, attribute = CODECS[name].partition(":")
    found: type[ActionCodec] = getattr(importlib.import_module(module), attribute)
    return found


def fit_codec(
    name: str, sample: Float32Array, statistics: ActionStatistics, *, chunk: int, **options: Any
) -> ActionCodec:
    """Fit the codec `name` to actions float32[M, D], or to chunks float32[M, chunk, D] if it `fits_chunks`.

    options: codebook_size, levels (vq); num_bins (bins); vocab_size, scale, min_frequency (fast).
    """
    try:
        return codec_class(name).fit(sample, statistics, chunk=chunk, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ConfigError(f"action codec {name!r}: {str(error).partition(') ')[2] or error}") from error


def codec_from_json(d: dict[str, Any]) -> ActionCodec:
    """The codec that any codec's `to_json` described. Raises DataError."""
    version = d.get("version")
    if version != CODEC_VERSION:
        raise DataError(
            f"an action codec of version {version}; this program reads version {CODEC_VERSION}: "
            "run loader-prepare again, or use the program that wrote it"
        )
    if d.get("name") not in CODECS:
        raise DataError(f"an action codec named {d.get('name')!r}; there are {', '.join(sorted(CODECS))}")
    try:
        return codec_class(d["name"]).from_json(d)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"a damaged action codec {d['name']!r} ({error!r}); run loader-prepare again") from error


def save_codec(codec: ActionCodec, path: str | Path) -> None:
    """Write the codec's canonical JSON. A concurrent reader sees either the old file or the whole new one."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    temporary.write_text(canonical_json(codec.to_json()) + "\n", encoding="ascii")
    temporary.replace(target)


def load_codec(path: str | Path) -> ActionCodec:
    """The codec that `save_codec` wrote. Raises DataError naming the file for another version or a damaged file."""
    with located(file=str(path)):
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"no action codec can be read here ({error.strerror}); run loader-prepare first") from error
        except ValueError as error:
            raise DataError(f"not the JSON of an action codec ({error}); run loader-prepare again") from error
        if not isinstance(document, dict):
            raise DataError("not the JSON of an action codec (no object at the top); run loader-prepare again")
        return codec_from_json(document)
