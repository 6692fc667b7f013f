"""Message <-> bytes: one kind byte, then one msgpack map. `proto/PROTOCOL.md` is the authority.

    b"T" + msgpack({"ticket": 7, "split": "train", "epoch": 0, "lane": 3, "start": 16, "count": 8, "rows": b""})

`decode` and `decode_question` trust nothing: they check sizes before they allocate memory for them, make no extension type or
object, and raise RemoteProtocolError for every fault. A loader uses `decode_question`: its work for a frame that it rejects is
bounded by the limits of the kinds that ranks send.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from stoker_proto.errors import LocalProtocolError, RemoteProtocolError
from stoker_proto.wire.messages import (
    Drain,
    Epoch,
    Failure,
    Hello,
    Lanes,
    Message,
    Piece,
    Ping,
    Pong,
    Refuse,
    Shards,
    Ticket,
    Welcome,
)
from stoker_proto.wire.peer_text import shown
from stoker_proto.wire.piece_images import UINT_BYTES, find_images

MAX_FRAME_BYTES = 256 << 20
"""Largest PIECE."""
MAX_CONTROL_BYTES = 16 << 20
"""Largest frame from a loader, other than a PIECE."""
MAX_QUESTION_BYTES = 1 << 20
"""Largest frame from a rank. The longest is a HELLO: 1 MiB holds the fingerprints of 11,000 entries."""
QUESTION_BYTES: dict[type[Any], int] = {Hello: MAX_QUESTION_BYTES, Epoch: 256 << 10, Ticket: 512, Ping: 64}
"""Largest frames from a rank, by kind."""
MAX_FINGERPRINTS = 16_384
"""Most fingerprints of one HELLO."""
MAX_ENTRIES = 1 << 16
"""Most entries of one EPOCH."""
MAX_ROWS = 1 << 16
"""Most rows of one piece or ticket."""
MAX_SAMPLES = 1 << 20
"""Most samples of one piece, whose rows may be packed."""
_TICKET = b"\xa6ticket"  # msgpack: the name of the first field of an answer to a ticket
_NUMBER_AT = 2 + len(_TICKET)  # behind the kind and the header of the map
_NO_IMAGES = b"\x90"  # msgpack: an empty array
_LARGE_BYTES = 1 << 20
"""A Piece from which on its images are not copied."""
_LARGEST_INT = (1 << 63) - 1
_MAX_ITEMS = 1 << 20  # of all msgpack arrays and maps of a frame together

KINDS: dict[bytes, type[Any]] = {
    b"H": Hello,
    b"W": Welcome,
    b"R": Refuse,
    b"E": Epoch,
    b"L": Lanes,
    b"T": Ticket,
    b"S": Shards,
    b"P": Piece,
    b"F": Failure,
    b"I": Ping,
    b"O": Pong,
    b"D": Drain,
}
_KIND_OF = {cls: kind for kind, cls in KINDS.items()}

_PIECE_DTYPES: dict[str, np.dtype[Any]] = {
    "keys": np.dtype("<i8"),
    "lengths": np.dtype("<i4"),
    "input_ids": np.dtype("<i4"),
    "supervised": np.dtype("<u1"),
    "image_counts": np.dtype("<u1"),
    "actions": np.dtype("<f4"),
    "row_samples": np.dtype("<u2"),
    "auxiliary": np.dtype("<f4"),
}


def encode(message: Message) -> bytes:
    """The frame of a message. Raises LocalProtocolError for a rank's message that is too long for a loader."""
    body = {name: getattr(message, name) for name, _, _ in _FIELDS[type(message)]}
    if isinstance(message, Piece):
        for name, dtype in _PIECE_DTYPES.items():
            body[name] = np.ascontiguousarray(body[name], dtype=dtype).tobytes()
        body["action_shape"] = list(message.actions.shape[1:])
    # A small number packs to its own byte: so kind and map share one buffer, which saves a copy of the piece.
    packer = msgpack.Packer(autoreset=False, use_bin_type=True, buf_size=_buffer_size(message))
    packer.pack(_KIND_OF[type(message)][0])
    packer.pack(body)
    frame: bytes = packer.bytes()
    limit = QUESTION_BYTES.get(type(message))
    if limit is not None and len(frame) > limit:
        raise LocalProtocolError(
            f"a {type(message).__name__} of {len(frame)} bytes: at most {limit} travel to a loader; name folders "
            "in the data paths rather than thousands of files"
        )
    return frame


