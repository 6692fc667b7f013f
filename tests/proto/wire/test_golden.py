"""The wire is pinned: every kind of message is, byte for byte, the frame that lies in proto/golden."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from stoker_proto import PROTOCOL_VERSION
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Message
from tests.proto.wire.make_golden import GOLDEN, MESSAGES

PROSE = (GOLDEN.parent / "PROTOCOL.md").read_text(encoding="utf-8")


def as_plain(message: Message) -> dict[str, object]:
    """Fields, arrays as lists, so that messages compare."""
    values = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def test_there_is_one_of_every_kind() -> None:
    assert {type(message) for message in MESSAGES.values()} == set(encoding.KINDS.values())
    assert {path.stem for path in GOLDEN.glob("*.bin")} == set(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_frame(name: str) -> None:
    frame = (GOLDEN / f"{name}.bin").read_bytes()
    assert encoding.encode(MESSAGES[name]) == frame
    decoded = encoding.decode(frame)
    assert type(decoded) is type(MESSAGES[name])
    assert as_plain(decoded) == as_plain(MESSAGES[name])


def test_a_frame_by_hand() -> None:
    assert (GOLDEN / "ping.bin").read_bytes() == b"I\x81\xa5nonce\x0b"
    assert (GOLDEN / "epoch.bin").read_bytes() == b"E\x83\xa5split\xa5train\xa5epoch\x03\xa7entries\x92\x00\x01"


def test_the_prose_names_every_kind_and_field_and_no_other() -> None:
    assert f"Version {PROTOCOL_VERSION}" in PROSE
    assert PROSE.count(f"| `protocol` | int | {PROTOCOL_VERSION} |") == 2, "HELLO and WELCOME state the version"
    for kind, cls in encoding.KINDS.items():
        section = re.search(rf"^### {cls.__name__.upper()} `{kind.decode()}`.*?(?=^##|\Z)", PROSE, re.M | re.S)
        assert section, f"PROTOCOL.md has no section `### {cls.__name__.upper()} `{kind.decode()}``"
        fields = re.findall(r"^\| `(\w+)` \|", section[0], re.M)
        expected = [field.name for field in dataclasses.fields(cls)]
        assert fields == expected + (["action_shape"] if cls.__name__ == "Piece" else []), cls.__name__


@pytest.mark.parametrize(("name", "value"), [
    ("MAX_FRAME_BYTES", encoding.MAX_FRAME_BYTES),
    ("MAX_CONTROL_BYTES", encoding.MAX_CONTROL_BYTES),
    ("MAX_QUESTION_BYTES", encoding.MAX_QUESTION_BYTES),
    ("MAX_ROWS", encoding.MAX_ROWS),
    ("MAX_SAMPLES", encoding.MAX_SAMPLES),
])  # fmt: skip
def test_the_prose_states_the_limits(name: str, value: int) -> None:
    assert f"| `{name}` | {value} |" in PROSE
