"""The export of a run that keeps its best checkpoint: whose weights it holds, and that it says so."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker_proto.config import BestConfig, Config, LoraConfig
from stoker_proto.errors import DataError, HostError
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import build_run, weights
from trainer.checkpoints.command import main as export_command
from trainer.evals.interface import Eval, Moment, Outcome

pytestmark = pytest.mark.process


class Exporting(Eval):
    """After each step: measures the next of `scores` as `val/score`, and exports the model that the ranks hold then."""

    def __init__(self, options: Mapping[str, Any], config: Config) -> None:
        self._scores = dict(enumerate(options["scores"], start=1))
        self._damage = options.get("damage")
        self._folder = Path(config.trainer.output_dir)

    def begin(self, moment: Moment) -> Outcome:
        moment.export(self._folder / "live" / str(moment.step))
        if moment.step == len(self._scores) and moment.ranks.is_first and self._damage:
            DAMAGES[self._damage](self._folder / "checkpoints" / "step-00000002")
        return Outcome(step=moment.step, figures={"score": self._scores[moment.step]})


def cut_second_rank(checkpoint: Path) -> None:
    [file] = (checkpoint / "deepspeed").glob("*_pp_rank_1_*optim_states.pt")
    file.write_bytes(file.read_bytes()[:1000])


def of_another_run(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "stoker.json").read_text())
    state["best"]["value"] = 0.75
    (checkpoint / "stoker.json").write_text(json.dumps(state))


DAMAGES = {"cut": cut_second_rank, "gone": shutil.rmtree, "another's": of_another_run}


def config_of(model: Path, folder: Path, scores: list[float], damage: str | None = None, **keys: Any) -> Config:
    best = BestConfig(metric="val/score", mode="max", **keys.pop("best", {}))
    evals = ({"type": f"{__name__}:Exporting", "interval": 1, "scores": scores, "damage": damage},)
    checkpoint = {"interval": 0, "keep": 1, "best": best, **keys.pop("checkpoint", {})}
    more = {"max_steps": len(scores), "lr": 1e-2, "lr_schedule": "constant", **keys}
    return make_config(model, folder, evals=evals, checkpoint=checkpoint, **more)


def outcome(config: Config) -> tuple[dict[str, Any], list[str]]:
    """The summary, or the error's text, and the lines of the log."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger().addHandler(Keep())
    logging.getLogger().setLevel(logging.INFO)
    trainer = build_run(config, images=False)
    try:
        return trainer.run(), lines
    except (DataError, HostError) as error:
        return {"error": str(error), "type": type(error).__name__}, lines


def differing(first: Path, second: Path) -> list[str]:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(
    ("stage", "precision", "keys"),
    [
        pytest.param(1, "bf16", {"ema_decay": 0.5}, marks=pytest.mark.slow),
        pytest.param(2, "fp32", {"lora": LoraConfig(rank=4)}, marks=pytest.mark.slow),
        (3, "bf16", {"lora": LoraConfig(rank=4), "ema_decay": 0.5}),
    ],
    ids=["zero1 averages", "zero2 adapters", "zero3 adapters and averages"],
)
def test_the_export_holds_the_weights_of_the_best_step(
    stage: int, precision: str, keys: dict[str, Any], tiny_causal: Path, tmp_path: Path
) -> None:
    """Two ranks; bit by bit what the ranks held after the best step, and the log, the summary and the card say which it was."""
    config = config_of(tiny_causal, tmp_path, [0.25, 0.5, 0.5], zero_stage=stage, precision=precision, **keys)
    (summary, lines), (other, _) = run_ranks(2, lambda rank: outcome(config))
    assert differing(tmp_path / "export", tmp_path / "live" / "2" / "export") == []
    assert differing(tmp_path / "export", tmp_path / "live" / "3" / "export"), "the last step's weights are other ones"
    assert (summary["steps"], summary["export_step"], other["export_step"]) == (3, 2, 2)
    assert summary["best"] == {"metric": "val/score", "value": 0.5, "step": 2, "waited": 1}
    assert json.loads((tmp_path / "summary.json").read_text())["export_step"] == 2
    sentence = "These are the weights after step 2 of 3, which had the best val/score of all validations, 0.5."
    assert f"{tmp_path}/export: {sentence}" in lines
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"2 steps of 8 rows, 16 samples in all. {sentence} AdamW" in card
    assert "| val/score | 0.5 |" in card
    assert summary["val"]["score"] == 0.5