def _buffer_size(message: Message) -> int:
    """About as many bytes as the frame needs. Too few cost a reallocation."""
    if not isinstance(message, Piece):
        return 4096
    return sum(map(len, message.images)) + message.actions.nbytes + 8 * message.input_ids.size + 4096


def decode(frame: bytes | memoryview) -> Message:
    """The message of a frame. Raises RemoteProtocolError where it is not one.

    The images of a large Piece are views into the frame, which lives as long as one of them.
    """
    view, cls = _open(frame)
    if cls in QUESTION_BYTES:
        return _question(view, cls)
    limit = MAX_FRAME_BYTES if cls is Piece else MAX_CONTROL_BYTES
    if len(view) > limit:
        raise RemoteProtocolError(f"a {cls.__name__} frame of {len(view)} bytes: at most {limit}")
    body = _piece_arrays(_unpack_piece(view[1:])) if cls is Piece else _unpack(view[1:], cls.__name__)
    message: Message = _build(cls, body)
    return message


def decode_question(frame: bytes | memoryview) -> Message:
    """The message of a frame from a rank; RemoteProtocolError for any other frame, of which only the first byte is read."""
    view, cls = _open(frame)
    if cls not in QUESTION_BYTES:
        raise RemoteProtocolError(f"{cls.__name__} is for ranks, not for loaders")
    return _question(view, cls)


def _open(frame: bytes | memoryview) -> tuple[memoryview, type[Any]]:
    view = memoryview(frame)
    if len(view) < 2:
        raise RemoteProtocolError(f"a frame of {len(view)} bytes: a kind byte and a msgpack map are expected")
    kind = bytes(view[:1])
    cls = KINDS.get(kind)
    if cls is None:
        raise RemoteProtocolError(f"a frame of kind {kind!r}: known are {b''.join(KINDS)!r}")
    return view, cls


def _question(view: memoryview, cls: type[Any]) -> Message:
    """A short question is parsed at once. Any other, and one that is wrong, is read field by field up to the first that is
    wrong, so that nothing inside an unknown field is ever parsed."""
    name, limit = cls.__name__, QUESTION_BYTES[cls]
    if len(view) > limit:
        raise RemoteProtocolError(f"a {name} frame of {len(view)} bytes: at most {limit}")
    short = _short_question(view, cls)
    if short is not None:
        return short
    size = len(view) - 1
    # A container within a value would be one too many: the limits of 0 reject it at its header.
    unpacker = msgpack.Unpacker(
        raw=False, read_size=size, max_buffer_size=size, max_array_len=0, max_map_len=0, max_ext_len=0
    )
    unpacker.feed(view[1:])
    try:
        body = _fields_of_question(unpacker, cls)
        end = unpacker.tell()
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise RemoteProtocolError(f"a {name} frame is not msgpack: {type(error).__name__}: {error}") from error
    if end != size:
        raise RemoteProtocolError(f"a {name} frame goes on for {size - end} bytes after its map")
    message: Message = _build(cls, body)
    return message


def _short_question(view: memoryview, cls: type[Any]) -> Message | None:
    """The message of a well-formed frame that has numbers, texts and bytes alone; else None.

    Such a frame has some hundred bytes at most, which bounds the work. Field by field it would take three times as long, and a
    loader reads one for each piece."""
    types = _SHORT_QUESTIONS.get(cls)
    if types is None:
        return None
    try:
        body = msgpack.unpackb(view[1:], max_array_len=0, max_map_len=len(types), max_ext_len=0)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException):
        return None
    if type(body) is not dict or {name: type(value) for name, value in body.items()} != types:
        return None
    if max([value for value in body.values() if type(value) is int]) > _LARGEST_INT:
        return None
    message: Message = cls(**body)
    return message


def _fields_of_question(unpacker: msgpack.Unpacker, cls: type[Any]) -> dict[str, Any]:
    kinds = {name: kind for name, kind, _ in _FIELDS[cls]}
    if (num_fields := unpacker.read_map_header()) != len(kinds):
        raise RemoteProtocolError(f"a {cls.__name__} frame has {num_fields} fields: {len(kinds)} are expected")
    body: dict[str, Any] = {}
    for _ in range(num_fields):
        name = unpacker.unpack()
        kind = kinds.get(name) if isinstance(name, str) else None
        if kind is None or name in body:
            raise RemoteProtocolError(f"a {cls.__name__} frame has an unknown or repeated field {shown(name)}")
        if kind == "dict[str, str]":
            count = _bounded(unpacker.read_map_header(), MAX_FINGERPRINTS, cls, name)
            body[name] = {unpacker.unpack(): unpacker.unpack() for _ in range(count)}
        elif kind == "list[int]":
            count = _bounded(unpacker.read_array_header(), MAX_ENTRIES, cls, name)
            body[name] = [unpacker.unpack() for _ in range(count)]
        else:
            body[name] = unpacker.unpack()
    return body


