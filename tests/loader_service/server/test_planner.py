"""Plans made in the background: bounded in number, whatever is asked."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from loader_service.manifest import EntryManifest
from loader_service.plan.lane_plan import LanePlan, PlanKey
from loader_service.plan.plan_files import make_plan
from loader_service.plan.record_plan import RecordPlan
from loader_service.server import planner as planner_module
from loader_service.server.planner import PlannedLanes, Planner
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


@pytest.mark.long
def test_plans_come_with_the_next_epoch_and_old_ones_go(tmp_path: Path) -> None:
    woken = threading.Event()
    entries = {split: {0: Manifest(np.full(20, 3, np.uint32))} for split in ("train", "val")}
    planner = Planner(tmp_path, entries, make_data(lanes=4), woken.set)  # type: ignore[arg-type]

    def planned(split: str, epoch: int) -> PlannedLanes:
        wait_until(lambda: planner.plan(PlanKey(split, epoch, 0)) is not None, 60, f"the plan of {split} {epoch}")
        lanes = planner.plan(PlanKey(split, epoch, 0))
        assert lanes is not None
        return lanes

    first = planned("train", 0)
    assert woken.is_set()
    assert sum(first.lengths) == 60
    assert any(first.starts) is False  # four lanes all begin with the epoch
    wait_until(lambda: list(tmp_path.glob("plan-train-1-*-ends.npy")), 60, "the plan of the next epoch, unasked")
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
    planner._request(PlanKey("train", 0, 0))  # not counted, however soon the plan is there
    wait_until(lambda: planner._plans["train", 0][0].done(), 60, "the first plan")
    for _ in range(10):
        planner.plan(PlanKey("train", 0, 0))
    assert len(planner._plans["train", 0]) == 1
    planner.plan(PlanKey("train", 0, 0))
    wait_until(lambda: list(tmp_path.glob("plan-train-1-*-ends.npy")), 60, "the plan of the next epoch")
    planner.close()


def test_a_flood_of_epochs_is_not_planned(tmp_path: Path) -> None:
    entries = {"train": {0: Manifest(np.full(200_000, 3, np.uint32))}}
    planner = Planner(tmp_path, entries, make_data(), lambda: None)  # type: ignore[arg-type]
    for epoch in range(1000):
        planner.lanes(PlanKey("train", epoch, 0))
    planner.close()
    assert len(list(tmp_path.glob("plan-train-*-ends.npy"))) < 50


def test_all_passes_of_a_mixture_are_answered_and_each_is_planned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank asks for them together, and for two entries at once: an answer needs the plans of both."""
    made: Counter[tuple[int, int]] = Counter()

    def counting(manifest: EntryManifest, data: DataConfig, key: PlanKey) -> LanePlan:
        made[key.epoch, key.entry] += 1
        return make_plan(manifest, data, key)

    monkeypatch.setattr(planner_module, "make_plan", counting)
    entries = {"train": {entry: Manifest(np.full(2000, 3, np.uint32)) for entry in (0, 1)}}
    planner = Planner(tmp_path, entries, make_data(), lambda: None)  # type: ignore[arg-type]
    waiting = list(range(60))

    def all_answered() -> bool:
        waiting[:] = [e for e in waiting if None in [planner.lanes(PlanKey("train", e, entry)) for entry in (0, 1)]]
        return not waiting

    wait_until(all_answered, 60, "the lanes of all passes")
    assert set(made.values()) == {1}
    assert len(list(tmp_path.glob("plan-train-*-ends.npy"))) <= 2 * 40
    planner.close()


