"""`mani_openpi`: several cameras, images of earlier timesteps, and where a chunk of actions is padded."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.sources.base import Sample
from loader_service.sources.mani_openpi import ManiOpenPIDataset
from loader_service.sources.npz import Frames, NpzFile
from stoker_proto.errors import ConfigError, DataError

Write = Callable[..., Path]
Make = Callable[..., ManiOpenPIDataset]


def frames(count: int, seed: int = 0, size: tuple[int, int] = (8, 6)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def read_only_record(dataset: ManiOpenPIDataset, shard: Path) -> list[Sample]:
    (record,) = dataset.scan(shard)
    samples = list(dataset.read(shard, record.offset, record.size))
    assert len(samples) == record.num_samples == dataset.verify(shard, record.offset, record.size)
    return samples


def assert_images(sample: Sample, expected: list[np.ndarray]) -> None:
    assert len(sample.images) == len(expected)
    for image, frame in zip(sample.images, expected, strict=True):
        assert image.dtype == frame.dtype
        np.testing.assert_array_equal(image, frame)


@pytest.mark.parametrize("stored", [False, True])
def test_cameras_in_the_asked_order_depth_behind_the_first(write_demo: Write, make_mani: Make, stored: bool) -> None:
    rgb, wrist, top = frames(4), frames(5, 1, (4, 4)), frames(4, 2)
    depth = np.arange(4 * 8 * 6, dtype=np.uint16).reshape(4, 8, 6)
    shard = write_demo(arrays={"top": top, "wrist": wrist, "rgb": rgb, "depth": depth}, stored=stored)
    options = {"camera_keys": [["rgb"], ["wrist_rgb", "wrist"], "top"]}
    for t, sample in enumerate(read_only_record(make_mani(options=options), shard)):
        assert_images(sample, [rgb[t], wrist[t], top[t]])
    for t, sample in enumerate(read_only_record(make_mani(options=options, depth=True), shard)):
        assert_images(sample, [rgb[t], depth[t], wrist[t], top[t]])
    swapped = {"camera_keys": ["top", "rgb"]}
    for t, sample in enumerate(read_only_record(make_mani(options=swapped), shard)):
        assert_images(sample, [top[t], rgb[t]])


@pytest.mark.parametrize("stored", [False, True])
def test_history_is_clamped_to_the_start(write_demo: Write, make_mani: Make, stored: bool) -> None:
    rgb, wrist = frames(4), frames(4, 1)
    depth = np.arange(4 * 8 * 6, dtype=np.uint16).reshape(4, 8, 6)
    shard = write_demo(arrays={"rgb": rgb, "wrist": wrist, "depth": depth}, stored=stored)
    options = {"camera_keys": ["rgb", "wrist"], "image_history": [-2, -1, 0]}
    moments = [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]
    for sample, moment in zip(read_only_record(make_mani(options=options), shard), moments, strict=True):
        assert_images(sample, [*rgb[moment], *wrist[moment]])
    options = {"image_history": [-2, 0]}
    for t, sample in enumerate(read_only_record(make_mani(options=options, depth=True), shard)):
        moment = [max(t - 2, 0), t]
        assert_images(sample, [*rgb[moment], *depth[moment]])


def test_history_is_of_the_trajectory_where_noops_are_left_out(write_demo: Write, make_mani: Make) -> None:
    """What was seen one frame before, be its own action left out or not."""
    still, moving = [0.0] * 6 + [1.0], [0.5] + [0.0] * 5 + [1.0]
    rgb = frames(6)
    shard = write_demo(arrays={"rgb": rgb}, row={"actions": [moving, still, still, moving, still, moving]})
    dataset = make_mani(drop_noops=True, options={"image_history": [-1, 0]}, chunk=2)
    samples = read_only_record(dataset, shard)
    for sample, moment in zip(samples, ([0, 0], [2, 3], [4, 5]), strict=True):
        assert_images(sample, list(rgb[moment]))
    pads = [sample.action_is_pad.tolist() for sample in samples if sample.action_is_pad is not None]
    assert pads == [[False, False], [False, False], [False, True]]


def test_only_the_past_may_be_asked_for(write_demo: Write, make_mani: Make) -> None:
    rgb = frames(3)
    shard = write_demo(num_actions=3, arrays={"rgb": rgb})
    for t, sample in enumerate(read_only_record(make_mani(options={"image_history": [-1]}), shard)):
        assert_images(sample, [rgb[max(t - 1, 0)]])


def test_padded_actions_are_marked(write_demo: Write, make_mani: Make) -> None:
    shard = write_demo(num_actions=3)
    samples = read_only_record(make_mani(chunk=3), shard)
    pads = [sample.action_is_pad.tolist() for sample in samples if sample.action_is_pad is not None]
    assert pads == [[False, False, False], [False, False, True], [False, True, True]]
    (only, *_) = read_only_record(make_mani(), shard)
    assert only.action_is_pad is not None
    assert only.action_is_pad.tolist() == [False]


def test_each_frame_is_read_once_and_each_member_inflated_once(
    write_demo: Write, make_mani: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, inflated = [], []
    get, inflate = Frames.__getitem__, NpzFile._inflate
    monkeypatch.setattr(Frames, "__getitem__", lambda self, t: read.append(t) or get(self, t))
    monkeypatch.setattr(NpzFile, "_inflate", lambda self, m, name: inflated.append(name) or inflate(self, m, name))
    shard = write_demo(num_actions=6, arrays={"rgb": frames(6), "wrist": frames(6), "other": frames(6)})
    dataset = make_mani(options={"camera_keys": ["rgb", "wrist"], "image_history": [-3, -1, 0]})
    (record,) = dataset.scan(shard)
    assert len(list(dataset.read(shard, record.offset, record.size))) == 6
    assert sorted(read) == sorted([0, 1, 2, 3, 4, 5] * 2)
    assert sorted(inflated) == ["rgb", "wrist"]


def test_memory_is_that_of_the_history_not_of_the_trajectory(write_demo: Write, make_mani: Make) -> None:
    rgb = frames(40, size=(128, 128))
    frame_bytes = rgb[0].nbytes
    shard = write_demo(num_actions=40, arrays={"rgb": rgb}, stored=True)
    dataset = make_mani(options={"image_history": [-2, -1, 0]})
    (record,) = dataset.scan(shard)
    tracemalloc.start()
    try:
        for sample in dataset.read(shard, record.offset, record.size):
            del sample
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 3 * frame_bytes < peak < 6 * frame_bytes


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"rgb": frames(4)}, "none of the arrays wrist_rgb, wrist is there; there are rgb: name the right one in "
         "data.options.camera_keys[1]"),
        ({"rgb": frames(4), "wrist": frames(3)}, "field wrist: 3 images and 4 actions"),
        ({"rgb": frames(4), "wrist": frames(4)[..., :1]}, "field wrist: shape [4, 8, 6, 1]: [T, H, W, 3] is expected"),
        ({"rgb": frames(4), "wrist": frames(4).astype(np.int16)}, "field wrist: dtype int16: uint8 is expected"),
    ],
)  # fmt: skip
def test_a_wrong_camera_is_named(write_demo: Write, make_mani: Make, arrays: dict[str, np.ndarray], said: str) -> None:
    shard = write_demo(num_actions=4, arrays=arrays)
    dataset = make_mani(options={"camera_keys": ["rgb", ["wrist_rgb", "wrist"]]})
    with pytest.raises(DataError) as caught:
        list(dataset.read(shard, 0, len(shard.read_bytes()) - 1))
    assert str(caught.value).startswith(f"{shard.parent / 'traj_000000' / 'obs.npz'}: record {shard}:1")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"camera_keys": "rgb"}, "camera_keys is 'rgb': a list of cameras is expected"),
        ({"camera_keys": []}, "camera_keys is []: a list of cameras"),
        ({"camera_keys": ["rgb", []]}, "camera_keys[1] is []: a list of names"),
        ({"camera_keys": ["rgb", [3]]}, "camera_keys[1] is [3]: a list of names"),
        ({"camera_keys": ["rgb", ["wrist", "rgb"]]}, "camera_keys: rgb may be camera 0 and camera 1"),
        ({"camera_keys": ["a", "b"], "rgb_keys": ["c", "d"]}, "make it the first of the cameras, e.g. camera_keys: [[c, d]"),
        ({"image_history": []}, "image_history is []: frames up to 0 are expected, oldest first"),
        ({"image_history": [0, -1]}, "image_history is [0, -1]: frames up to 0"),
        ({"image_history": [-1, -1]}, "image_history is [-1, -1]: frames"),
        ({"image_history": [0, 1]}, "image_history is [0, 1]: frames"),
        ({"image_history": [-0.5, 0]}, "image_history is [-0.5, 0]: frames"),
        ({"image_history": [False]}, "image_history is [False]: frames"),
        ({"image_history": -1}, "image_history is -1: frames"),
        ({"state_keys": []}, "state_keys is []: a list of names"),
        ({"camera_key": "rgb"}, "camera_key: unknown option; did you mean camera_keys?"),
    ],
)  # fmt: skip
def test_options_of_cameras_are_checked(make_mani: Make, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_mani(options=options)
    assert said in str(caught.value)
    assert str(caught.value).startswith("data.options.")