def _bounded(count: int, limit: int, cls: type[Any], name: str) -> int:
    if count > limit:
        raise RemoteProtocolError(f"{cls.__name__}.{name} has {count} items: at most {limit}")
    return count


class _Budget:
    """Stops unpacking after too many objects: a megabyte of empty maps would take 64 MB of memory."""

    def __init__(self) -> None:
        self.left = _MAX_ITEMS

    def __call__(self, container: Any) -> Any:
        self.left -= 1 + len(container)
        if self.left < 0:
            raise ValueError(f"more than {_MAX_ITEMS} items")
        return container


def _unpack(view: memoryview, name: str) -> dict[str, Any]:
    budget = _Budget()
    try:
        body = msgpack.unpackb(
            view,
            raw=False,
            strict_map_key=False,
            use_list=True,
            list_hook=budget,
            object_hook=budget,
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:  # TypeError: a map as the key of a map
        raise RemoteProtocolError(f"a {name} frame is not msgpack: {type(error).__name__}: {error}") from error
    if not isinstance(body, dict):
        raise RemoteProtocolError(f"a {name} frame holds a {type(body).__name__}: a map is expected")
    return body


def _unpack_piece(view: memoryview) -> dict[str, Any]:
    """The body of a Piece. The images of a large one are found by their headers and not copied; to copy small ones is cheaper."""
    found = find_images(view) if len(view) >= _LARGE_BYTES else None
    if found is None:
        return _unpack(view, Piece.__name__)
    begin, end, images = found
    body = _unpack(memoryview(b"".join((view[:begin], _NO_IMAGES, view[end:]))), Piece.__name__)
    if body.get("images") != []:
        raise RemoteProtocolError("a Piece frame has a repeated field images")
    body["images"] = images
    return body


def _piece_arrays(body: dict[str, Any]) -> dict[str, Any]:
    shape = body.pop("action_shape", None)
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 <= n <= 4096 for n in shape)):
        raise RemoteProtocolError(f"Piece.action_shape is {shape!r}: two whole numbers are expected")
    sizes = {}  # values of each array
    for name, dtype in _PIECE_DTYPES.items():
        data = body.get(name)
        if not isinstance(data, bytes) or len(data) % dtype.itemsize:
            raise RemoteProtocolError(f"Piece.{name} is not a whole number of {dtype.name} values")
        sizes[name] = len(data) // dtype.itemsize
    count = sizes["lengths"]
    lengths: NDArray[np.int32] = np.frombuffer(body["lengths"], _PIECE_DTYPES["lengths"])
    width = sizes["auxiliary"] // count if count else 0
    if width > 4096:
        raise RemoteProtocolError(f"Piece.auxiliary holds {width} values a sample: at most 4096")
    if count > MAX_SAMPLES or (count and int(lengths.min()) < 0):
        raise RemoteProtocolError(f"a Piece of {count} samples: at most {MAX_SAMPLES}, with lengths of at least 0")
    tokens = int(lengths.sum(dtype=np.int64))
    due = {
        "keys": 3 * count,
        "actions": count * math.prod(shape),
        "auxiliary": count * width,
        "input_ids": tokens,
        "supervised": tokens,
        "image_counts": count,
    }
    for name, size in due.items():
        if sizes[name] != size:
            raise RemoteProtocolError(f"Piece.{name} holds {sizes[name]} values: {size} are expected")
    for name, dtype in _PIECE_DTYPES.items():
        body[name] = np.frombuffer(body[name], dtype)
    body["keys"] = body["keys"].reshape(count, 3)
    body["actions"] = body["actions"].reshape(count, *shape)
    body["auxiliary"] = body["auxiliary"].reshape(count if width else 0, width)
    _check_rows(body["row_samples"], count)
    images = body.get("images")
    if not isinstance(images, list) or len(images) != int(body["image_counts"].sum(dtype=np.int64)):
        raise RemoteProtocolError("Piece.images does not hold as many images as Piece.image_counts says")
    return body


def _check_rows(row_samples: NDArray[np.uint16], num_samples: int) -> None:
    """row_samples: uint16[N], or [0] where each sample is a row. Raises RemoteProtocolError."""
    num_rows = len(row_samples) or num_samples
    if num_rows > MAX_ROWS or (len(row_samples) and int(row_samples.min()) < 1):
        raise RemoteProtocolError(f"a Piece of {num_rows} rows: at most {MAX_ROWS}, each of at least one sample")
    if len(row_samples) and int(row_samples.sum(dtype=np.int64)) != num_samples:
        raise RemoteProtocolError(f"Piece.row_samples does not add up to the {num_samples} samples of Piece.lengths")