def test_lanes_that_are_known_are_not_planned_again_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epoch 1 is planned before epoch 0, for which no place was free. Epoch 0 is no reason to plan it again, until tickets
    need its file."""
    made: Counter[int] = Counter()
    may_make = threading.Semaphore(0)

    def counting(manifest: EntryManifest, data: DataConfig, key: PlanKey) -> LanePlan:
        assert may_make.acquire(timeout=60)
        made[key.epoch] += 1
        return make_plan(manifest, data, key)

    monkeypatch.setattr(planner_module, "make_plan", counting)
    entries = {"train": {0: Manifest(np.full(20, 3, np.uint32))}}
    planner = Planner(tmp_path, entries, make_data(), lambda: None)  # type: ignore[arg-type]

    def known(epoch: int) -> bool:
        return planner.lanes(PlanKey("train", epoch, 0)) is not None

    others = range(100, 100 + planner_module._MAX_IN_THE_MAKING)
    assert not any(known(epoch) for epoch in others)
    assert not known(0)  # refused: too many are in the making
    may_make.release()
    wait_until(lambda: planner._plans["train", 0][others[0]].done(), 60, "the first plan")
    assert not known(1)
    may_make.release(1000)
    for epoch in (1, *others):
        wait_until(lambda epoch=epoch: known(epoch), 60, f"epoch {epoch}")
    wait_until(lambda: known(0), 60, "epoch 0")
    assert 1 not in planner._plans["train", 0], "its file went when newer plans came"
    assert known(0)
    assert set(made.values()) == {1}
    wait_until(lambda: planner.plan(PlanKey("train", 0, 0)) is not None, 60, "the plan of epoch 0")
    wait_until(lambda: made[1] == 2, 60, "the file of epoch 1, for the tickets that come after those of epoch 0")
    planner.close()


@pytest.mark.long
def test_a_plan_with_tickets_in_work_is_kept(tmp_path: Path) -> None:
    entries = {"train": {0: Manifest(np.full(20, 3, np.uint32))}}
    in_work = {PlanKey("train", 0, 0)}
    planner = Planner(tmp_path, entries, make_data(), lambda: None, lambda: in_work)  # type: ignore[arg-type]

    def passes(first: int, last: int) -> set[int]:
        for epoch in range(first, last):
            wait_until(lambda: planner.plan(PlanKey("train", epoch, 0)) is not None, 60, f"the plan of {epoch}")  # noqa: B023
        return {int(path.name.split("-")[2]) for path in tmp_path.glob("plan-train-*-ends.npy")}

    assert 0 in passes(0, 20)
    in_work.clear()
    assert 0 not in passes(20, 25)
    in_work |= {PlanKey("train", epoch, 0) for epoch in range(1000)}  # of a rank that asks for whatever there is
    assert len(passes(25, 80)) <= 34
    planner.close()


def test_a_plan_that_a_full_disk_prevents_is_made_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def save(plan: LanePlan, folder: Path) -> None:
        attempts.append(plan)
        if len(attempts) < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(plan, folder)

    real_save = RecordPlan.save
    monkeypatch.setattr(RecordPlan, "save", save)
    monkeypatch.setattr(planner_module, "RETRY_S", 0.01)
    entries = {"train": {0: Manifest(np.full(20, 3, np.uint32))}}
    planner = Planner(tmp_path, entries, make_data(lanes=4), lambda: None)  # type: ignore[arg-type]
    wait_until(lambda: planner.plan(PlanKey("train", 0, 0)) is not None, 20, "the plan")
    assert sum(planner.plan(PlanKey("train", 0, 0)).lengths) == 60  # type: ignore[union-attr]
    assert caplog.text.count("ENOSPC") == 1
    planner.close()


def test_a_planner_that_waits_for_room_can_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def save(plan: LanePlan, folder: Path) -> None:
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordPlan, "save", save)
    monkeypatch.setattr(planner_module, "RETRY_S", 3600)
    entries = {"train": {0: Manifest(np.full(20, 3, np.uint32))}}
    planner = Planner(tmp_path, entries, make_data(lanes=4), lambda: None)  # type: ignore[arg-type]
    assert planner.plan(PlanKey("train", 0, 0)) is None
    assert failed.wait(20)
    planner.close()
