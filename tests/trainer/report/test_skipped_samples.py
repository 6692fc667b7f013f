"""`data.on_bad_sample: skip`: at the end, and when the budget is spent, all that was skipped on any rank is named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from stoker_proto.errors import DataError
from tests.trainer.support.memory import MemoryFeed, make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import NUM_TRAIN, NUM_VAL, build_run
from trainer.feed.batch import IGNORED

pytestmark = pytest.mark.process
BAD = {3: "traj_1/obs.npz: cut short", 4: "traj_1/obs.npz: cut short", 17: "traj_9/obs.npz: cut short"}


def run(config: Any) -> tuple[dict[str, Any] | str, list[str]]:
    """The summary, or the error; and what this rank logged as warnings."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Lines(logging.WARNING)
    logging.getLogger("trainer.report.budgets").addHandler(handler)
    trainer = build_run(config, images=False)
    feed = trainer.train.feed
    assert isinstance(feed, MemoryFeed)
    plain = feed.batch

    def batch(epoch: int, start: int, stop: int) -> Any:
        micro_batch = plain(epoch, start, stop)
        bad = [row for row, (_, number, _) in enumerate(micro_batch.keys.tolist()) if number in BAD]
        micro_batch.skipped = [BAD[int(micro_batch.keys[row, 1])] for row in bad]
        micro_batch.labels[bad] = IGNORED
        micro_batch.num_supervised = int((micro_batch.labels != IGNORED).sum())
        return micro_batch

    feed.batch = batch  # type: ignore[method-assign]
    try:
        return trainer.run(), lines
    except DataError as error:
        return str(error), lines


def test_the_summary_and_the_log_name_them(tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, export=False)
    (first, said), (second, silent) = run_ranks(2, lambda rank: run(config))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first["samples"] == NUM_TRAIN
    assert first["bad_samples"] == 3
    assert first["skipped"] == second["skipped"] == {"traj_1/obs.npz: cut short": 2, "traj_9/obs.npz: cut short": 1}
    assert said == [
        "3 bad samples were skipped since this start:",
        "2 samples: traj_1/obs.npz: cut short",
        "1 samples: traj_9/obs.npz: cut short",
    ]
    assert silent == []


def test_a_spent_budget_names_them_on_its_way_out(tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, export=False, data={"bad_sample_budget": 1})
    (error, said), (same_error, silent) = run_ranks(2, lambda rank: run(config))
    assert "more than data.bad_sample_budget = 1" in str(error)
    assert error == same_error
    assert said[0].endswith(" bad samples were skipped since this start:")
    assert "2 samples: traj_1/obs.npz: cut short" in said or len(said) == 3
    assert silent == []


def validated(config: Any, num_bad: int) -> tuple[dict[str, Any] | str, list[str]]:
    """Like `run`, of a run that validates once; the first `num_bad` validation samples are bad."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Lines(logging.INFO)
    for name in ("trainer.evals.validation", "trainer.loop"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
    trainer = build_run(config, images=False)
    assert trainer.val is not None
    feed = trainer.val.feed
    assert isinstance(feed, MemoryFeed)
    plain = feed.batch

    def batch(epoch: int, start: int, stop: int) -> Any:
        micro_batch = plain(epoch, start, stop)
        is_padding = (micro_batch.labels == IGNORED).all(axis=1)
        bad = [row for row, key in enumerate(micro_batch.keys) if key[1] < num_bad and not is_padding[row]]
        micro_batch.skipped = ["val.npz: cut short"] * len(bad)
        micro_batch.labels[bad] = IGNORED
        micro_batch.num_supervised = int((micro_batch.labels != IGNORED).sum())
        return micro_batch

    feed.batch = batch  # type: ignore[method-assign]
    try:
        return trainer.run()["val"], lines
    except DataError as error:
        return str(error), lines


def test_bad_samples_of_the_validation_are_counted_and_named(tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, export=False, max_steps=2, eval_interval=1)
    (figures, said), (same, _) = run_ranks(2, lambda rank: validated(config, 5))
    assert isinstance(figures, dict)
    assert figures == same
    assert (figures["samples"], figures["bad_samples"]) == (NUM_VAL, 5)
    assert said.count("5 bad samples are left out of the validation:") == 1, "once, not at each validation"
    assert "5 samples: val.npz: cut short" in said
    assert sum(f"validation over {NUM_VAL - 5} samples (5 bad ones left out): perplexity" in line for line in said) == 2


@pytest.mark.parametrize(("num_bad", "budget"), [(5, 4), (NUM_VAL, 1000)])
def test_a_validation_of_bad_samples_ends_the_run(num_bad: int, budget: int, tiny_causal: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"export": False, "max_steps": 2, "eval_interval": 1}
    config = make_config(tiny_causal, tmp_path, **keys, data={"bad_sample_budget": budget})
    (error, _), (same, _) = run_ranks(2, lambda rank: validated(config, num_bad))
    assert error == same
    assert f"step 1: {num_bad} of the {NUM_VAL} samples of the validation are bad; at most data.bad_sample" in str(
        error
    )
