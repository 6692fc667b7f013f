"""`meta/info.json`: the version of the format, the frame rate, the features, and where the files lie.

    {"codebase_version": "v3.0", "fps": 5, "chunks_size": 1000,
     "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
     "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
     "features": {"action": {"dtype": "float32", "shape": [7]},
                  "observation.images.wrist": {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channels"]}}}

In v2.1 every episode is a file: `{episode_chunk}` and `{episode_index}` stand in the templates, chunk = index // chunks_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from loader_service.sources.lerobot.template import PathTemplate
from loader_service.sources.lfs import refuse_pointer
from stoker_proto.errors import DataError, located
from stoker_proto.host.trouble import check_host

INFO_PATH = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
"""v2.0 lies on disk as v2.1 does, but for statistics that are not read."""
_NUMBERS = {
    *("float16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
}
_CAMERAS = {"image", "video"}
_KNOWN = _NUMBERS | _CAMERAS | {"bool", "string"}
_MAX_PIXELS = 1 << 26


@dataclass(frozen=True, slots=True)
class Feature:
    """One column, or one camera."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    is_depth: bool = False
    """Of a camera: its frames are distances, written as grey or coded as colours."""
    problem: str = ""
    """Why the feature cannot be read; empty for a feature that can."""

    @property
    def looks_like_a_camera(self) -> bool:
        """Whether its name or its shape is that of a camera, whatever its dtype is."""
        return self.key.startswith("observation.image") or (len(self.shape) == 3 and 3 in self.shape)

    @property
    def is_camera(self) -> bool:
        """Whether its frames are images."""
        return self.dtype in _CAMERAS

    def size(self) -> tuple[int, int]:
        """Height and width of a camera's frames in pixels. Raises DataError unless they are RGB, for depth too."""
        if self.is_depth:
            raise DataError(
                "a depth camera (is_depth_map): its frames are distances, and would be read as colours; leave it out of "
                "data.options.image_keys",
                field=f"features[{self.key}]",
            )
        names = [name.rstrip("s") for name in self.names]
        if len(self.shape) == 3:
            first = names[0] == "channel" if len(names) == 3 else self.shape[0] == 3 and self.shape[2] != 3
            height, width, channels = (*self.shape[1:], self.shape[0]) if first else self.shape
            if channels == 3 and 0 < height * width <= _MAX_PIXELS:
                return height, width
        raise DataError(
            f"shape {list(self.shape)}: height, width and 3 channels are expected of a camera; leave it out of "
            "data.options.image_keys",
            field=f"features[{self.key}].shape",
        )

    def dim(self) -> int:
        """Numbers in a vector. Raises DataError unless it is one."""
        if self.dtype not in _NUMBERS | {"bool"} or len(self.shape) != 1 or self.shape[0] < 1:
            raise DataError(
                f"dtype {self.dtype} of shape {list(self.shape)}: a vector of numbers is expected",
                field=f"features[{self.key}]",
            )
        return self.shape[0]


@dataclass(frozen=True, slots=True)
class Info:
    """What info.json says."""

    root: Path
    version: str
    fps: float
    features: dict[str, Feature]
    data_template: PathTemplate
    video_template: PathTemplate | None
    chunks_size: int
    tree: dict[str, Any]
    """All of it, as it was read."""

    @property
    def file(self) -> str:
        """Its path, for messages."""
        return str(self.root / INFO_PATH)

    @property
    def is_v3(self) -> bool:
        """Whether files hold several episodes."""
        return self.version == "v3.0"

    def data_file(self, chunk: int, number: int) -> str:
        """Path, relative to the root, of a data parquet. In v2.1 the number is the episode's."""
        return self.data_template.fill(**self._numbers(chunk, number))

    def video_file(self, key: str, chunk: int, number: int) -> str:
        """The same for a camera's mp4. Raises DataError where info.json names none."""
        if self.video_template is None:
            raise DataError("null, and the data set has video features", file=self.file, field="video_path")
        return self.video_template.fill(video_key=key, **self._numbers(chunk, number))

    def _numbers(self, chunk: int, number: int) -> dict[str, int]:
        if self.is_v3:
            return {"chunk_index": chunk, "file_index": number}
        return {"episode_chunk": chunk, "episode_index": number}


def load_info(root: Path) -> Info:
    """Raises DataError naming info.json and the key."""
    file = root / INFO_PATH
    with located(file=str(file)):
        try:
            tree = orjson.loads(file.read_bytes())
        except OSError as error:
            check_host(error, str(file))
            raise DataError(f"it cannot be read ({error.strerror})") from error
        except ValueError as error:
            refuse_pointer(file)
            raise DataError(f"unreadable JSON ({error})") from error
        if not isinstance(tree, dict):
            raise DataError(f"a JSON object is expected, not {type(tree).__name__}")
        return _parse(root, tree)


