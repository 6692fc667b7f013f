"""Evaluations of a run: a user's own, success in a simulator beside the training, and bounded validation."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker_proto.config import Config, LoggerConfig, LoraConfig
from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import build_run
from trainer.engine.ranks import sum_over_ranks
from trainer.evals.interface import Eval, Moment, Outcome
from trainer.evals.registry import plan_evals
from trainer.sim.success import Success, figures_of

PUSHING = {"env_modules": ["tests.trainer.sim.pushing"], "image_size": 64, "max_steps": 3}


class Ranks(Eval):
    """Counts ranks, with a collective."""

    def __init__(self, options: Mapping[str, Any], config: Config) -> None:
        self.factor = float(options["factor"])

    def begin(self, moment: Moment) -> Outcome:
        [number] = sum_over_ranks([1.0], moment.ranks)
        return Outcome(step=moment.step, figures={"ranks": self.factor * number})


def train(config: Config, rank: int) -> None:
    """Raises what the run raises."""
    trainer = build_run(config)
    try:
        trainer.run()
    finally:
        trainer.close()


@pytest.mark.process
def test_success_is_played_beside_the_training_and_logged_at_the_step_that_was_evaluated(
    tiny_llava: Path, tmp_path: Path
) -> None:
    """Eight steps on two ranks. The evaluator of step 4 takes longer than the training that is left."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(
        tiny_llava,
        tmp_path,
        epochs=2,
        eval_interval=3,
        eval_samples=5,
        logger=LoggerConfig(tensorboard=True),
        data={"val_data_paths": ("memory",)},
        evals=(
            {"type": "success", "tasks": ["pushing", "mute"], "episodes": 1, "interval": 4, **PUSHING},
            {"type": "tests.trainer.evals.test_evals_in_training:Ranks", "interval": 5, "factor": 10},
        ),
    )
    run_ranks(2, partial(train, config))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def of(name: str) -> list[tuple[int, float]]:
        return [(scalar.step, scalar.value) for scalar in events.Scalars(f"val/{name}")]

    assert of("ranks") == [(5, 20), (8, 20)]
    assert of("samples") == [(3, 8), (6, 8), (8, 8)], "five samples are a whole global batch of eight"
    assert sorted(of("success_episodes")) == [(4, 2), (8, 2)]
    assert [value for _, value in of("success_once")] == [0, 0]
    assert {step for step, _ in of("reward")} == {4, 8}
    assert events.Tags()["images"] == ["train/first_batch", "val/examples", "val/success_sheet"]
    perplexities = {scalar.step: scalar.value for scalar in events.Scalars("train/perplexity")}
    losses = {scalar.step: scalar.value for scalar in events.Scalars("train/loss")}
    assert perplexities[8] == pytest.approx(math.exp(losses[8]), rel=1e-5)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["val"]["success_episodes"], summary["val"]["ranks"]) == (2, 20)
    folder = tmp_path / "evals" / "success" / "step-00000004"
    results = json.loads((folder / "results.json").read_text())
    assert results["models"]["model"]["path"] == str(folder / "export")
    assert not (folder / "export").exists(), "models of finished evaluations are not kept"
    assert len(list((folder / "videos").glob("*.mp4"))) == 2
    other = json.loads((folder.parent / "step-00000008" / "results.json").read_text())
    fingerprints = {tree["models"]["model"]["fingerprint"] for tree in (results, other)}
    assert len(fingerprints) == 2, "other weights at another step"


