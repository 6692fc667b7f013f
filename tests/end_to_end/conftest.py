"""A tiny model's files and a small data set, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.fleet import write_config, write_demonstrations
from tests.tiny_models import write_model_folder

LENGTHS = [5, 9, 1, 7, 12, 3, 8, 8, 2, 6, 11, 4, 7, 5, 9, 10, 3, 6, 8, 5]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON files of a small LLaVA with 64x64 images: all that a loader reads of a model."""
    return write_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 trajectories, 129 timesteps."""
    return write_demonstrations(tmp_path_factory.mktemp("demos"), LENGTHS)


@pytest.fixture
def config(tmp_path: Path, model: Path, demos: Path) -> Path:
    """A config over them."""
    return write_config(tmp_path, model, [demos])
