"""G12: a loader that differs comes to a running fleet. It is refused with the difference, and the run goes on unchanged."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from stoker_proto import PROTOCOL_VERSION
from tests.end_to_end.faults.conftest import Arena
from tests.end_to_end.faults.crew import Crew
from tests.end_to_end.faults.run import paced
from tests.end_to_end.fleet import ROOT, Pulled, wait_until, write_demonstrations

Check = Callable[[Pulled, float], None]
SLACK_S = 5.0


@pytest.fixture
def solo(crew: Crew) -> Iterator[str]:
    """The address of the second loader, which the test may replace; the first one serves."""
    yield crew.addresses[1]
    crew.restart(1)


def changed(arena: Arena, folder: Path, **data: object) -> Path:
    """The run's config with other keys under `data`, or another model folder under `model`."""
    tree = yaml.safe_load(arena.config.read_text())
    if "model" in data:
        tree["model"]["base_model_path"] = str(data.pop("model"))
    tree["data"].update(data)
    path = folder / "other.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def other_data(arena: Arena, folder: Path) -> Path:
    jsonl = write_demonstrations(folder / "other", [3 + 5 * i % 14 for i in range(60)], size=64, seed=1)
    return changed(arena, folder, train_data_paths=[str(jsonl)])


def other_tokenizer(arena: Arena, folder: Path) -> Path:
    model = folder / "model"
    shutil.copytree(yaml.safe_load(arena.config.read_text())["model"]["base_model_path"], model)
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace('"<|User|>"', '"<|Vser|>"'))
    assert text != (model / "tokenizer.json").read_text()
    return changed(arena, folder, model=model)


def other_codec(arena: Arena, folder: Path) -> Path:
    return changed(arena, folder, action={"codec": "vq"})


STRANGERS: dict[str, tuple[Callable[[Arena, Path], Path], str]] = {
    "data": (other_data, "manifest/train/0"),
    "tokenizer": (other_tokenizer, "tokenizer"),
    "codec": (other_codec, "codec"),
}


@pytest.mark.parametrize(
    "stranger",
    ["data", pytest.param("tokenizer", marks=pytest.mark.slow), pytest.param("codec", marks=pytest.mark.slow)],
)
def test_a_loader_that_differs_joins(
    stranger: str,
    arena: Arena,
    crew: Crew,
    solo: str,
    tmp_path: Path,
    check_run: Check,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make, name = STRANGERS[stranger]
    other = make(arena, tmp_path)
    crew.drain(1)

    def join() -> None:
        crew.start(1, config=other)
        wait_until(lambda: name in caplog.text, 60, f"a warning of {name}")

    with caplog.at_level(logging.WARNING):
        check_run(paced(arena.config, crew.addresses, {10: join}), SLACK_S)
    (said, *again) = [record.message for record in caplog.records if solo in record.message]
    assert not again, "said once"
    assert f"{name}: the loader has " in said
    assert "start it with this run's config, data and version, or leave it out" in said


def test_a_loader_of_another_protocol_version_joins(
    arena: Arena, crew: Crew, solo: str, tmp_path: Path, check_run: Check, caplog: pytest.LogCaptureFixture
) -> None:
    """A real loader from a copy of the source in which only the version differs."""
    for part in ("proto/stoker_proto", "loader_service"):
        shutil.copytree(ROOT / part, tmp_path / part)
    init = tmp_path / "proto" / "stoker_proto" / "__init__.py"
    text = init.read_text()
    init.write_text(
        text.replace(f"PROTOCOL_VERSION = {PROTOCOL_VERSION}", f"PROTOCOL_VERSION = {PROTOCOL_VERSION + 1}")
    )
    assert text != init.read_text()
    crew.drain(1)

    def join() -> None:
        crew.start(1, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{tmp_path / 'proto'}")
        wait_until(lambda: solo in caplog.text, 60, "a warning")

    with caplog.at_level(logging.WARNING):
        check_run(paced(arena.config, crew.addresses, {10: join}), SLACK_S)
    (said,) = [record.message for record in caplog.records if solo in record.message]
    assert f"protocol: the loader has {PROTOCOL_VERSION + 1}, this rank {PROTOCOL_VERSION}" in said
