"""`mani_openpi`: views of the camera's frame, what training predicts beside the actions, and rows with parts of an episode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.processor import Processor
from tests.tiny_models import make_config, write_model_folder

Write = Callable[..., Path]
Make = Callable[..., ManiOpenPIDataset]

VIEWS = [{"crop": [1, 2, 4, 3]}, {"hand": [4, 4]}]


def demo_arrays(count: int = 4) -> dict[str, np.ndarray]:
    """Frames of 16 x 12; the hand moves one column to the right with each timestep, from (row 8, column 5) on."""
    rng = np.random.default_rng(1)
    poses = np.zeros((count, 7), np.float32)
    poses[:, 0], poses[:, 3] = np.arange(count) / 10, 1
    camera = np.array([[1, 0, 0, 0.5], [0, 1, 0, 0.8], [0, 0, 1, 1]], np.float32)
    return {
        "rgb": rng.integers(0, 256, (count, 16, 12, 3), dtype=np.uint8),
        "tcp_pose": poses,
        "intrinsic_cv": np.tile(np.diag([10, 10, 1]).astype(np.float32), (count, 1, 1)),
        "extrinsic_cv": np.tile(camera, (count, 1, 1)),
        "objects": rng.normal(size=(count, 6)).astype(np.float32),
    }


@pytest.mark.long
@pytest.mark.parametrize("stored", [False, True])
def test_a_sample_has_the_views_of_its_frame(write_demo: Write, make_mani: Make, tmp_path: Path, stored: bool) -> None:
    arrays = demo_arrays()
    shard = write_demo(arrays=arrays, stored=stored)
    dataset = make_mani(options={"views": VIEWS, "auxiliary_keys": ["absent", "objects"]})
    (record,) = dataset.scan(shard)
    samples = list(dataset.read(shard, record.offset, record.size))
    assert len(samples) == record.num_samples == dataset.verify(shard, record.offset, record.size) == 4
    folder = write_model_folder(tmp_path / "model", "llava")
    config: Config = make_config(folder, f"data.options.views={VIEWS}", max_seq_len=64)
    processor = Processor.build(config, None)
    (tmp_path / "saved").mkdir()
    processor.save(tmp_path / "saved")
    policy_side = Processor.load(tmp_path / "saved")
    for t, sample in enumerate(samples):
        crop, hand = sample.images
        np.testing.assert_array_equal(crop, arrays["rgb"][t, 1:5, 2:5])
        np.testing.assert_array_equal(hand, arrays["rgb"][t, 6:10, 3 + t : 7 + t])
        assert sample.auxiliary is not None
        assert sample.auxiliary.tolist() == arrays["objects"][t].tolist()
        # The policy's processor, loaded from an export, makes the same images of the same frame.
        told = {name: values[t] for name, values in arrays.items()}
        for mine, theirs in zip(sample.images, policy_side.see([arrays["rgb"][t]], told), strict=True):
            assert mine.tobytes() == theirs.tobytes()
    assert policy_side.images_per_frame == 2
    plain = Processor.build(make_config(folder, max_seq_len=64), None)
    assert plain.fingerprints()["image"] != processor.fingerprints()["image"] == policy_side.fingerprints()["image"]
    assert "views" not in plain.to_json()


def test_missing_or_misshapen_arrays_are_named(write_demo: Write, make_mani: Make) -> None:
    arrays = demo_arrays()
    del arrays["extrinsic_cv"]
    shard = write_demo(arrays=arrays)
    dataset = make_mani(options={"views": VIEWS})
    (record,) = dataset.scan(shard)
    with pytest.raises(DataError, match=r"extrinsic_cv: there is no such array.*float32\[T, 3, 4\]"):
        list(dataset.read(shard, record.offset, record.size))
    dataset = make_mani(options={"auxiliary_keys": ["positions"]})
    with pytest.raises(DataError, match=r"positions.*data\.options\.auxiliary_keys"):
        list(dataset.read(shard, record.offset, record.size))


def test_views_need_one_camera_at_one_moment(make_mani: Make) -> None:
    for more in ({"camera_keys": ["rgb", "wrist"]}, {"image_history": [-1, 0]}):
        with pytest.raises(ConfigError, match=r"data\.options\.views makes several images of one camera"):
            make_mani(options={"views": VIEWS, **more})
    with pytest.raises(ConfigError, match=r"set data\.image\.depth to false"):
        make_mani(options={"views": VIEWS}, depth=True)


def test_a_row_that_leaves_out_timesteps_serves_no_chunks(write_demo: Write, make_mani: Make) -> None:
    shard = write_demo(arrays=demo_arrays(), row={"timesteps": [0, 2, 3, 7]})
    (record,) = make_mani().scan(shard)
    assert record.num_samples == 4
    with pytest.raises(DataError, match=r"timesteps.*leaves out timesteps.*--render-share 1"):
        list(make_mani(chunk=2).scan(shard))
    whole = write_demo(arrays=demo_arrays(), row={"timesteps": [0, 1, 2, 3]}, name="whole.jsonl")
    assert [record.num_samples for record in make_mani(chunk=2).scan(whole)] == [4]
