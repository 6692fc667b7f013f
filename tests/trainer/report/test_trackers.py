"""The figures of a run, read back from where they were written."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker_proto.config import LoggerConfig
from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import run
from trainer.report.trackers import Trackers

TRAIN = (
    "loss accuracy lr grad_norm step_s data_wait_s data_wait_frac queue_depth samples_per_s tokens_per_s skipped_steps "
    "bad_samples epoch"
)
VAL = (
    "samples perplexity accuracy action_perplexity action_violations action_undecodable "
    "action_mae/dim_0 action_mae/dim_1 action_mae/dim_2 action_mae/mean"
)


@pytest.mark.end_to_end
def test_every_figure_of_a_run_is_in_tensorboard_and_in_the_summary(tiny_llava: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tiny_llava, tmp_path, logger=LoggerConfig(tensorboard=True), eval_interval=3, export=False)
    run_ranks(1, lambda rank: run(config))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {f"train/{name}" for name in TRAIN.split()} | {f"val/{name}" for name in VAL.split()}
    assert set(events.Tags()["scalars"]) == expected
    losses = events.Scalars("train/loss")
    assert [scalar.step for scalar in losses] == [1, 2, 3, 4]
    assert losses[-1].value < losses[0].value
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("val/samples")] == [(3, 13.0), (4, 13.0)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "summary.json").read_text().count("\n") == 1
    assert (summary["steps"], summary["samples"], summary["export"]) == (4, 29, None)
    assert summary["train"]["loss"] == pytest.approx(losses[-1].value)
    assert summary["val"]["perplexity"] == pytest.approx(events.Scalars("val/perplexity")[-1].value)


def test_weights_and_biases_gets_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[dict[str, float], int]] = []
    finished: list[bool] = []
    started: list[dict[str, Any]] = []

    def init(**keys: Any) -> Any:
        started.append(keys)
        return SimpleNamespace(
            log=lambda figures, step: rows.append((figures, step)), finish=lambda: finished.append(True)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = make_config(
        Path("model"), tmp_path, logger=LoggerConfig(tensorboard=False, wandb=True, wandb_project="arm")
    )
    trackers = Trackers(config, is_first=True, first_step=1)
    trackers.log({"train/loss": 1.5, "train/accuracy": math.nan}, 7)
    trackers.close()
    assert (started[0]["project"], started[0]["config"]["trainer"]["lr"]) == ("arm", 1e-3)
    assert rows == [({"train/loss": 1.5}, 7)]
    assert finished == [True]


def test_only_the_first_rank_tracks(tmp_path: Path) -> None:
    config = make_config(Path("model"), tmp_path / "none", logger=LoggerConfig(tensorboard=True))
    trackers = Trackers(config, is_first=False, first_step=1)
    trackers.log({"train/loss": 1.0}, 1)
    trackers.close()
    assert not (tmp_path / "none").exists()


def test_wandb_that_is_not_installed_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(Path("model"), tmp_path, logger=LoggerConfig(tensorboard=False, wandb=True))
    with pytest.raises(ConfigError, match=r"pip install 'stoker\[wandb\]'"):
        Trackers(config, is_first=True, first_step=1)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(Path("model"), tmp_path, logger=LoggerConfig(tensorboard=False, wandb=True))
    trackers = Trackers(config, is_first=True, first_step=1)
    trackers.log({"train/loss": 1.0}, 1)
    trackers.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
