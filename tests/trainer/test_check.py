"""`--check`: the gates with the processor of the loaders, and what it says where there is nothing to replay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stoker_proto.config import Config
from stoker_proto.processor import Processor
from tests.trainer.sim.test_replay import Actions, even, processor_of, recorded, write
from tests.trainer.support.memory import make_config
from trainer import check, cli
from trainer.check import check_run

__all__ = ["recorded"]


def config_of(tiny_llava: Path, tmp_path: Path, *paths: Path) -> Config:
    evals = ({"type": "success", "tasks": ["gripping"], "env_modules": ["tests.trainer.sim.pushing"]},)
    return make_config(tiny_llava, tmp_path, evals=evals, data={"train_data_paths": tuple(map(str, paths))})


def loaders_send(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done with the feed."""
    calls: list[str] = []

    class StandIn:
        def __init__(self, *_: Any) -> None:
            pass

        def connect(self) -> Any:
            calls.append("connect")
            return SimpleNamespace(processor_json=processor.to_json(), num_samples=57)

        def close(self) -> None:
            calls.append("close")

    monkeypatch.setattr(check, "Feed", StandIn)
    return calls


@pytest.mark.process
def test_the_gates_take_the_processor_of_the_loaders(
    recorded: dict[int, Actions],
    tiny_llava: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its bins are too narrow for dimension 0; a task that no environment has is left out with a note."""
    data = write(tmp_path / "train.jsonl", recorded)
    row = {"task": "a real robot", "seed": 1, "actions": [[0, 0, 0]]}
    data.write_text(data.read_text() + json.dumps(row) + "\n")
    narrow = Processor.load(processor_of(tmp_path, tiny_llava, even() * np.float32([0.1, 1, 1])))
    calls = loaders_send(narrow, monkeypatch)
    assert not check_run(config_of(tiny_llava, tmp_path, data))
    assert calls == ["connect", "close"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "loaders: 57 samples an epoch",
        "note: a real robot is no environment that is known here, so it is not checked",
        "replay      gripping: 3 of 3 succeed: ok",
        "round trip  gripping: 0 of 3 succeed: FAILED",
    ]
    assert "dimension 0" in lines[4]


def test_nothing_to_replay_is_said(
    recorded: dict[int, Actions],
    tiny_llava: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = Processor.load(processor_of(tmp_path, tiny_llava, even()))
    without_seeds = write(tmp_path / "train.jsonl", recorded, seed=None)
    for paths, sent, says in (
        ((tmp_path / "folder",), processor, "the training data are no JSONL files on this machine"),
        ((without_seeds,), processor, "no row has a task and a seed"),
        ((without_seeds,), Processor.build(make_config(tiny_llava, tmp_path), None), "the training has no actions"),
    ):
        loaders_send(sent, monkeypatch)
        config = config_of(tiny_llava, tmp_path, *paths)
        assert check_run(replace(config, trainer=replace(config.trainer, evals=())))
        assert capsys.readouterr().out.splitlines()[1] == f"demonstrations are not replayed: {says}"


def test_the_other_ranks_return_at_once(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(check, "Feed", None)
    assert check_run(config_of(tiny_llava, tmp_path))


def test_the_flag(tiny_causal: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(
        f"model: {{base_model_path: {tiny_causal}}}\n"
        "data: {dataset_type: chat, train_data_paths: [none.jsonl], max_seq_len: 64}\n"
        "trainer: {micro_batch_size: 2, global_batch_size: 8, lr: 1e-3}\n"
    )
    assert [cli.parse_arguments(["--config", str(file), *more]).check for more in ([], ["--check"])] == [False, True]
