"""A LeRobot data set through real loaders: every frame once, the same bytes from one loader and from two."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")

from stoker_proto.errors import DataError
from tests.end_to_end.fleet import pull, run_cli, serving, write_config
from tests.loader_service.sources.lerobot.files import write_lerobot

LENGTHS = (4, 9, 1, 12, 6, 5, 3)


@pytest.mark.parametrize("version", [pytest.param("v2.1", marks=pytest.mark.slow), "v3.0"])
def test_an_epoch_is_the_same_from_one_loader_and_from_two(tmp_path: Path, model: Path, version: str) -> None:
    root = write_lerobot(tmp_path / "set", LENGTHS, version=version)
    options = {
        "image_history": [-0.1, 0],
        "image_keys": ["observation.images.wrist"],
        "episodes": "0-5",
        "val_episodes": [6],
    }
    action = {"codec": "bins", "chunk": 2}
    config = write_config(
        tmp_path, model, [root], dataset_type="lerobot", options=options, val_data_paths=[str(root)], action=action
    )
    done = run_cli("prepare", "--config", str(config), "--verify")
    assert done.returncode == 0, done.stderr
    with serving(config) as a:
        one = pull(config, [a.address])
        validation = pull(config, [a.address], split="val")
        with serving(config) as b:
            two = pull(config, [a.address, b.address], ranks=2)
    assert one.steps == two.steps
    expected = {(0, record, t) for record, length in enumerate(LENGTHS[:6]) for t in range(length)}
    assert set(one.keys) == expected
    assert len(one.keys) == len(expected)
    assert len(validation.keys) == LENGTHS[6]


def test_a_video_lost_after_the_scan_is_named_and_the_loader_lives(tmp_path: Path, model: Path) -> None:
    root = write_lerobot(tmp_path / "set", LENGTHS, version="v2.1", videos=["observation.images.front"])
    config = write_config(tmp_path, model, [root], dataset_type="lerobot", on_bad_sample="skip")
    assert run_cli("prepare", "--config", str(config)).returncode == 0
    lost = sorted(root.glob("videos/**/*.mp4"))[3]
    lost.unlink()
    with serving(config) as loader:
        pulled = pull(config, [loader.address])
        assert loader.process.poll() is None
    assert len(set(pulled.keys)) == len(pulled.keys) == sum(LENGTHS)
    assert len(pulled.skipped) == LENGTHS[3]
    assert all(str(lost) in text for text in pulled.skipped)
    failing = write_config(tmp_path, model, [root], dataset_type="lerobot", cache_dir=str(tmp_path / "other"))
    done = run_cli("prepare", "--config", str(failing))
    assert done.returncode != 0
    assert f"record episode 3, field observation.images.front: the video {lost} is missing" in done.stderr
    assert DataError.__name__ not in done.stderr