def _parse(root: Path, tree: dict[str, Any]) -> Info:
    version = tree.get("codebase_version")
    if version not in VERSIONS:
        raise DataError(
            f"{version!r}: {', '.join(VERSIONS)} are read; convert the data set with lerobot's own scripts",
            field="codebase_version",
        )
    is_v3 = version == "v3.0"
    _check_layout(root, version, tree)
    numbers = {"chunk_index", "file_index"} if is_v3 else {"episode_chunk", "episode_index"}
    with located(field="data_path"):
        data = PathTemplate.parse(tree.get("data_path"), numbers)
    video = None
    if tree.get("video_path") is not None:
        with located(field="video_path"):
            video = PathTemplate.parse(tree["video_path"], numbers | {"video_key"})
    fps: Any = tree.get("fps")
    if type(fps) not in (int, float) or not (math.isfinite(fps) and fps > 0):
        raise DataError(f"{fps!r}: frames per second are expected, more than 0", field="fps")
    chunks_size = tree.get("chunks_size", 1000)
    if type(chunks_size) is not int or chunks_size < 1:
        raise DataError(f"{chunks_size!r}: a whole number of at least 1 is expected", field="chunks_size")
    return Info(root, version, float(fps), _parse_features(tree.get("features")), data, video, chunks_size, tree)


def _check_layout(root: Path, version: str, tree: dict[str, Any]) -> None:
    """A data set that was half converted has the number of one version and the files of the other."""
    is_v3 = version == "v3.0"
    template = str(tree.get("data_path"))
    signs = {
        "meta/episodes is a folder": (root / "meta/episodes").is_dir() and not (root / "meta/episodes.jsonl").exists(),
        "data_path has {file_index}": "{file_index" in template,
    } if not is_v3 else {
        "meta/episodes.jsonl is there and no folder meta/episodes": (root / "meta/episodes.jsonl").exists()
        and not (root / "meta/episodes").is_dir(),
        "data_path has {episode_index}": "{episode_index" in template,
    }  # fmt: skip
    found = [sign for sign, is_there in signs.items() if is_there]
    if found:
        raise DataError(
            f"{version!r}, but {' and '.join(found)}, as in {'v2.1' if is_v3 else 'v3.0'}: the data set is half converted; "
            "fetch or convert it again",
            field="codebase_version",
        )


def _parse_features(tree: object) -> dict[str, Feature]:
    if not isinstance(tree, dict) or not tree:
        raise DataError(f"{type(tree).__name__}: a JSON object of features is expected", field="features")
    features = {}
    for key, value in tree.items():
        described = value if isinstance(value, dict) else {}
        shape, dtype = described.get("shape"), str(described.get("dtype"))
        is_depth = any(_is_depth(described.get(place)) for place in ("info", "video_info")) or _is_depth(described)
        if isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape):
            features[key] = Feature(key, dtype, tuple(shape), _names(described.get("names")), is_depth)
        else:
            features[key] = Feature(key, dtype, (), (), problem="an object with dtype and shape is expected")
    return features


def _names(tree: object) -> tuple[str, ...]:
    """`["x", "y"]`, the same inside an object or a list (`{"motors": ["x", "y"]}`), or `{"x": 0, "y": 1}`."""
    if isinstance(tree, dict):
        values = list(tree.values())
        if all(type(value) is int for value in values) and sorted(values) == list(range(len(values))):
            return tuple(map(str, sorted(tree, key=tree.__getitem__)))
        tree = [value for value in values if isinstance(value, list)]
    if not isinstance(tree, list):
        return ()
    flat = [name for item in tree for name in (item if isinstance(item, list) else [item])]
    return tuple(map(str, flat))


def _is_depth(tree: object) -> bool:
    """Whether lerobot's notes on a camera mark it as depth: `video.is_depth_map` or `is_depth_map`, also as `video: {...}`."""
    if not isinstance(tree, dict):
        return False
    marks = [tree.get("video.is_depth_map"), tree.get("is_depth_map")]
    if isinstance(tree.get("video"), dict):
        marks.append(tree["video"].get("is_depth_map"))
    return any(mark not in (None, False, 0, "false", "False") for mark in marks)


def check_feature(feature: Feature, file: str) -> None:
    """Call it for features that are read. Raises DataError for one that info.json does not describe as the format says."""
    if feature.problem:
        raise DataError(feature.problem, file=file, field=f"features[{feature.key}]")
    if feature.dtype not in _KNOWN:
        raise DataError(
            f"unknown dtype {feature.dtype!r}: {', '.join(sorted(_KNOWN))} are known; correct it, or name the cameras to read "
            "in data.options.image_keys",
            file=file,
            field=f"features[{feature.key}].dtype",
        )
