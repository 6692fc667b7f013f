"""One connection without a socket: literal messages of openpi's and vla-eval's clients, and hostile ones."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import pytest
from PIL import Image

from stoker_proto.errors import ConfigError, RemoteProtocolError
from trainer.policy_io import PolicyError, PolicyInput, Prediction
from trainer.serving.observations import ObservationReader
from trainer.serving.session import Session
from trainer.serving.wire import decode, encode

FRAME = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
METADATA = {"action_dim": 2, "num_images": [1, 1]}


class Recorder:
    """Predicts chunks of three actions [n, 0.5], n counting all actions; keeps what it was told."""

    chunk = 3

    def __init__(self) -> None:
        self.inputs: list[PolicyInput] = []

    def predict(self, inputs: Sequence[PolicyInput]) -> list[Prediction]:
        [one] = inputs
        if one.instruction == "nan":
            raise PolicyError("its weights are damaged")
        first = 3 * len(self.inputs)
        self.inputs.append(one)
        actions = np.array([[first + k, 0.5] for k in range(3)], np.float32)
        return [Prediction(actions=actions, ids=np.zeros(6, np.int64), outside_mass=0.25)]


def session(policy: Recorder, execute: int | None = None, **reader: Any) -> Session:
    return Session(policy, ObservationReader(**reader), METADATA, execute)


def openpi(observation: dict[str, Any]) -> bytes:
    """As `openpi_client.msgpack_numpy.packb` writes it."""

    def pack(value: Any) -> Any:
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }

    packed: bytes = msgpack.packb(observation, default=pack)
    return packed


def vla_eval(kind: str, payload: dict[str, Any], seq: int) -> bytes:
    """As `vla_eval.protocol.messages.pack_message` writes it: pictures are PNG."""

    def pack(value: Any) -> Any:
        if value.dtype == np.uint8:
            png = io.BytesIO()
            Image.fromarray(value).save(png, format="PNG")
            return {"__image__": True, "format": "png", "data": png.getvalue(), "shape": list(value.shape)}
        return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}

    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": 1_764_000_000.5}
    packed: bytes = msgpack.packb(message, default=pack, use_bin_type=True)
    return packed


def test_an_observation_of_openpi_and_its_answer() -> None:
    policy = Recorder()
    client = session(policy, execute=2)
    observation = {"observation/image": FRAME, "observation/state": np.zeros(8), "prompt": "push the cube"}
    reply = client.answer(openpi(observation))
    assert reply is not None
    assert not reply.closes
    assert isinstance(reply.frame, bytes)
    answer = msgpack.unpackb(reply.frame)
    assert answer["actions"] == {
        b"__ndarray__": True,
        b"data": struct.pack("<4f", 0, 0.5, 1, 0.5),
        b"dtype": "<f4",
        b"shape": [2, 2],
    }
    assert answer["outside_mass"] == 0.25
    assert set(answer["server_timing"]) == {"infer_ms"}
    [one] = policy.inputs
    np.testing.assert_array_equal(one.images[0], FRAME)
    assert (one.instruction, one.state) == ("push the cube", None), "a state that the model does not know is not used"
    second = client.answer(openpi(observation))
    assert second is not None
    assert set(decode(second.frame)["server_timing"]) == {"infer_ms", "prev_total_ms"}  # type: ignore[arg-type]


def test_an_episode_of_vla_eval() -> None:
    """One action for each observation; two of three are executed, and a new episode begins with a look."""
    policy = Recorder()
    client = session(policy, execute=2)
    observation = {"images": {"base_camera": FRAME}, "task_description": "push", "states": np.zeros(9, np.float32)}
    assert client.answer(vla_eval("hello", {"harness_version": "0.8.0", "protocol_version": 1}, 1)) is None
    actions = []
    for seq, kind in enumerate(
        ("episode_start", *["observation"] * 3, "episode_end", "episode_start", "observation"), 2
    ):
        reply = client.answer(vla_eval(kind, observation if kind == "observation" else {}, seq))
        assert (reply is None) == (kind != "observation")
        if reply is None:
            continue
        assert isinstance(reply.frame, bytes)
        answer = msgpack.unpackb(reply.frame)
        assert (answer["type"], answer["seq"]) == ("action", seq)
        action = answer["payload"]["actions"]
        assert (action["dtype"], action["shape"]) == ("<f4", [2])
        actions.append(struct.unpack("<2f", action["data"]))
    assert actions == [(0, 0.5), (1, 0.5), (3, 0.5), (6, 0.5)]
    np.testing.assert_array_equal(policy.inputs[0].images[0], FRAME)


def test_the_greeting_is_metadata_for_openpi_and_a_hello_for_vla_eval() -> None:
    greeting = msgpack.unpackb(session(Recorder()).greeting())
    assert (greeting["action_dim"], greeting["num_images"]) == (2, [1, 1])
    assert greeting["type"] == "hello"
    assert {"type", "payload", "seq", "timestamp"} <= set(greeting)
    assert greeting["payload"]["protocol_version"] == 1


def test_errors_in_the_form_of_each_protocol() -> None:
    client = session(Recorder())
    reply = client.answer(openpi({"observation/image": FRAME, "prompt": "nan"}))
    assert reply is not None
    assert (reply.frame, reply.closes) == ("its weights are damaged", True)
    reply = client.answer(vla_eval("observation", {"images": {"a": FRAME}, "task_description": "nan"}, 7))
    assert reply is not None
    assert not reply.closes
    answer = decode(reply.frame)  # type: ignore[arg-type]
    assert (answer["type"], answer["seq"], answer["payload"]) == ("error", 7, {"error": "its weights are damaged"})
    reply = client.answer(vla_eval("dance", {}, 8))
    assert reply is not None
    assert b"a message of type 'dance'" in reply.frame  # type: ignore[operator]


def test_more_actions_than_a_chunk_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="the model predicts chunks of 3"):
        session(Recorder(), execute=4)


def test_pictures_and_states_by_name() -> None:
    policy = Recorder()
    depth = np.full((2, 4), 700, np.uint16)
    observation = {
        "observation": {"wrist": FRAME, "base": FRAME[:1].transpose(2, 0, 1), "depth": depth, "joints": [1, 2]},
        "prompt": "push",
    }
    names = ("observation/base", "observation/depth")
    client = session(policy, images=names, state="observation/joints", needs_state=True)
    assert client.answer(openpi(observation)) is not None
    [one] = policy.inputs
    np.testing.assert_array_equal(one.images[0], FRAME[:1])
    np.testing.assert_array_equal(one.images[1], depth)
    assert one.state is not None
    assert one.state.tolist() == [1, 2]
    assert one.state.dtype == np.float32
    client = session(policy)
    client.answer(openpi({"images": [FRAME, FRAME[:1]], "prompt": "push"}))
    assert [picture.shape for picture in policy.inputs[1].images] == [(2, 4, 3), (1, 4, 3)]


@pytest.mark.parametrize(
    ("reader", "observation", "message"),
    [
        ({}, {"image": FRAME}, "no instruction: send a text as prompt or task_description or instruction; "),
        ({}, {"image": FRAME, "prompt": 3}, "no instruction"),
        ({"images": ("wrist",)}, {"base": FRAME, "prompt": "p"}, "no wrist; the observation has base, prompt"),
        ({"images": ("base",)}, {"base": FRAME.astype(float), "prompt": "p"}, "base is float64[2, 4, 3]: a picture is uint8"),
        ({"images": ("base",)}, {"base": FRAME[:, :, :2], "prompt": "p"}, "a picture has three colours"),
        ({"needs_state": True}, {"prompt": "p"}, "no state, with which the model was trained: send it as observation/state"),
        ({"needs_state": True}, {"prompt": "p", "state": "x"}, "state is not numeric: numbers are expected"),
        ({"measurements": ("tcp_pose",)}, {"prompt": "p", "hand": 1}, "no tcp_pose float32[7]: the model was trained with "
         "pictures around the hand; send it as tcp_pose or observation/tcp_pose"),
        ({"measurements": ("extrinsic_cv",)}, {"prompt": "p", "states": {"extrinsic_cv": np.zeros(16)}},
         "states/extrinsic_cv has shape [16]: float32[3, 4] is expected"),
    ],
)  # fmt: skip
def test_observations_that_cannot_be_read(reader: Any, observation: dict[str, Any], message: str) -> None:
    reply = session(Recorder(), **reader).answer(openpi(observation))
    assert reply is not None
    assert reply.closes
    assert isinstance(reply.frame, str)
    assert message in reply.frame


def wide_png() -> bytes:
    """A PNG of a few bytes that says it has 10,000 x 1,000 pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 1_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def array(data: bytes, dtype: str, shape: list[int]) -> dict[str, Any]:
    return {"a": {"__ndarray__": True, "data": data, "dtype": dtype, "shape": shape}}


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "0 bytes that are not msgpack"),
        (b"\xc1", "1 bytes that are not msgpack"),
        (b"\x93\x01", "2 bytes that are not msgpack"),
        (msgpack.packb([1]), "a list: a map with text keys is expected"),
        (msgpack.packb({b"a": 1}), "a map with text keys is expected"),
        (b"\x81\xa1a" + b"\x91" * 5000 + b"\x00", "that are not msgpack"),
        (msgpack.packb(array(b"abc", "<f4", [1])), "in 3 bytes: they do not fit together"),
        (msgpack.packb(array(b"", "<f4", [1 << 40, 1 << 40])), "they do not fit together"),
        (msgpack.packb(array(b"abcd", "<f4", [-1, -1])), "they do not fit together"),
        (msgpack.packb(array(b"abcdefgh", "|O", [1])), "booleans, integers and floats are expected"),
        (msgpack.packb(array(b"abcd", "nonsense", [1])), "an array that cannot be read"),
        (msgpack.packb({"a": {"__ndarray__": True}}), "an array that cannot be read"),
        (msgpack.packb({"a": {"__image__": True, "format": "png", "data": b"GIF89a"}}), "a picture that cannot be read"),
        (msgpack.packb({"a": {"__image__": True, "format": "png", "data": wide_png()}}), "at most 8192 a side"),
    ],
)  # fmt: skip
def test_hostile_frames_end_in_one_error(frame: bytes, message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message.replace("[", r"\[")):
        decode(frame)
    reply = session(Recorder()).answer(frame)
    assert reply is not None
    assert reply.closes


def test_numbers_survive_both_ways() -> None:
    number = {"__npgeneric__": True, "data": 1.5, "dtype": "<f4"}
    assert decode(msgpack.packb({"x": number}))["x"] == 1.5
    for vla_eval_form in (False, True):
        found = decode(encode({"a": FRAME}, vla_eval=vla_eval_form))["a"]
        np.testing.assert_array_equal(found, FRAME)
