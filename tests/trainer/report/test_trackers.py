"""The figures of a run, read back from where they were written."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stoker_proto.config import LoggerConfig
from stoker_proto.errors import ConfigError
from tests.end_to_end.fleet import wait_until
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import run
from trainer.report.trackers import Trackers

TRAIN = (
    "loss perplexity accuracy lr grad_norm step_s data_wait_s data_wait_frac interval_data_wait_frac queue_depth "
    "samples_per_s tokens_per_s labels_per_s skipped_steps bad_samples epoch"
)
VAL = (
    "samples perplexity accuracy action_perplexity action_violations action_undecodable "
    "action_mae/dim_0 action_mae/dim_1 action_mae/dim_2 action_mae/mean action_mae_vs_constant "
    "action_mae_constant/dim_0 action_mae_constant/dim_1 action_mae_constant/dim_2 action_mae_constant/mean "
    "action_mae_free/dim_0 action_mae_free/dim_1 action_mae_free/dim_2 action_mae_free/mean action_mae_free_vs_constant "
    "varying_tokens/bins varying_perplexity/bins action_outside_mass"
)


@pytest.mark.process
def test_every_figure_of_a_run_is_in_tensorboard_and_in_the_summary(tiny_llava: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config = make_config(tiny_llava, tmp_path, logger=LoggerConfig(tensorboard=True), eval_interval=3, export=False)
    run_ranks(1, lambda rank: run(config))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {f"train/{name}" for name in TRAIN.split()} | {f"val/{name}" for name in VAL.split()}
    assert set(events.Tags()["scalars"]) == expected
    assert events.Tags()["images"] == ["train/first_batch", "val/examples"]
    assert {"custom_scalars__config__", "_hparams_/experiment", "_hparams_/session_start_info"} <= set(
        events.summary_metadata
    )
    hparams = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info.hparams
    assert (hparams["trainer.lr"].number_value, hparams["data.action.codec"].string_value) == (0.001, "bins")
    (text,) = events.Tensors("config/text_summary")
    assert "global_batch_size: 8" in text.tensor_proto.string_val[0].decode()
    losses = events.Scalars("train/loss")
    assert [scalar.step for scalar in losses] == [1, 2, 3, 4]
    assert losses[-1].value < losses[0].value
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("val/samples")] == [(3, 13.0), (4, 13.0)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (tmp_path / "summary.json").read_text().count("\n") == 1
    assert (summary["steps"], summary["samples"], summary["export"]) == (4, 29, None)
    assert summary["train"]["loss"] == pytest.approx(losses[-1].value)
    assert summary["val"]["perplexity"] == pytest.approx(events.Scalars("val/perplexity")[-1].value)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The real one; nothing leaves this machine, and its service has ended after the test."""
    found = pytest.importorskip("wandb", reason="NOT TESTED: wandb is not installed; pip install 'stoker[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield found
    found.teardown()


def records(folder: Path) -> dict[str, list[Any]]:
    """What wandb wrote for its server, by kind; all of it once there is an "exit"."""
    found: dict[str, list[Any]] = {"run": [], "history": [], "exit": []}
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        for record in parse(path.read_bytes()):
            kind = record.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(record, kind))
    return found


