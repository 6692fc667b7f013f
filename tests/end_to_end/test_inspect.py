"""`loader-inspect` shows what a rank is given: compared with a real loader's batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import yaml
from PIL import Image

from tests.end_to_end.fleet import (
    environment,
    micro_batches_of,
    pull,
    run_cli,
    run_program,
    serving,
    write_config,
    write_demonstrations,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    return write_config(folder, model, [write_demonstrations(folder / "demos", [5, 7, 4])])


def rows(config: Path, *arguments: str) -> list[dict[str, Any]]:
    done = run_cli("inspect", "--config", str(config), "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_rows_are_those_that_a_rank_gets(config: Path) -> None:
    found = {}
    for row in rows(config, "--num", "1000"):
        (sample,) = row["samples"]
        found[row["entry"], sample["record"], sample["timestep"]] = sample
    seen = 0
    for micro in micro_batches_of(config):
        for b in range(micro.num_rows):
            sample, seen = found[tuple(micro.keys[b].tolist())], seen + 1
            length = len(sample["input_ids"])
            assert micro.input_ids[b, :length].tolist() == sample["input_ids"]
            assert (micro.labels[b, :length] != -100).astype(int).tolist() == sample["labels"]
            np.testing.assert_array_equal(micro.actions[b], np.array(sample["action"], np.float32))
    assert seen == len(found) == 16


def test_text_labels_action_and_picture_for_people(config: Path, tmp_path: Path) -> None:
    done = run_cli(
        "inspect", "--config", str(config), "--record", "1", "--num", "2", "--tokens", "--images", str(tmp_path / "p")
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "record 1, sample 0" in text
    assert "record 1, sample 1" in text
    assert "<|User|> <image>x16 " in text
    assert "<|Assistant|>[<action " in text
    assert text.count("action of the tokens") == 2
    assert text.count("\n                   label") == 2 * 8  # seven dimensions in bins, and the end token
    pictures = sorted((tmp_path / "p").glob("*.png"))
    assert len(pictures) == 2
    for number, path in enumerate(pictures):
        with Image.open(path) as picture, np.load(config.parent / "demos" / "traj_1" / "obs.npz") as arrays:
            seen, frame = np.asarray(picture, np.int64), arrays["rgb"][number]
        assert seen.shape == (64, 64, 3)
        assert np.abs(seen.mean(axis=(0, 1)) - frame.mean(axis=(0, 1))).max() < 2  # a plain box, through JPEG
        assert str(path) in text


def test_a_place_without_room_for_pictures_is_named(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_cli("inspect", "--config", str(config), "--num", "1", "--images", str(tmp_path / "file" / "p"))
    assert done.returncode == 1
    assert f"--images {tmp_path}/file/p cannot be written (Not a directory): name another folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_class_of_ones_own_from_outside_the_repository(model: Path, tmp_path: Path) -> None:
    """The README's example, seen by the README's command."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = readme.split("### Your own dataset")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "my_package.py").write_text(code)
    (tmp_path / "data.txt").write_text('["what is this?", "a cube"]\n["and this?", "a peg"]\n')
    tree = {
        "model": {"base_model_path": str(model)},
        "data": {
            "dialogue": {"template": "stoker"},
            "dataset_type": "my_package:Captions",
            "train_data_paths": [str(tmp_path / "data.txt")],
            "max_seq_len": 64,
        },
        "trainer": {"micro_batch_size": 1, "global_batch_size": 1, "lr": 1e-3},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    done = run_program(
        "loader_service.cli", "inspect", "--config", str(tmp_path / "my.yaml"),
        PYTHONPATH=f"{environment()['PYTHONPATH']}:{tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "<|User|> what is this? <|Assistant|>[ a cube</s>]" in done.stdout


def test_the_complete_class_of_the_page_on_sources(model: Path, tmp_path: Path) -> None:
    """From outside the repository: looked at, verified, served; a frame that is missing has its name."""
    page = (Path(__file__).parents[2] / "loader_service" / "sources" / "README.md").read_text()
    blocks = [part.split("```")[0] for part in page.split("## Your own")[1].split("```python\n")[1:]]
    (code,) = [block for block in blocks if "class Folders" in block]
    (tmp_path / "my_folders.py").write_text(code)
    generator = np.random.default_rng(0)
    for number in range(3):
        folder = tmp_path / "data" / f"episode_{number}"
        folder.mkdir(parents=True)
        steps = generator.uniform(-1, 1, (4 + number, 7)).round(4)
        (folder / "steps.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in steps.tolist()))
        (folder / "task.txt").write_text("push the cube\n")
        for t in range(len(steps)):
            pixels = np.full((48, 40, 3), 20 * t, np.uint8)
            (folder / f"{t:06}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    (tmp_path / "data" / "episodes.txt").write_text("episode_0\nepisode_1\nepisode_2\n")
    tree = {
        "model": {"base_model_path": str(model)},
        "data": {
            "dataset_type": "my_folders:Folders",
            "train_data_paths": [str(tmp_path / "data")],
            "max_seq_len": 64,
            "action": {"codec": "bins", "chunk": 2},
        },
        "trainer": {"micro_batch_size": 1, "global_batch_size": 1, "lr": 1e-3},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    path = f"{environment()['PYTHONPATH']}:{tmp_path}"
    known = ("--config", str(tmp_path / "my.yaml"))
    done = run_program("loader_service.cli", "inspect", *known, "--record", "1", "--num", "5", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<|User|> <image>x16 push the cube <|Assistant|>[<action ") == 5
    assert done.stdout.count("action of the tokens") == 5
    with serving(tmp_path / "my.yaml", PYTHONPATH=path) as loader:
        assert len(pull(tmp_path / "my.yaml", [loader.address]).keys) == 15
    (tmp_path / "data" / "episode_1" / "000003.jpg").unlink()
    done = run_program("loader_service.cli", "prepare", *known, "--verify", PYTHONPATH=path)
    assert done.returncode == 1
    assert f"{tmp_path}/data/episode_1: record 3: no frame:" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "val"], "--split val: the config names no data of it"),
        (["--record", "3"], "--record 3: "),
        (["--source", "chat"], "--source chat: the config has mani_openpi"),
        (["--entry", "1"], "--entry 1: one of 0 is expected"),
    ],
)
def test_what_is_not_there_is_said(config: Path, arguments: list[str], message: str) -> None:
    done = run_cli("inspect", "--config", str(config), *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
