"""RLDS data sets as Open X-Embodiment publishes them: TFRecord files of whole episodes, read without TensorFlow.

    bridge/1.0.0/features.json, dataset_info.json, bridge-train.tfrecord-00000-of-00256, ...

One record is one episode, a tf.train.Example whose steps are flattened: "steps/observation/image" holds one encoded image
per step, "steps/action" T x D numbers, "steps/language_instruction" one text per step. features.json gives the shapes.
Source: tensorflow_datasets `core/features/dataset_feature.py`; https://github.com/google-research/rlds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from loader_service.convert.episode import Episode, EpisodeRef, camera_array
from loader_service.convert.example import Feature, parse_example
from loader_service.convert.images import decode_frames
from loader_service.convert.tfrecord import read_record, scan_records
from loader_service.shards import natural_key
from loader_service.sources.lfs import refuse_pointer
from stoker_proto.errors import ConfigError, DataError, located
from stoker_proto.host.trouble import check_host

_SHARD = re.compile(r"-(?P<split>[^-/]+)\.tfrecord(-(?P<index>\d{5})-of-(?P<count>\d{5}))?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class RLDS:
    """One split of data sets on disk."""

    inputs: tuple[str, ...]
    """Folders with features.json."""
    split: str = "train"
    image_keys: tuple[str, ...] = ("steps/observation/image",)
    """Cameras, in the order of the sample's images."""
    action_keys: tuple[str, ...] = ("steps/action",)
    """Several are put side by side."""
    instruction_key: str | None = "steps/language_instruction"
    """None: the episodes have none, a task id is given."""
    state_keys: tuple[str, ...] = ()
    """Several are put side by side; without any, no states are written."""
    task: str | None = None

    def episodes(self) -> list[EpisodeRef]:
        """Every record of every shard, by the framing alone."""
        short = [_short(key) for key in self.image_keys]
        if len(set(short)) < len(short):
            raise ConfigError(
                f"--image-key {','.join(self.image_keys)}: the last parts name the cameras, and two are the same"
            )
        self._check_alike()
        return [ref for folder in self.inputs for ref in self._of_folder(Path(folder).expanduser().resolve())]

    def read(self, ref: EpisodeRef) -> Episode:
        """One record."""
        path = Path(ref.file)
        shapes = _shapes(path.parent)
        with located(file=ref.file, record=ref.name):
            features = parse_example(read_record(path, ref.place))
            rgb, *others = [_images(features, key) for key in self.image_keys]
            names = [camera_array(_short(key)) for key in self.image_keys[1:]]
            return Episode(
                rgb=rgb,
                more_cameras=dict(zip(names, others, strict=True)),
                actions=_side_by_side(features, self.action_keys, len(rgb), shapes),
                states=_side_by_side(features, self.state_keys, len(rgb), shapes) if self.state_keys else None,
                task=self.task,
                instruction=self._instruction(features),
            )

    def identity(self) -> dict[str, Any]:
        """Keys and task."""
        identity = {
            "format": "rlds",
            "split": self.split,
            "image": ",".join(self.image_keys),
            "action": list(self.action_keys),
            "instruction": self.instruction_key,
            "task": self.task,
        }
        return {**identity, "state": list(self.state_keys)} if self.state_keys else identity

    def _check_alike(self) -> None:
        """Raises ConfigError for folders whose actions or states have other numbers."""
        folders = [Path(folder).expanduser().resolve() for folder in self.inputs]
        shapes = [_shapes(folder) for folder in folders]
        for folder, found in zip(folders[1:], shapes[1:], strict=True):
            for key in (*self.action_keys, *self.state_keys):
                if found.get(key) != shapes[0].get(key):
                    raise ConfigError(
                        f"{folder / 'features.json'}: {key} has {found.get(key)} numbers, and in {folders[0]} it has "
                        f"{shapes[0].get(key)}: convert each into a folder of its own"
                    )

    def _of_folder(self, folder: Path) -> list[EpisodeRef]:
        shapes = _shapes(folder)
        instruction = [self.instruction_key] if self.instruction_key else []
        for key in (*self.image_keys, *self.action_keys, *self.state_keys, *instruction):
            if key not in shapes:
                raise ConfigError(
                    f"{folder / 'features.json'}: there is no {key}; there are {', '.join(sorted(shapes))}"
                )
        for key in (*self.action_keys, *self.state_keys):
            if shapes[key] < 0:
                raise ConfigError(
                    f"{folder / 'features.json'}: {key} has a dimension of -1, so its numbers per step are not fixed: name a "
                    "feature of a fixed shape with --action-key or --state-key"
                )
        matches = [(match, file) for file in folder.iterdir() if (match := _SHARD.search(file.name))]
        shards = [file for match, file in matches if match["split"] == self.split]
        if not shards:
            splits = ", ".join(sorted({match["split"] for match, _ in matches})) or "none"
            raise ConfigError(
                f"{folder}: no file NAME-{self.split}.tfrecord-00000-of-00000; there are the splits {splits}"
            )
        counts = {match["count"] for match, file in matches if match["split"] == self.split}
        if counts != {None} and counts != {f"{len(shards):05d}"}:
            raise DataError(
                f"{len(shards)} files of the split {self.split}, which has {counts}: copy the others", file=str(folder)
            )
        shards.sort(key=lambda file: natural_key(file.name))
        promised = _promised(folder, self.split)
        per_file = promised if promised is not None and len(promised) == len(shards) else [None] * len(shards)
        found = [ref for shard, count in zip(shards, per_file, strict=True) for ref in _records(shard, count)]
        if promised is not None and sum(promised) != len(found) and all(ref.error is None for ref in found):
            raise DataError(
                f"{len(found)} records in the split {self.split}, and dataset_info.json promises {sum(promised)}: copy it again",
                file=str(folder),
            )
        return found

    def _instruction(self, features: Mapping[str, Feature]) -> str | None:
        """The episode's; it must be the same at every step."""
        if self.instruction_key is None:
            return None
        with located(field=self.instruction_key):
            texts = {bytes(value) for value in _feature(features, self.instruction_key).bytes_values()}
            if len(texts) != 1:
                shown = ", ".join(repr(text.decode("utf-8", "replace"))[:40] for text in sorted(texts)[:3])
                raise DataError(f"{len(texts)} different instructions in one episode ({shown}): one is expected")
            try:
                return texts.pop().decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError("an instruction that is not UTF-8") from error


