"""Plans made in the background: bounded in number, whatever is asked."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loader_service.planner import PlannedLanes, Planner
from stoker_proto.config import DataConfig, OrderConfig
from tests.end_to_end.fleet import wait_until


@dataclass
class Manifest:
    """What of an entry a plan needs."""

    num_samples: np.ndarray


def make_data(**order: int) -> DataConfig:
    return DataConfig(
        dataset_type="mani_openpi", train_data_paths=("demos",), max_seq_len=64, order=OrderConfig(**order)
    )


def test_plans_come_with_the_next_epoch_and_old_ones_go(tmp_path: Path) -> None:
    woken = threading.Event()
    entries = {split: {0: Manifest(np.full(20, 3, np.uint32))} for split in ("train", "val")}
    planner = Planner(tmp_path, entries, make_data(lanes=4), woken.set)  # type: ignore[arg-type]

    def planned(split: str, epoch: int) -> PlannedLanes:
        wait_until(lambda: planner.lanes(split, epoch, 0) is not None, 10, f"the plan of {split} {epoch}")
        lanes = planner.lanes(split, epoch, 0)
        assert lanes is not None
        return lanes

    first = planned("train", 0)
    assert woken.is_set()
    assert sum(first.lengths) == 60
    assert any(first.starts) is False  # four lanes all begin with the epoch
    wait_until(lambda: list(tmp_path.glob("plan-train-1-*-ends.npy")), 10, "the plan of the next epoch, unasked")
    assert sum(planned("val", 0).lengths) == 60
    for epoch in range(1, 40):
        planned("train", epoch)
    files = {path.name.rsplit("-", 2)[0] for path in tmp_path.glob("plan-train-*")}
    assert {"plan-train-39", "plan-train-38"} <= files
    assert len(files) <= 10
    planner.close()


def test_the_next_epoch_of_a_large_set_waits_until_this_one_runs(tmp_path: Path) -> None:
    entries = {"train": {0: Manifest(np.full(40_960, 1, np.uint32))}}
    planner = Planner(tmp_path, entries, make_data(), lambda: None)  # type: ignore[arg-type]
    planner.lanes("train", 0, 0)
    wait_until(lambda: planner._plans["train", 0][0].done(), 10, "the first plan")
    for _ in range(10):
        planner.lanes("train", 0, 0)
    assert len(planner._plans["train", 0]) == 1
    planner.lanes("train", 0, 0)
    wait_until(lambda: list(tmp_path.glob("plan-train-1-*-ends.npy")), 10, "the plan of the next epoch")
    planner.close()


def test_a_flood_of_epochs_is_not_planned(tmp_path: Path) -> None:
    entries = {"train": {0: Manifest(np.full(200_000, 3, np.uint32))}}
    planner = Planner(tmp_path, entries, make_data(), lambda: None)  # type: ignore[arg-type]
    for epoch in range(1000):
        planner.lanes("train", epoch, 0)
    planner.close()
    assert len(list(tmp_path.glob("plan-train-*-ends.npy"))) < 50