def test_the_last_step_is_exported_as_ever_where_it_is_the_best_or_wanted(tiny_causal: Path, tmp_path: Path) -> None:
    """Then no checkpoint is read: the best one's folder may even be gone."""
    wanted = config_of(tiny_causal, tmp_path / "a", [0.25, 0.5, 0.25], "gone", best={"export": False})
    best = config_of(tiny_causal, tmp_path / "b", [0.25, 0.5, 0.75], "gone")
    (first, lines), (second, _) = run_ranks(1, lambda rank: (outcome(wanted), outcome(best)))[0]
    assert (first["export_step"], second["export_step"]) == (3, 3)
    for name in ("a", "b"):
        assert differing(tmp_path / name / "export", tmp_path / name / "live" / "3" / "export") == []
    assert not any("the best checkpoint" in line for line in lines)
    card = (tmp_path / "a" / "export" / "README.md").read_text()
    assert "These are the weights after the last step, 3; the best val/score of all validations, 0.5, was that " in card
    card = (tmp_path / "b" / "export" / "README.md").read_text()
    assert (
        "These are the weights after the last step, 3, which had the best val/score of all validations, 0.75." in card
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("cut", "checkpoints/step-00000002/deepspeed/.*_pp_rank_1_.*optim_states.pt: not a file of torch.save: it is damaged"),
        pytest.param("gone", "checkpoints/step-00000002/stoker.json: not the state of a checkp", marks=pytest.mark.slow),
        pytest.param("another's", "step-00000002: it is not the checkpoint of the best val/score", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_best_checkpoint_that_cannot_be_read_ends_the_run_with_the_command_for_the_last_one(
    damage: str, reason: str, tiny_causal: Path, tmp_path: Path
) -> None:
    """On all ranks alike, and nothing is exported in its place."""
    config = config_of(tiny_causal, tmp_path, [0.25, 0.5, 0.25], damage, zero_stage=2)
    (first, _), (second, _) = run_ranks(2, lambda rank: outcome(config))
    assert first == second
    assert re.match(rf"the best checkpoint, of step 2, is not exported: .*{reason}", first["error"])
    assert not (tmp_path / "export").exists()
    _, command = first["error"].split("This exports the last one: ")
    assert command == f"stoker-export --checkpoint {tmp_path}/checkpoints/step-00000003 --out {tmp_path}/export"
    assert export_command(command.split()[1:]) == 0
    assert differing(tmp_path / "export", tmp_path / "live" / "3" / "export") == []


@pytest.mark.slow
def test_the_best_step_may_be_that_of_other_ranks_in_another_folder(tiny_causal: Path, tmp_path: Path) -> None:
    """Two ranks measure the best step; one rank resumes from their last checkpoint, by its name, and trains on."""
    keys: dict[str, Any] = {"zero_stage": 1, "precision": "bf16"}
    run_ranks(2, lambda rank: outcome(config_of(tiny_causal, tmp_path / "a", [0.5, 0.25], **keys)))
    resume = str(tmp_path / "a" / "checkpoints" / "step-00000002")
    keys["checkpoint"] = {"resume": resume, "universal": True}
    config = config_of(tiny_causal, tmp_path / "b", [0.5, 0.25, 0.25], **keys)
    [(summary, _)] = run_ranks(1, lambda rank: outcome(config))
    assert (summary["steps"], summary["export_step"]) == (3, 1)
    assert differing(tmp_path / "b" / "export", tmp_path / "a" / "live" / "1" / "export") == []


def test_without_the_memory_for_it_the_run_ends_with_the_command(
    tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of being killed for memory, and again after each restart."""
    monkeypatch.setattr("trainer.checkpoints.from_checkpoint.available_bytes", lambda: 1_000_000)
    config = config_of(tiny_causal, tmp_path, [0.5, 0.25], zero_stage=1)
    [(found, _)] = run_ranks(1, lambda rank: outcome(config))
    assert re.match(
        r"the best checkpoint, of step 1, is not exported: this takes 0\.\d+ GB of host memory \(10 bytes per parameter\), and "
        r"0\.001 GB are free\. Nothing was exported\. This exports it: stoker-export --checkpoint \S+/step-00000001 --out ",
        found["error"],
    )
    assert found["type"] == "HostError"