def _records(shard: Path, promised: int | None) -> Iterator[EpisodeRef]:
    """Those that are whole; where the framing is damaged, what comes behind cannot be told apart and is one bad episode."""
    number = 0
    try:
        for offset, size in scan_records(shard):
            yield EpisodeRef(file=str(shard), name=f"record {number}", place=offset, size_bytes=size)
            number += 1
        if promised is not None and promised != number:
            raise DataError(
                f"{number} records, and dataset_info.json promises {promised}: copy it again", file=str(shard)
            )
    except DataError as error:
        yield EpisodeRef(file=str(shard), name=f"record {number}", size_bytes=0, error=error)


def _short(key: str) -> str:
    """steps/observation/wrist_image -> wrist_image."""
    return key.rpartition("/")[2]


def _images(features: Mapping[str, Feature], key: str) -> NDArray[np.uint8]:
    """uint8[F, H, W, 3]."""
    with located(field=key):
        encoded = _feature(features, key).bytes_values()
    return decode_frames(encoded, key)


def _feature(features: Mapping[str, Feature], key: str) -> Feature:
    if key not in features:
        raise DataError(f"no such feature; there are {', '.join(sorted(features))}", field=key)
    return features[key]


def _side_by_side(
    features: Mapping[str, Feature], keys: tuple[str, ...], num_steps: int, shapes: Mapping[str, int]
) -> NDArray[np.float32]:
    """float32[T, D] of features of d numbers each."""
    return np.concatenate([_steps(features, key, num_steps, shapes) for key in keys], axis=1)


def _steps(features: Mapping[str, Feature], key: str, num_steps: int, shapes: Mapping[str, int]) -> NDArray[np.float32]:
    """float32[T, d] of a feature."""
    with located(field=key):
        values = _feature(features, key).numbers()
        width = shapes[key]
        if len(values) != num_steps * width:
            raise DataError(f"{len(values)} numbers for {num_steps} steps: {width} each are expected")
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found by the episode's check
            return values.reshape(num_steps, width).astype(np.float32)


def _shapes(folder: Path) -> dict[str, int]:
    """Flattened key -> numbers per step, from features.json."""
    file = folder / "features.json"
    refuse_pointer(file)
    with located(file=str(file)):
        try:
            tree = orjson.loads(file.read_bytes())
        except OSError as error:
            raise DataError(
                f"it cannot be read ({error.strerror}): name the folder that holds the .tfrecord files"
            ) from error
        except ValueError as error:
            raise DataError(f"not JSON ({error})") from error
        found: dict[str, int] = {}
        try:
            _walk(tree, "", found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"a feature is not described as TFDS does ({type(error).__name__}: {error})") from error
        return found


def _walk(node: dict[str, Any], prefix: str, found: dict[str, int]) -> None:
    if "featuresDict" in node:
        for name, inner in node["featuresDict"]["features"].items():
            _walk(inner, f"{prefix}/{name}" if prefix else name, found)
    elif "sequence" in node:
        _walk(node["sequence"]["feature"], prefix, found)
    else:
        dimensions = node.get("tensor", {}).get("shape", {}).get("dimensions", [])
        lengths = [int(length) for length in dimensions]
        found[prefix] = -1 if min(lengths, default=1) < 0 else int(np.prod(lengths, dtype=np.int64))


def _promised(folder: Path, split: str) -> list[int] | None:
    """Records of each file of the split according to dataset_info.json; None where that is missing or says nothing."""
    try:
        tree = orjson.loads((folder / "dataset_info.json").read_bytes())
        lengths = next(one["shardLengths"] for one in tree["splits"] if one["name"] == split)
        return [int(length) for length in lengths]
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        check_host(error, str(folder / "dataset_info.json"))
        return None