def _build(cls: type[Any], body: dict[str, Any]) -> Any:
    names = _NAMES[cls]
    if body.keys() != names:
        odd = ", ".join(shown(name) for name in heapq.nsmallest(8, body.keys() ^ names, key=str))
        raise RemoteProtocolError(f"a {cls.__name__} frame has missing or unknown fields: {odd}")
    for name, kind, check in _FIELDS[cls]:
        if not check(body[name]):
            raise RemoteProtocolError(f"{cls.__name__}.{name} is {shown(body[name])}: {kind} is expected")
    return cls(**body)


def _is_int(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value <= _LARGEST_INT


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_missing(value: Any) -> bool:
    """One row of `Welcome.missing`."""
    kinds = (_is_int, _is_int, _is_int, _is_int, _is_str, _is_str)
    return isinstance(value, list) and len(value) == len(kinds) and all(map(lambda f, v: f(v), kinds, value))


def _is_map(value: Any, key: Any, item: Any) -> bool:
    return isinstance(value, dict) and all(key(k) and item(v) for k, v in value.items())


def _is_list(value: Any, item: Any) -> bool:
    return isinstance(value, list) and all(item(v) for v in value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "int": _is_int,
    "str": _is_str,
    "dict[str, str]": lambda value: _is_map(value, _is_str, _is_str),
    "dict[str, int]": lambda value: _is_map(value, _is_str, _is_int),
    "dict[int, str]": lambda value: _is_map(value, _is_int, _is_str),
    "dict[str, float]": lambda value: _is_map(value, _is_str, lambda v: type(v) in (int, float)),
    "dict[str, list[int]]": lambda value: _is_map(value, _is_str, lambda v: _is_list(v, _is_int)),
    "dict[str, list[list[int | str]]]": lambda value: _is_map(value, _is_str, lambda v: _is_list(v, _is_missing)),
    "dict[int, int]": lambda value: _is_map(value, _is_int, _is_int),
    "list[int]": lambda value: _is_list(value, _is_int),
    "dict[int, list[int]]": lambda value: _is_map(value, _is_int, lambda v: _is_list(v, _is_int)),
    "list[list[str]]": lambda value: _is_list(value, lambda v: _is_list(v, _is_str)),
    "bytes": lambda value: isinstance(value, bytes),
    "list[bytes | memoryview]": lambda value: isinstance(value, list) and set(map(type, value)) <= {bytes, memoryview},
    "NDArray[np.int64]": lambda value: isinstance(value, np.ndarray),
    "NDArray[np.int32]": lambda value: isinstance(value, np.ndarray),
    "NDArray[np.uint8]": lambda value: isinstance(value, np.ndarray),
    "NDArray[np.uint16]": lambda value: isinstance(value, np.ndarray),
    "NDArray[np.float32]": lambda value: isinstance(value, np.ndarray),
}

_FIELDS: dict[type[Any], list[tuple[str, str, Callable[[Any], bool]]]] = {
    cls: [(item.name, str(item.type), _CHECKS[str(item.type)]) for item in fields(cls)] for cls in KINDS.values()
}
"""Name, type and check of each message's fields, looked up once."""
_NAMES = {cls: frozenset(name for name, _, _ in of_class) for cls, of_class in _FIELDS.items()}
_SHORT_QUESTIONS: dict[type[Any], dict[str, type[Any]]] = {
    cls: {name: {"int": int, "str": str, "bytes": bytes}[kind] for name, kind, _ in _FIELDS[cls]}
    for cls in (Ticket, Ping)
}
"""Name -> type of the fields."""


def peek_ticket(frame: bytes | memoryview) -> int:
    """The ticket number of a PIECE, SHARDS or FAILURE frame that our own code encoded, without decoding the rest."""
    head = bytes(frame[: _NUMBER_AT + 9])
    if head[2:_NUMBER_AT] != _TICKET:
        raise RemoteProtocolError("a frame that does not begin with its ticket")
    kind = head[_NUMBER_AT]
    if kind < 0x80:
        return kind
    size = UINT_BYTES.get(kind, 0)
    if size:
        return int.from_bytes(head[_NUMBER_AT + 1 : _NUMBER_AT + 1 + size])
    unpacker = msgpack.Unpacker()
    unpacker.feed(head[_NUMBER_AT:])
    return int(unpacker.unpack())
