"""Checkpoints that are written beside the training: whole or not there, of the step at which they were begun."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker_proto.errors import HostError
from stoker_proto.processor import Processor
from tests.trainer.support.memory import MemoryFeed, make_config, make_examples, make_processor
from tests.trainer.support.ranks import run_ranks
from trainer.build import build_engine, build_stepper
from trainer.checkpoints import background
from trainer.checkpoints.background import HeldFiles, copy_to_host, memory_of_copy
from trainer.checkpoints.export import gather_weights
from trainer.checkpoints.save import Checkpoints
from trainer.checkpoints.state import Cursor
from trainer.engine.ranks import Ranks, gather_json
from trainer.engine.zero import join_ranks
from trainer.training.source_table import SourceTable

ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
DEADLINE_S = 60.0


class Files:
    """In place of DeepSpeed's checkpoint engine: writes when it may, or fails."""

    def __init__(self) -> None:
        self.may_write, self.error = threading.Event(), None

    def save(self, state: Any, path: str) -> None:
        assert self.may_write.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error
        torch.save(state, path)


class Engine:
    """Saves one tensor through its `checkpoint_engine`, as DeepSpeed does."""

    def __init__(self) -> None:
        self.checkpoint_engine: Any = Files()
        self.weight = torch.tensor([1.0, 2.0])

    def save_checkpoint(self, folder: str, tag: str) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        self.checkpoint_engine.save({"weight": self.weight}, str(Path(folder) / tag / "weights.pt"))


@pytest.fixture
def processor(tiny_causal: Path, tmp_path: Path) -> Processor:
    return make_processor(make_config(tiny_causal, tmp_path))


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    return Checkpoints(make_config(Path("model"), tmp_path, checkpoint={"background": True, "keep": 2}), ALONE)


def begin(checkpoints: Checkpoints, engine: Engine, step: int, processor: Processor) -> Path:
    return checkpoints.save(engine, Cursor(step=step), {"plan": "p"}, processor, background=True)


def steps_there(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name[-8:]) for path in checkpoints._folders()]


def test_it_has_its_name_when_it_is_whole_and_holds_the_step_at_which_it_was_begun(
    checkpoints: Checkpoints, processor: Processor
) -> None:
    engine = Engine()
    engine.checkpoint_engine.may_write.set()
    begin(checkpoints, engine, 5, processor)
    checkpoints.finish()
    engine.checkpoint_engine = Files()
    folder = begin(checkpoints, engine, 10, processor)
    engine.weight += 7  # the training goes on
    found = checkpoints.find()
    assert found is not None
    assert (found.cursor.step, checkpoints.newest) == (5, checkpoints.folder / "step-00000005")
    assert not folder.exists()
    engine.checkpoint_engine.may_write.set()
    checkpoints.finish()
    found = checkpoints.find()
    assert found is not None
    assert (found.cursor.step, checkpoints.newest) == (10, folder)
    assert torch.load(folder / "deepspeed" / "weights.pt")["weight"].tolist() == [1.0, 2.0]
    assert sorted(path.name for path in folder.iterdir()) == ["deepspeed", "processor", "stoker.json"], "no mark stays"
    assert isinstance(engine.checkpoint_engine, Files), "the next one is written as DeepSpeed does"


def test_a_full_disk_is_raised_later_and_the_former_checkpoint_stays(
    checkpoints: Checkpoints, processor: Processor
) -> None:
    engine = Engine()
    engine.checkpoint_engine.may_write.set()
    begin(checkpoints, engine, 5, processor)
    checkpoints.finish()
    engine.checkpoint_engine.error = OSError(errno.ENOSPC, "No space left on device")
    begin(checkpoints, engine, 10, processor)
    assert checkpoints._writing is not None
    checkpoints._writing.wait(DEADLINE_S)
    assert checkpoints.has_failed
    with pytest.raises(
        HostError, match=r"step-00000010 cannot be written \(No space left on device\): make room there"
    ):
        checkpoints.finish()
    assert steps_there(checkpoints) == [5]
    engine.checkpoint_engine.error = None
    begin(checkpoints, engine, 15, processor)  # over the remains
    checkpoints.finish()
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000005", "step-00000015"]


def test_the_next_one_waits_for_the_former_one(checkpoints: Checkpoints, processor: Processor) -> None:
    engine = Engine()
    begin(checkpoints, engine, 5, processor)
    threading.Timer(0.2, engine.checkpoint_engine.may_write.set).start()
    begin(checkpoints, engine, 10, processor)
    assert 5 in steps_there(checkpoints)
    checkpoints.finish()
    assert steps_there(checkpoints) == [5, 10]


