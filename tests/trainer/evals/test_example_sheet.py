"""Validation draws samples: frame, instruction, true and predicted action; TensorBoard gets the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stoker_proto.config import Config, LoggerConfig
from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import build_run
from trainer.evals import validation
from trainer.evals.example_sheet import Example, ExampleSheet, lines_of
from trainer.evals.validation import Perplexity


def sheet_of_a_run(rank: int, config: Config) -> list[Example]:
    """The examples of this rank's last validation."""
    made: list[ExampleSheet] = []

    class Kept(ExampleSheet):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    validation.ExampleSheet = Kept  # type: ignore[misc]  # in this forked process only
    build_run(config).run()
    return made[-1].examples


@pytest.mark.process
def test_a_run_shows_samples_of_its_validation(tiny_llava: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_llava, tmp_path, max_steps=1, export=False, eval_interval=1, logger=LoggerConfig(tensorboard=True)
    )
    first, second = run_ranks(2, lambda rank: sheet_of_a_run(rank, config))
    assert second == [], "the first rank's alone"
    assert len(first) == 4
    for example in first:
        assert example.frame is not None
        assert (example.frame.shape, example.frame.dtype) == ((64, 64, 3), np.uint8)
        assert example.instruction.startswith("push cube ")
        assert example.found is not None
        assert example.true.shape == example.found.shape == (1, 3)
    assert len({example.frame.tobytes() for example in first if example.frame is not None}) == 4, (
        "each has its own image"
    )
    picture = tmp_path / "evals" / "examples" / "step-00000001.png"
    with Image.open(picture) as sheet:
        assert sheet.size == (160 + 620, 4 * 160)
        assert np.array_equal(
            np.asarray(sheet)[:160, :160], np.asarray(Image.fromarray(first[0].frame).resize((160, 160)))
        )
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").rglob("events.*"))
    assert b"val/examples" in events
    assert b"\x89PNG" in events


def test_the_words_beside_a_picture() -> None:
    true, predicted = np.array([[0.125, -1.0]], np.float32), np.array([[0.5, 0.0]], np.float32)
    example = Example(frame=None, instruction="push the cube", true=true, found=predicted)
    assert lines_of(example) == ["push the cube", "true        0.12 -1.00", "predicted   0.50  0.00"]
    undecodable = Example(frame=None, instruction="word " * 100, true=true, found=None)
    lines = lines_of(undecodable)
    assert len(lines) == 3 + 2
    assert lines[2].endswith(" ...")
    assert lines[-1] == "predicted  tokens that are no action"


def test_the_number_of_examples_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"type perplexity: examples is -1: a number of samples, 0 for none"):
        Perplexity({"examples": -1}, make_config(tmp_path, tmp_path))
