"""Small inputs of every format, written as their own programs write them, and what `mani_openpi` reads of the outcome."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import crc32c
import h5py
import numpy as np
from PIL import Image

from loader_service.sources.base import Sample
from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto.config import ActionConfig, DataConfig


@dataclass(frozen=True)
class Recorded:
    """One episode as it was recorded."""

    frames: np.ndarray  # uint8[F, H, W, 3]
    actions: np.ndarray  # float32[T, 7]
    instruction: str


def record(length: int, seed: int, *, extra: int = 0, size: tuple[int, int] = (12, 16)) -> Recorded:
    """Random ones; `extra` frames more than actions."""
    random = np.random.default_rng(seed)
    frames = random.integers(0, 256, (length + extra, *size, 3), dtype=np.uint8)
    return Recorded(frames, random.uniform(-1, 1, (length, 7)).astype(np.float32), f"put cube {seed} on the plate")


def read_all(jsonl: Path, *, depth: bool = False, state: Literal["none", "text"] = "none") -> list[list[Sample]]:
    """The samples of every record, through the dataset that trains on them."""
    from stoker_proto.config import ImageConfig

    config = DataConfig(
        dataset_type="mani_openpi",
        train_data_paths=(str(jsonl),),
        max_seq_len=64,
        action=ActionConfig(),
        image=ImageConfig(depth=depth),
        state=state,
    )
    dataset = ManiOpenPIDataset(config)
    return [list(dataset.read(jsonl, found.offset, found.size)) for found in dataset.scan(jsonl)]


def assert_same(found: Sequence[Sample], expected: Recorded, instruction: str | None = None) -> None:
    """Frames, actions and instruction, to the bit."""
    assert len(found) == len(expected.actions)
    for t, sample in enumerate(found):
        np.testing.assert_array_equal(sample.images[0], expected.frames[t])
        assert sample.action is not None
        assert sample.action.tobytes() == expected.actions[t].tobytes()
        assert sample.instruction == (instruction or expected.instruction)


def encode(frame: np.ndarray, kind: str) -> bytes:
    """JPEG or PNG."""
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return stream.getvalue()


def write_rl4vla(path: Path, episode: Recorded, images: Any = None, **keys: Any) -> Path:
    """As RL4VLA's collector: PIL images, `np.savez_compressed(path, dict)` or `np.save`."""
    tree = {
        "is_image_encode": False,
        "image": [Image.fromarray(frame) for frame in episode.frames] if images is None else images,
        "instruction": episode.instruction,
        "action": list(episode.actions),
        "info": [{"success": np.bool_(True), "step": np.int64(3)} for _ in episode.actions],
        **keys,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    box = np.array(tree, dtype=object)
    np.save(path, box, allow_pickle=True) if path.suffix == ".npy" else np.savez_compressed(path, box)
    return path


def write_maniskill(path: Path, episodes: Sequence[Recorded], success: Sequence[bool], **changes: Any) -> Path:
    """trajectory.h5 and trajectory.json; every episode has T + 1 frames of the camera base_camera, and depth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = []
    with h5py.File(path, "w") as file:
        for number, (episode, good) in enumerate(zip(episodes, success, strict=True)):
            group = file.create_group(f"traj_{number}")
            group["actions"] = episode.actions
            for name, values in changes.get("agent", {}).items():
                group[f"obs/agent/{name}"] = values[number]
            for name in changes.get("cameras", ["base_camera"]):
                camera = group.create_group(f"obs/sensor_data/{name}")
                camera.create_dataset("rgb", data=episode.frames, compression="gzip")
                camera["depth"] = episode.frames[..., :1].astype(np.int16) * 7
            described.append(
                {
                    "episode_id": number,
                    "episode_seed": number,
                    "control_mode": "pd_ee_delta_pose",
                    "elapsed_steps": len(episode.actions) + changes.get("off_by", 0),
                    "reset_kwargs": {"seed": number},
                    "success": good,
                }
            )
    tree = {"env_info": {"env_id": "PushCube-v1", "env_kwargs": {}}, "episodes": described}
    path.with_suffix(".json").write_text(json.dumps(tree))
    return path


def varint(value: int) -> bytes:
    """Protocol buffers' whole number."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(number: int, content: bytes) -> bytes:
    """A field that holds bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values: Any) -> bytes:
    """A tf.train.Feature of bytes, floats (packed) or whole numbers (packed), by the type of the values."""
    if isinstance(values, np.ndarray):
        return message(2, message(1, values.astype("<f4").tobytes()))
    if values and isinstance(values[0], int):
        return message(3, message(1, b"".join(map(varint, values))))
    return message(1, b"".join(message(1, value) for value in values))


def example(features: Mapping[str, Any]) -> bytes:
    """A tf.train.Example."""
    entries = [message(1, message(1, name.encode()) + message(2, feature(v))) for name, v in features.items()]
    return message(1, b"".join(entries))


def frame_record(data: bytes) -> bytes:
    """A record as TFRecordWriter writes it."""

    def masked(part: bytes) -> bytes:
        crc = crc32c.crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def rlds_features(episode: Recorded, kind: str = "PNG") -> dict[str, Any]:
    """The flattened steps of an episode."""
    steps = len(episode.actions)
    return {
        "steps/observation/image": [encode(frame, kind) for frame in episode.frames],
        "steps/action": episode.actions.reshape(-1),
        "steps/language_instruction": [episode.instruction.encode()] * steps,
        "steps/is_first": [1] + [0] * (steps - 1),
        "episode_metadata/file_path": [b"/somewhere"],
    }


def tensor(*dimensions: int) -> dict[str, Any]:
    """As features.json describes numbers."""
    return {
        "pythonClassName": "Tensor",
        "tensor": {"shape": {"dimensions": [str(d) for d in dimensions]}, "dtype": "float32"},
    }


def write_rlds(folder: Path, shards: Sequence[Sequence[bytes]], **changes: Any) -> Path:
    """features.json, dataset_info.json, one TFRecord file per shard."""
    folder.mkdir(parents=True, exist_ok=True)
    image = {"pythonClassName": "Image", "image": {"shape": {"dimensions": ["12", "16", "3"]}, "encodingFormat": "png"}}
    text = {"pythonClassName": "Text", "text": {}}
    steps = {
        "observation": {"featuresDict": {"features": {"image": image}}},
        "action": tensor(7),
        "language_instruction": text,
        "is_first": tensor(),
        **changes.get("steps", {}),
    }
    metadata = {"featuresDict": {"features": {"file_path": text}}}
    dataset = {"sequence": {"feature": {"featuresDict": {"features": steps}}}}
    (folder / "features.json").write_text(
        json.dumps({"featuresDict": {"features": {"steps": dataset, "episode_metadata": metadata}}})
    )
    lengths = changes.get("lengths", [str(len(shard)) for shard in shards])
    (folder / "dataset_info.json").write_text(json.dumps({"splits": [{"name": "train", "shardLengths": lengths}]}))
    for number, shard in enumerate(shards):
        name = f"tiny-train.tfrecord-{number:05d}-of-{len(shards):05d}"
        (folder / name).write_bytes(b"".join(map(frame_record, shard)))
    return folder