def test_auto_writes_before_it_returns_where_memory_is_short(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trainer.checkpoints.save")
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    monkeypatch.setattr("trainer.checkpoints.save.max_over_ranks", lambda values, ranks: list(values))
    checkpoints = Checkpoints(make_config(Path("model"), tmp_path, checkpoint={"background": "auto"}), ALONE)
    engine: Any = Engine()
    engine.checkpoint_engine.may_write.set()
    engine.module = torch.nn.Linear(1000, 1000)  # 4 MB, and as much for each of AdamW's groups of parameters
    engine.optimizer = type("Wrapped", (), {"optimizer": torch.optim.AdamW(engine.module.parameters())})
    free = [8_008_000 * 2]
    monkeypatch.setattr(background, "available_bytes", lambda: free[0])
    begin(checkpoints, engine, 5, processor)
    assert checkpoints._writing is not None
    checkpoints.finish()
    free[0] -= 2
    for step in (10, 15):
        folder = begin(checkpoints, engine, step, processor)
        assert checkpoints._writing is None
        assert folder.is_dir()
    decisions = [record.getMessage() for record in caplog.records if "background=auto" in record.getMessage()]
    figures = (
        "the copy of a rank takes up to 0.008 GB, and may take 0.008 GB, half of its share of the free host memory"
    )
    said = "trainer.checkpoint.background=auto: checkpoints are written"
    assert decisions == [f"{said} beside the training: {figures}", f"{said} while the training waits: {figures}"]


def test_a_copy_shares_what_the_original_shares_and_nothing_with_it() -> None:
    tied = torch.arange(6.0).view(2, 3)
    original = {"a": tied, "b": [tied, (tied[0], "text")], "n": 3}
    copy = copy_to_host(original, {})
    tied += 1
    assert copy["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert copy["a"] is copy["b"][0]
    assert copy["b"][1][0].tolist() == [0.0, 1.0, 2.0]
    assert (copy["b"][1][1], copy["n"]) == ("text", 3)


def train_and_save(rank: int, model: Path, output: Path, stage: int, kind: str) -> Any:
    """Weights when a checkpoint was begun, after one more step, and as a new engine loads them; bytes that a copy takes."""
    config = make_config(model, output, zero_stage=stage, checkpoint={"background": kind == "behind"})
    ranks = join_ranks()
    processor = make_processor(config)
    checkpoints = Checkpoints(config, ranks)

    def build(checkpoint: Any) -> Any:
        return build_engine(config, ranks, processor, checkpoints, checkpoint)

    def weights(of: Any) -> list[float]:
        found = gather_weights(of)
        return [float(found[name].float().abs().sum()) for name in sorted(found)]

    engine = build(None)
    stepper = build_stepper(engine, config, processor, ranks, SourceTable(("memory",), (0,), (1,)))
    feed = MemoryFeed(make_examples(16, seed=1, images=False), config, processor, rank, ranks.world_size)
    first, second = (step.micro_batches for step in feed.steps(0, 0))
    stepper.step(first, 0)
    begun, may_write = weights(engine), threading.Event()
    write = HeldFiles.write

    def late(held: HeldFiles) -> None:
        assert may_write.wait(DEADLINE_S)
        write(held)

    HeldFiles.write = late  # type: ignore[method-assign]  # in this forked process only
    folder = checkpoints.save(engine, Cursor(step=1, source_samples=(8,)), {"codec": "c"}, processor, background=True)
    was_there = folder.exists()
    stepper.step(second, 1)
    after = weights(engine)
    gather_json(None, ranks)
    may_write.set()
    checkpoints.finish()
    needed = memory_of_copy(engine)[0]
    return begun, after, weights(build(checkpoints.find())), was_there, needed


@pytest.mark.process
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_ranks_that_train_on_meanwhile_write_the_weights_of_the_checkpoint_s_step(
    stage: int, tiny_causal: Path, tmp_path: Path
) -> None:
    ranks = run_ranks(2, lambda rank: train_and_save(rank, tiny_causal, tmp_path / "out", stage, "behind"))
    for begun, after, loaded, was_there, _ in ranks:
        assert not was_there
        assert begun != after or not begun  # gathered on the first rank alone
        assert loaded == begun
    files = (tmp_path / "out" / "checkpoints" / "step-00000001" / "deepspeed").iterdir()
    written = sum(file.stat().st_size for file in files)
    needed = sum(
        needed for *_, needed in ranks
    )  # counts the weights in the model's format too, which ZeRO-3 does not write
    assert written <= needed <= 1.4 * written, "what `auto` reckons with"