@pytest.fixture
def evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in the place of the evaluator; its $OUT is the folder of `--out`."""
    script = tmp_path / "evaluator.sh"

    def write(body: str) -> None:
        find = 'while [ "$1" != --out ]; do shift; done; OUT=$2'
        script.write_text(f"#!/bin/sh\n{find}\n{body}\n")
        script.chmod(0o755)

    monkeypatch.setattr("trainer.sim.success.sys", SimpleNamespace(executable=str(script), path=[]))
    monkeypatch.setattr("trainer.sim.success.max_over_ranks", lambda values, ranks: list(values))
    return write


def moment(tmp_path: Path, step: int, *, is_last: bool = False) -> Any:
    def export(folder: Path) -> Path:
        (folder / "export").mkdir(parents=True)
        return folder / "export"

    first = SimpleNamespace(is_first=True)
    return SimpleNamespace(step=step, is_last=is_last, output_dir=tmp_path, ranks=first, export=export)


def success_of(tmp_path: Path, **options: Any) -> Success:
    [planned] = plan_evals(config_of(tmp_path, {"type": "success", "tasks": ["pushing"], **PUSHING, **options}))
    assert isinstance(planned.eval, Success)
    return planned.eval


RESULTS = json.dumps(
    {
        "summary": {
            "model": {
                "pushing": {
                    "episodes": 4,
                    "success_once": {"value": 0.75},
                    "success_at_end": {"value": 0.5},
                    "reward": 0.25,
                }
            }
        },
        "deaths": [{}],
    }
)


@pytest.mark.process
def test_a_failed_evaluation_is_counted_and_its_reason_logged(
    evaluator: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator("echo starting; echo 'evaluate: 4 simulators died' >&2; exit 1")
    success = success_of(tmp_path)
    for step, failures in ((3, 1), (6, 2)):
        success.begin(moment(tmp_path, step))
        [outcome] = success.wait()
        assert (outcome.step, outcome.figures) == (step, {"success_failures": failures})
        assert f"the evaluation of step {step} failed: evaluate: 4 simulators died; its log: {tmp_path}" in caplog.text
        assert not (tmp_path / "evals" / "success" / f"step-0000000{step}" / "export").exists()


@pytest.mark.process
def test_an_evaluation_beyond_its_deadline_is_ended(
    evaluator: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator("exec sleep 10000")
    success = success_of(tmp_path, deadline_s=0.5)
    success.begin(moment(tmp_path, 3))
    [outcome] = success.wait()
    assert outcome.figures == {"success_failures": 1}
    assert "the evaluation of step 3 failed: no end within 0 s" in caplog.text


@pytest.mark.process
def test_a_step_is_left_out_while_the_one_before_plays_but_never_the_last(
    evaluator: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator(f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; echo '{RESULTS}' > $OUT/results.json")
    success = success_of(tmp_path)
    success.begin(moment(tmp_path, 3))
    assert success.finished() == []
    success.begin(moment(tmp_path, 6))
    assert "step 6 is not evaluated: the evaluation before it still plays" in caplog.text
    success.begin(moment(tmp_path, 8, is_last=True))
    (tmp_path / "go").touch()
    first, last = success.wait()
    assert (first.step, last.step) == (3, 8)
    assert first.figures == {
        "success_episodes": 4,
        "success_once": 0.75,
        "success_at_end": 0.5,
        "reward": 0.25,
        "success_deaths": 1,
    }
    assert first.line == "success once 75.0%, at the end 50.0% of 4 episodes of pushing"
    assert sorted(path.name for path in (tmp_path / "evals" / "success").iterdir()) == [
        "step-00000003",
        "step-00000008",
    ]


@pytest.mark.process
def test_closing_ends_the_evaluator(evaluator: Callable[[str], None], tmp_path: Path) -> None:
    """tests/conftest.py fails a test that leaves a process."""
    evaluator("exec sleep 10000")
    success = success_of(tmp_path)
    success.begin(moment(tmp_path, 3))
    success.close()
    assert success.finished() == []


def config_of(tmp_path: Path, *evals: Mapping[str, Any], **data: Any) -> Config:
    return make_config(
        Path("model"), tmp_path, eval_interval=7, evals=tuple(evals), data={"val_data_paths": (), **data}
    )


def test_validation_is_planned_where_there_are_validation_data(tmp_path: Path) -> None:
    assert plan_evals(config_of(tmp_path)) == []
    [planned] = plan_evals(config_of(tmp_path, val_data_paths=("memory",)))
    assert (planned.name, planned.interval) == ("perplexity", 7)
    own = {"type": "perplexity", "interval": 2, "samples": 9}
    [planned] = plan_evals(config_of(tmp_path, own, val_data_paths=("memory",)))
    assert planned.interval == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"tasks": ["pushing"]}, r"trainer.evals\[0\] has no type: write {type: success, ...}; known: perplexity, success, or"),
        ({"type": "sucess"}, r"trainer.evals\[0\].type is 'sucess': known are perplexity, success, and package.module:Class"),
        ({"type": "absent_module:Eval"}, "type is 'absent_module:Eval': it cannot be imported"),
        ({"type": "pathlib:Path"}, "that is no subclass of trainer.evals.interface.Eval"),
        ({"type": "success", "tasks": ["pushing"], "interval": -1}, r"interval is -1: a number of optimizer steps"),
        ({"type": "success", "tasks": ["Push"]}, "unknown task 'Push'; known: PushCube-v1"),
        ({"type": "success", "tasks": []}, "tasks is empty"),
        ({"type": "success", "tasks": ["pushing"], "episode": 3}, "type success.episode: unknown key; did you mean"),
        ({"type": "success", "tasks": ["pushing"], "episodes": 0}, "type success.episodes is 0: it must be at least 1"),
        ({"type": "success"}, "trainer.evals, type success.tasks is missing"),
        ({"type": "success", "tasks": ["pushing"], "env_modules": ["absent_envs"]}, "absent_envs: importing it failed"),
        ({"type": "perplexity"}, "there are no validation data; set data.val_data_paths"),
        ({"type": "perplexity", "samples": 0}, "samples is 0: at least 1, or null for all"),
        ({"type": "perplexity", "size": 3}, "unknown option 'size'"),
    ],
)  # fmt: skip
def test_entries_that_are_refused(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_evals(config_of(tmp_path, entry))


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    entry = {"type": "success", "tasks": ["pushing"], **PUSHING}
    with pytest.raises(ConfigError, match=r"two entries are called success, .* give one a name"):
        plan_evals(config_of(tmp_path, entry, entry))
    assert len(plan_evals(config_of(tmp_path, entry, entry | {"name": "again"}))) == 2


def test_success_of_a_run_that_exports_adapters_alone_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"type": "success", "tasks": ["pushing"], **PUSHING})
    adapters = replace(config, model=replace(config.model, lora=LoraConfig(export="adapter")))
    with pytest.raises(ConfigError, match=r"plays a whole model, and model.lora.export is adapter: set it to merged"):
        plan_evals(adapters)


def test_a_shipped_task_without_the_simulator_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"PushCube-v1 needs ManiSkill: pip install 'stoker\[sim\]', then the renderer"
    ):
        plan_evals(config_of(tmp_path, {"type": "success", "tasks": ["PushCube-v1"]}))


def test_seeds_of_the_training_data_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    demonstrations = tmp_path / "train.jsonl"
    rows = [{"task": "pushing", "seed": 41}, {"task": "mute", "seed": 8}, {"seed": 7}]
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"type": "success", "tasks": ["pushing"], "episodes": 3, **PUSHING}
    paths = {"train_data_paths": (str(demonstrations),)}
    for start, seeds in ((5, "1 seeds .* training data .7."), (39, "41")):
        with pytest.raises(ConfigError, match=f"{seeds}.*begin with another seed, such as 42"):
            plan_evals(config_of(tmp_path, entry | {"seed_start": start}, **paths))
    with caplog.at_level(logging.WARNING):
        plan_evals(config_of(tmp_path, entry | {"seed_start": 8}, **paths))
        assert caplog.text == "", "seed 8 is another task's"
        demonstrations.write_text(json.dumps({"task": "pushing"}) + "\n")
        plan_evals(config_of(tmp_path, entry, **paths))
    assert "1 training rows have no seed: whether the evaluation's seeds are held out is not known" in caplog.text


def test_figures_are_means_over_tasks() -> None:
    def of(once: float, end: float, reward: float, episodes: int) -> dict[str, Any]:
        return {
            "success_once": {"value": once},
            "success_at_end": {"value": end},
            "reward": reward,
            "episodes": episodes,
        }

    assert figures_of({"a": of(0.5, 0.25, 1.0, 20)}) == {"episodes": 20, "once": 0.5, "at_end": 0.25, "reward": 1.0}
    found = figures_of({"a": of(0.5, 0.25, 1.0, 20), "b": of(1.0, 0.75, 2.0, 10)})
    assert (found["episodes"], found["once"], found["once/b"], found["reward"]) == (30, 0.75, 1.0, 1.5)
