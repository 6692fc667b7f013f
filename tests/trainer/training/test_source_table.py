"""A mixture of robots (with images) and texts (without) in one run: nothing diverges, and each source has its figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.config import LoggerConfig, SourceConfig
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import NUM_TRAIN, run
from trainer.training.source_table import SourceResult, SourceTable

SOURCES = (
    SourceConfig(dataset_type="mani_openpi", paths=("robots",), val_paths=("robots",), name="robots"),
    SourceConfig(dataset_type="mani_openpi", paths=("texts",), val_paths=("texts",), name="texts"),
)
NUM_TEXTS = sum(number % 3 == 2 for number in range(NUM_TRAIN))


@pytest.mark.process
def test_each_source_has_its_loss_accuracy_and_counts(tiny_llava: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(
        tiny_llava,
        tmp_path,
        data={"sources": SOURCES},
        logger=LoggerConfig(tensorboard=True),
        eval_interval=4,
        export=False,
    )
    run_ranks(2, lambda rank: run(config))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    samples = {
        name: [scalar.value for scalar in events.Scalars(f"train/samples/{name}")] for name in ("robots", "texts")
    }
    assert samples["robots"][-1] == NUM_TRAIN - NUM_TEXTS
    assert samples["texts"][-1] == NUM_TEXTS
    assert [sum(both) for both in zip(*samples.values(), strict=True)] == [8, 16, 24, 29]
    of_source = [
        {scalar.step: scalar.value for scalar in events.Scalars(f"train/loss/{name}")} for name in ("robots", "texts")
    ]
    for scalar in events.Scalars("train/loss"):
        low, high = sorted(losses[scalar.step] for losses in of_source)
        assert low < scalar.value < high
    parts = {
        name: events.Scalars(f"val/{name}")[-1].value
        for name in ("perplexity", "perplexity/robots", "perplexity/texts")
    }
    assert min(parts.values()) < parts["perplexity"] < max(parts.values())
    summary = json.loads((tmp_path / "summary.json").read_text())
    # The pass of this feed in memory holds all 29, of both kinds.
    assert summary["sources"]["texts"] == {"samples": NUM_TEXTS, "passes": NUM_TEXTS / NUM_TRAIN}


def test_figures_of_a_source_by_hand() -> None:
    table = SourceTable(("robots", "chats"), (0, 0, 1), (100, 20))
    assert table.of_rows(np.array([0, 1, 2, -1])).tolist() == [0, 0, 1, 0]
    results = [
        SourceResult(nll=12.0, correct=3, num_supervised=6, num_rows=2),
        SourceResult(nll=0.0, correct=0, num_supervised=0, num_rows=0),
    ]
    assert table.figures(results, (150, 30)) == {
        "train/loss/robots": 2.0,
        "train/accuracy/robots": 0.5,
        "train/samples/robots": 150,
        "train/passes/robots": 1.5,
        "train/samples/chats": 30,
        "train/passes/chats": 1.5,
    }


def test_perplexity_of_a_source_by_hand() -> None:
    table = SourceTable(("robots", "chats", "none"), (0, 1, 2), (1, 1, 1))
    found = table.perplexities([math.log(2) * 4, 1, 4, math.log(8) * 2, 2, 2, 0, 0, 0])
    assert found == pytest.approx(
        {"perplexity/robots": 2, "accuracy/robots": 0.25, "perplexity/chats": 8, "accuracy/chats": 1}
    )


def test_a_single_source_has_no_figures_of_its_own() -> None:
    table = SourceTable(("robots",), (0,), (100,))
    assert table.figures([SourceResult(nll=1.0, correct=1, num_supervised=1, num_rows=1)], (1,)) == {}
    assert table.perplexities([1.0, 1, 1]) == {}
    assert table.summary((150,)) == {"robots": {"samples": 150, "passes": 1.5}}
    assert math.isnan(SourceTable(("empty",), (0,), (0,)).summary((0,))["empty"]["passes"])
