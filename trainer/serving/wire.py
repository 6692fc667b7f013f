"""Messages of a policy's clients <-> bytes. One WebSocket frame is one msgpack map.

Two protocols, which the server tells apart by the first message of the client:

    openpi      on connect: server sends its metadata; then {observation} -> {"actions": float32[k, D], ...}
                arrays {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [k, D]}, keys are bytes
                (Physical-Intelligence/openpi: packages/openpi-client, src/openpi/serving/websocket_policy_server.py)
    vla-eval    client sends {"type": "hello", "payload": {...}, "seq": 1, "timestamp": 1e9}, and is answered by one; then
                "observation" -> "action"; the same array form with text keys, and pictures as {"__image__": True,
                "format": "png", "data": bytes, "shape": [H, W, 3]}
                (allenai/vla-evaluation-harness: src/vla_eval/protocol)

An array is checked before memory is taken for it: its bytes must be those of its shape, and its numbers plain ones.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stoker_proto.errors import RemoteProtocolError

MAX_DIMENSIONS = 6
MAX_SIDE = 8192
"""Pixels of an encoded picture's longer side: a PNG of few bytes may else unpack to gigabytes."""
VLA_EVAL_VERSION = 1
"""`PROTOCOL_VERSION` of vla-eval."""
_PLAIN_NUMBERS = "biuf"


def decode(data: bytes) -> dict[str, Any]:
    """The map in a frame, with its arrays. Raises RemoteProtocolError for anything else."""
    try:
        tree = msgpack.unpackb(data, object_hook=_revive)
    except RemoteProtocolError:
        raise
    except Exception as error:
        raise RemoteProtocolError(
            f"{len(data)} bytes that are not msgpack ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise RemoteProtocolError(f"a {type(tree).__name__}: a map with text keys is expected")
    return tree


def encode(message: Mapping[str, Any], *, vla_eval: bool = False) -> bytes:
    """The frame of a map with numpy arrays in it, in the form that the client's protocol has for arrays."""

    def replace(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            raise TypeError(f"a {type(value).__name__} cannot be sent")
        parts = {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
        return parts if vla_eval else {name.encode(): part for name, part in parts.items()}

    packed: bytes = msgpack.packb(dict(message), default=replace)
    return packed


def envelope(kind: str, payload: Mapping[str, Any], seq: int) -> dict[str, Any]:
    """A message of vla-eval."""
    return {"type": kind, "payload": dict(payload), "seq": seq, "timestamp": time.time()}


def is_envelope(message: Mapping[str, Any]) -> bool:
    """Whether a client's message is one of vla-eval."""
    return {"type", "payload", "seq"} <= message.keys() and isinstance(message["type"], str)


def _revive(tree: dict[Any, Any]) -> Any:
    """An array, a number or a picture instead of the map that stands for it. Raises RemoteProtocolError."""
    named = {key.decode("ascii", "replace") if isinstance(key, bytes) else key: value for key, value in tree.items()}
    try:
        if named.get("__ndarray__"):
            return _array(named["data"], named["dtype"], named["shape"])
        if named.get("__npgeneric__"):
            return _array(np.asarray(named["data"], _kind(named["dtype"])).tobytes(), named["dtype"], []).item()
        if named.get("__image__"):
            return _picture(named)
    except RemoteProtocolError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RemoteProtocolError(f"an array that cannot be read ({type(error).__name__}: {error})") from error
    return tree


def _kind(name: Any) -> np.dtype[Any]:
    kind: np.dtype[Any] = np.dtype(name)
    if kind.kind not in _PLAIN_NUMBERS:
        raise RemoteProtocolError(f"an array of dtype {name!r}: booleans, integers and floats are expected")
    return kind


def _array(data: bytes, dtype: Any, shape: Any) -> NDArray[Any]:
    kind, sides = _kind(dtype), [int(side) for side in shape]
    if len(sides) > MAX_DIMENSIONS or min(sides, default=0) < 0 or math.prod(sides) * kind.itemsize != len(data):
        raise RemoteProtocolError(
            f"an array of shape {sides} and dtype {dtype!r} in {len(data)} bytes: they do not fit together"
        )
    return np.frombuffer(data, kind).reshape(sides)


def _picture(named: Mapping[str, Any]) -> NDArray[Any]:
    if named["format"] == "raw":
        return _array(named["data"], named["dtype"], named["shape"])
    try:
        with Image.open(io.BytesIO(named["data"]), formats=("PNG", "JPEG")) as picture:
            if max(picture.size) > MAX_SIDE:
                raise RemoteProtocolError(f"a picture of {picture.size} pixels: at most {MAX_SIDE} a side are read")
            return np.array(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise RemoteProtocolError(f"a picture that cannot be read ({error})") from error
