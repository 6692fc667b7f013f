"""Runs that stop before their end, keep their best checkpoint, and say what changed when they go on."""

from __future__ import annotations

import json
import logging
import math
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import trainer.evals.validation as validation
from stoker_proto.config import BestConfig, Config
from stoker_proto.config.reader import config_to_tree
from stoker_proto.config.trainer import seconds_of
from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import build_run, digests, run
from trainer.checkpoints.best import Best, is_hopeless, update
from trainer.checkpoints.changes import config_changes
from trainer.checkpoints.save import Checkpoints
from trainer.checkpoints.state import Checkpoint
from trainer.engine.zero import join_ranks
from trainer.evals.interface import Eval, Moment, Outcome
from trainer.feed.batch import StepBatch

STATE = {
    "format": 2, "serial": 1, "world_size": 2, "global_batch_size": 8, "zero_stage": 3, "precision": "fp32", "seed": 0,
    "cursor": {"step": 5, "source_samples": [40]}, "fingerprints": {}, "config": {},
}  # fmt: skip
BEST = BestConfig(metric="val/perplexity", patience=2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def stopped(config: Config, rank: int) -> tuple[int, Any]:
    """A signal that only the second rank sees, in its second step."""
    found = build_run(config, images=False)
    found.stop_signal = lambda: signal.SIGUSR1 if rank == 1 and found.cursor.step >= 1 else 0
    return found.exit_code, (found.run(), found.exit_code)


@pytest.mark.process
def test_a_signal_at_one_rank_stops_all_at_one_step_and_the_same_command_goes_on(
    tiny_causal: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"checkpoint": {"interval": 0}, "lr": 1e-2, "export": False}
    straight = make_config(tiny_causal, tmp_path / "straight", **keys)
    run_ranks(2, lambda rank: run(straight, images=False))
    config = make_config(tiny_causal, tmp_path / "stopped", **keys)
    answers = run_ranks(2, lambda rank: stopped(config, rank))
    assert answers == [(0, ({"steps": 2, "stopped": True}, 75))] * 2
    assert names(tmp_path / "stopped") == ["step-00000002"]
    assert not (tmp_path / "stopped" / "summary.json").exists(), "a summary means that the run has reached its end"
    run_ranks(2, lambda rank: run(config, images=False))
    assert digests(tmp_path / "stopped") == digests(tmp_path / "straight")
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["steps"] == 4


def limited(config: Config) -> tuple[Any, int, list[str]]:
    """Also what the loop warned of."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger("trainer.loop").addHandler(Lines(logging.WARNING))
    found = build_run(config, images=False)
    return found.run(), found.exit_code, lines


@pytest.mark.process
def test_the_time_limit_saves_and_ends_with_a_code_that_asks_for_more(tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, max_time="0:00:00", max_steps=9, export=False)
    too_many = (
        "trainer.max_steps is 9, but trainer.epochs = 1 over 29 samples end after 4 steps; for more, set trainer."
    )
    [(summary, code, [line])] = run_ranks(1, lambda rank: limited(config))
    assert (summary, code) == ({"steps": 1, "stopped": True}, 75)
    assert line.startswith(too_many)
    assert names(tmp_path) == ["step-00000001"]
    assert seconds_of("26:01:05") == 93_665


def stopped_in_validation(config: Config, rank: int) -> tuple[Any, int, list[int]]:
    """A signal that only the second rank sees, in the first validation; also the steps of it that were read."""
    found, seen = build_run(config, images=False), list[int]()
    assert found.val is not None
    steps = found.val.feed.steps

    def watched(epoch: int, first_sample: int) -> Iterator[StepBatch]:
        for step in steps(epoch, first_sample):
            seen.append(step.step)
            yield step

    found.val.feed.steps = watched  # type: ignore[method-assign]
    found.stop_signal = lambda: signal.SIGTERM if rank == 1 and seen else 0
    return found.run(), found.exit_code, seen


@pytest.mark.process
@pytest.mark.parametrize("interval", [2, 0], ids=["during the run", "after the last step"])
def test_a_signal_during_a_validation_saves_at_once(tiny_causal: Path, tmp_path: Path, interval: int) -> None:
    """A validation may take longer than the grace time, and its step may be that of the checkpoint."""
    evals = ({"type": "perplexity", "interval": interval},)
    config = make_config(tiny_causal, tmp_path, max_steps=2 + interval, evals=evals, checkpoint={"interval": 2})
    found = run_ranks(2, lambda rank: stopped_in_validation(config, rank))
    assert found == [({"steps": 2, "stopped": True}, 143, [0])] * 2
    assert names(tmp_path) == ["step-00000002"]
    assert not (tmp_path / "export").exists()


class Quick(Eval):
    """Measures `val/quick`."""

    def __init__(self, options: Mapping[str, Any], config: Config) -> None:
        """It has no options."""

    def begin(self, moment: Moment) -> Outcome:
        """A figure of no weights."""
        return Outcome(step=moment.step, figures={"quick": 1.0})


@pytest.mark.process
def test_a_metric_that_no_evaluation_measures_is_refused_and_no_step_is_lost(tiny_causal: Path, tmp_path: Path) -> None:
    """Also where there are several, of which another one might have measured it."""
    best = BestConfig(metric="val/success_once", mode="max")
    evals = ({"type": f"{__name__}:Quick", "interval": 2},)
    keys: dict[str, Any] = {"evals": evals, "eval_interval": 1, "checkpoint": {"interval": 0, "best": best}}

    def refused(rank: int) -> str:
        with pytest.raises(ConfigError) as caught:
            run(make_config(tiny_causal, tmp_path, **keys), images=False)
        return str(caught.value)

    message = run_ranks(1, refused)[0]
    assert "metric is 'val/success_once', which validation does not measure here: it measures val/" in message
    assert "val/perplexity, val/quick" in message
    assert names(tmp_path) == ["step-00000002"]


def scored(config: Config, values: list[float]) -> tuple[int, float]:
    """A run whose validations measure these perplexities; returns its last step and the exit code."""
    left = iter(values)
    validation.validate = lambda *_: {"samples": 13.0, "perplexity": next(left)}  # type: ignore[assignment]
    found = build_run(config, images=False)
    summary = found.run()
    return summary["steps"], found.exit_code


@pytest.mark.process
def test_the_best_checkpoint_is_kept_and_training_ends_when_nothing_gets_better(
    tiny_causal: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"eval_interval": 1, "epochs": 2, "export": False}
    checkpoint = {"interval": 1, "keep": 1, "best": BEST}
    config = make_config(tiny_causal, tmp_path, checkpoint=checkpoint, **keys)
    assert run_ranks(1, lambda rank: scored(config, [5.0, 4.0, 4.5, 4.0])) == [(4, 0)]
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    states = [json.loads((tmp_path / "checkpoints" / name / "stoker.json").read_text()) for name in names(tmp_path)]
    assert [state["scores"]["val/perplexity"] for state in states] == [4.0, 4.0]
    assert states[1]["best"] == {"metric": "val/perplexity", "value": 4.0, "step": 2, "waited": 2}
    again = run_ranks(1, lambda rank: scored(config, [4.0]))
    assert again == [(4, 0)], "a resume knows that it had waited long enough"


def test_the_best_by_literal_figures() -> None:
    config = BestConfig(metric="val/accuracy", mode="max", patience=1)
    first = update(None, config, {"val/accuracy": math.nan}, 10)
    assert (first.step, first.waited) == (-1, 1)
    best = update(first, config, {"val/accuracy": 0.5}, 20)
    assert best == Best(metric="val/accuracy", value=0.5, step=20)
    assert not is_hopeless(best, config)
    assert is_hopeless(update(best, config, {"val/accuracy": 0.5}, 30), config), "as good is not better"
    assert update(best, config, {"val/accuracy": 0.6}, 40).step == 40
    with pytest.raises(
        ConfigError, match=r"metric is 'val/accuracy', which validation does not .* it measures val/loss"
    ):
        update(best, config, {"val/loss": 1.0}, 50)


@pytest.mark.parametrize(
    ("metric", "larger"),
    [
        *[(name, True) for name in ("accuracy", "accuracy/bridge", "success_once", "success_at_end", "mean_reward")],
        *[(name, False) for name in ("perplexity", "perplexity/bridge", "action_perplexity", "varying_perplexity/vq")],
        *[(name, False) for name in ("action_mae/mean", "action_mae_free/dim_3", "action_mae_free_vs_constant")],
        *[(name, False) for name in ("action_violations", "action_undecodable", "action_outside_mass", "loss")],
    ],
)
def test_which_is_better_is_known_of_our_figures(metric: str, larger: bool) -> None:
    """Else a run that names accuracy, and no mode, would keep and export its worst weights."""
    config = BestConfig(metric=f"val/{metric}")
    first = update(None, config, {f"val/{metric}": 0.5}, 10)
    assert update(first, config, {f"val/{metric}": 0.6}, 20).step == (20 if larger else 10)
    other = BestConfig(metric=f"val/{metric}", mode="min" if larger else "max")
    assert update(first, other, {f"val/{metric}": 0.6}, 20).step == (10 if larger else 20)


def test_best_without_validations_is_refused() -> None:
    config = make_config(Path("m"), Path("o"), checkpoint={"best": BEST})
    with pytest.raises(ConfigError, match=r"trainer.checkpoint.best needs validations: set data.val_data_paths"):
        config.check()


def test_a_resume_says_what_changed_and_how_the_rate_jumps(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"warmup_ratio": 0.0, "lr": 1e-3}
    before = make_config(Path("m"), tmp_path / "a", epochs=3, **keys)
    state = {"config": config_to_tree(before), "cursor": {"step": 270, "source_samples": []}}
    checkpoint = Checkpoint(folder=tmp_path, state=state)
    assert config_changes(checkpoint, before, 800) == []
    after = make_config(Path("m"), tmp_path / "b", epochs=6, **keys)
    assert config_changes(checkpoint, after, 800) == [
        "trainer.epochs: 3 -> 6",
        "the learning rate of step 271 is 0.000576, 25.2 times the 2.29e-05 that it would have been: the schedule is that of "
        "the new settings",
    ]
    done = Checkpoint(folder=tmp_path, state={**state, "cursor": {"step": 300, "source_samples": []}})
    other = make_config(Path("m"), tmp_path / "b", epochs=3, weight_decay=0.1, **keys)
    assert config_changes(done, other, 800) == ["trainer.weight_decay: 0.0 -> 0.1"], "the rate is 0 in both"
    del state["config"]["trainer"]["max_time"], state["config"]["model"]["precision"]  # as an older version wrote it
    assert config_changes(checkpoint, before, 800) == ["model.precision: absent -> fp32"]


def choice(folder: Path, rank: int) -> str:
    """Each rank with an output folder of its own, as on machines with their own disks."""
    config = make_config(Path("m"), folder / f"disk-{rank}")
    try:
        found = Checkpoints(config, join_ranks()).find()
    except ConfigError as error:
        return str(error)
    return "none" if found is None else found.folder.name


@pytest.mark.process
def test_the_first_rank_chooses(tmp_path: Path) -> None:
    assert run_ranks(2, lambda rank: choice(tmp_path, rank)) == ["none", "none"]
    for disk, step in (("disk-1", 7), ("disk-0", 5)):
        folder = tmp_path / disk / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "stoker.json").write_text(json.dumps({**STATE, "serial": step}))
        first, second = run_ranks(2, lambda rank: choice(tmp_path, rank))
        assert first == second
        if disk == "disk-1":
            assert first == "none", "what only another rank has does not count"
    assert first == "step-00000005", "one machine: the second rank sees the first one's folder"


def hidden(folder: Path, rank: int) -> str:
    """The second rank's machine has no such folder."""
    if rank == 1:
        Path.is_file = lambda path: False  # type: ignore[method-assign, assignment]
    return choice(folder, rank)


@pytest.mark.process
def test_a_rank_that_does_not_see_the_checkpoint_is_named_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.checkpoints.save._SEEN_DEADLINE_S", 0.1)
    folder = tmp_path / "disk-0" / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    (folder / "stoker.json").write_text(json.dumps(STATE))
    message = (
        f"ranks 1 do not see {folder}, from which the first rank would resume: trainer.output_dir must be storage that"
    )
    first, second = run_ranks(2, lambda rank: hidden(tmp_path, rank))
    assert first == second
    assert first.startswith(message)