def parse(content: bytes) -> Iterator[Any]:
    """Protobuf records in LevelDB's log format (blocks of 32 KiB) behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(content):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if at + 7 + length > len(content):
            return  # it is being written
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.process
def test_weights_and_biases_gets_the_same_figures(tmp_path: Path, wandb: Any) -> None:
    config = make_config(
        Path("model"), tmp_path, logger=LoggerConfig(tensorboard=False, wandb=True, wandb_project="arm")
    )
    trackers = Trackers(config, is_first=True, first_step=1)
    trackers.log({"train/loss": 1.5, "train/accuracy": math.nan}, 7)
    trackers.log({"train/loss": 1.25, "val/perplexity": 3.0}, 8)
    trackers.log({"train/loss": 1.0}, 9)
    trackers.log({"val/success_once": 0.5}, 7)  # an evaluation that took two steps
    picture = tmp_path / "sheet.png"
    Image.new("RGB", (4, 2), (255, 0, 0)).save(picture)
    trackers.show({"val/sheet": picture, "val/absent": tmp_path / "absent.png"}, 7)
    trackers.close()
    wait_until(lambda: records(tmp_path)["exit"], 60, "the end of the run in its file")
    found = records(tmp_path)
    (run,) = found["run"]
    values = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, values["trainer"]["lr"]) == ("arm", 1e-3)
    rows = [{item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in found["history"]]
    figures = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
    assert [row["_step"] for row in rows] == [7, 8, 9]
    assert figures[:2] == [{"train/loss": 1.5}, {"train/loss": 1.25, "val/perplexity": 3.0, "val/step": 8}]
    assert {name: value for name, value in figures[2].items() if name != "val/sheet"} == {
        "train/loss": 1.0,
        "val/success_once": 0.5,
        "val/step": 7,
    }
    assert "val/sheet" in figures[2]
    assert [record.exit_code for record in found["exit"]] == [0]


class Recorder:
    """Stands in for the package: keeps the arguments of `init`."""

    Video = Image = None
    Error = RuntimeError
    is_logged_in = True

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def init(self, **arguments: Any) -> Recorder:
        if not self.is_logged_in:
            raise self.Error("No API key configured. Use `wandb login` to log in.")
        self.calls.append(arguments)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert step_metric in (None, "val/step")

    def finish(self) -> None:
        pass


def test_a_resumed_run_goes_on_in_its_wandb_run_and_a_new_one_begins_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    logger = LoggerConfig(
        tensorboard=False, wandb=True, wandb_name="arm", wandb_tags=("a", "b"), log_dir=str(tmp_path / "logs")
    )
    config = make_config(Path("model"), tmp_path / "out", logger=logger)
    for first_step in (1, 5, 1):
        Trackers(config, is_first=True, first_step=first_step).close()
    first, resumed, anew = recorder.calls
    assert first["id"] == resumed["id"] != anew["id"]
    assert (tmp_path / "out" / "wandb-run-id").read_text() == anew["id"] + "\n"
    assert {key: first[key] for key in ("name", "tags", "resume", "dir")} == {
        "name": "arm", "tags": ["a", "b"], "resume": "allow", "dir": str(tmp_path / "logs"),
    }  # fmt: skip


def test_wandb_where_nobody_is_logged_in_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    recorder.is_logged_in = False
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    config = make_config(Path("model"), tmp_path, logger=LoggerConfig(tensorboard=False, wandb=True))
    message = "cannot begin: No API key configured. Use `wandb login` to log in.; call `wandb login` once on"
    with pytest.raises(ConfigError, match=re.escape(message)):
        Trackers(config, is_first=True, first_step=1)


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


def test_tensorboard_hides_the_figures_of_steps_that_are_trained_again(tmp_path: Path) -> None:
    """The first run is lost before it has saved anything, the second after it has saved its first step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(Path("model"), tmp_path, logger=LoggerConfig(tensorboard=True))
    for run_loss, first_step, last_step in ((0.5, 1, 3), (0.25, 1, 2), (0.125, 2, 2)):
        trackers = Trackers(config, is_first=True, first_step=first_step)
        for step in range(first_step, last_step + 1):
            trackers.log({"train/loss": run_loss}, step)
        trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("train/loss")] == [(1, 0.25), (2, 0.125)]


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    config = make_config(tmp_path, tmp_path, logger=LoggerConfig(log_dir=str(tmp_path / "file")))
    with pytest.raises(
        ConfigError, match=r"trainer\.logger\.log_dir is '\S+/file': \S+/file cannot be written \(File exists\)"
    ):
        Trackers(config, is_first=True, first_step=1)
    Trackers(config, is_first=False, first_step=1)  # this one writes nothing
