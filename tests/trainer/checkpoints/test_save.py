"""Which checkpoint counts, which are deleted, and what is refused; with a stand-in for DeepSpeed's engine."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import SafetensorError

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError, HostError, RefusedError
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config, make_processor
from trainer.checkpoints.save import Checkpoints
from trainer.checkpoints.state import Cursor
from trainer.engine.ranks import Ranks

really_remove, really_rename, really_sync = shutil.rmtree, Path.rename, os.fsync
RANKS = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class Engine:
    """Saves one file, and dies in the middle of it when told to."""

    def __init__(self) -> None:
        self.dies = False

    def save_checkpoint(self, folder: str, tag: str) -> None:
        file = Path(folder) / tag / "weights.pt"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"half")
        if self.dies:
            raise KeyboardInterrupt
        file.write_bytes(b"whole")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)


@pytest.fixture
def processor(tiny_causal: Path, tmp_path: Path) -> Processor:
    return make_processor(make_config(tiny_causal, tmp_path))


def config_of(output_dir: Path, **checkpoint_keys: Any) -> Config:
    return make_config(Path("model"), output_dir, checkpoint=checkpoint_keys)


def save(checkpoints: Checkpoints, step: int, processor: Processor, engine: Engine | None = None) -> None:
    checkpoints.save(
        engine or Engine(), Cursor(step=step, sample=8 * step, position=8 * step), {"plan": "p"}, processor
    )


@pytest.mark.long
def test_the_newest_are_kept_and_the_newest_is_found(tmp_path: Path, processor: Processor) -> None:
    checkpoints = Checkpoints(config_of(tmp_path, keep=2), RANKS)
    assert checkpoints.find() is None
    for step in (5, 10, 15):
        save(checkpoints, step, processor)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000010", "step-00000015"]
    found = checkpoints.find()
    assert found is not None
    assert found.cursor == Cursor(step=15, sample=120, position=120)
    assert Processor.load(found.folder / "processor").to_json() == processor.to_json()


@pytest.mark.long
def test_after_a_resume_from_an_older_one_the_abandoned_ones_are_older(tmp_path: Path, processor: Processor) -> None:
    checkpoints = Checkpoints(config_of(tmp_path, keep=2), RANKS)
    for step in (10, 20):
        save(checkpoints, step, processor)
    save(checkpoints, 12, processor)  # of a run that went on from 10
    found = checkpoints.find()
    assert found is not None
    assert found.cursor.step == 12
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000012", "step-00000020"]
    save(checkpoints, 20, processor)
    found = checkpoints.find()
    assert found is not None
    assert (found.cursor.step, found.state["serial"]) == (20, 4)


@pytest.mark.long
def test_a_half_written_one_is_never_picked_up(tmp_path: Path, processor: Processor) -> None:
    checkpoints = Checkpoints(config_of(tmp_path), RANKS)
    save(checkpoints, 5, processor)
    engine = Engine()
    engine.dies = True
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 10, processor, engine)
    found = checkpoints.find()
    assert found is not None
    assert found.cursor.step == 5
    save(checkpoints, 10, processor)  # over the remains
    found = checkpoints.find()
    assert found is not None
    assert (found.folder / "deepspeed" / "weights.pt").read_bytes() == b"whole"
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000005", "step-00000010"]


class Killed(BaseException):
    """The process is gone at this moment."""


def removal_that(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    """Removing a tree raises this from now on, or works again."""

    def rmtree(folder: Path, **_: Any) -> None:
        if error is not None:
            raise error
        really_remove(folder)

    monkeypatch.setattr("trainer.checkpoints.save.shutil.rmtree", rmtree)


@pytest.mark.long
def test_a_checkpoint_killed_while_it_removes_an_old_one_leaves_nothing_for_ever(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(config_of(tmp_path, keep=1), RANKS)
    save(checkpoints, 5, processor)
    removal_that(monkeypatch, Killed())
    with pytest.raises(Killed):
        save(checkpoints, 10, processor)
    assert len(list(checkpoints.folder.iterdir())) == 2
    found = checkpoints.find()
    assert found is not None
    assert found.cursor.step == 10
    (checkpoints.folder / "step-00000099.partial").mkdir()  # and another was killed while it wrote
    removal_that(monkeypatch, None)
    save(checkpoints, 15, processor)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000015"]


def test_the_same_step_again_is_there_whole_before_the_old_one_is_removed(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(config_of(tmp_path), RANKS)
    save(checkpoints, 5, processor)
    removal_that(monkeypatch, Killed())
    with pytest.raises(Killed):
        save(checkpoints, 5, processor)
    found = checkpoints.find()
    assert found is not None
    assert (found.cursor.step, found.serial) == (5, 2)


@pytest.mark.long
def test_an_old_one_that_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(config_of(tmp_path, keep=1), RANKS)
    removal_that(monkeypatch, OSError(39, "Directory not empty"))
    for step in (5, 5, 5, 10):
        save(checkpoints, step, processor)
    assert "step-00000005.0.deleted cannot be removed" in caplog.text
    removal_that(monkeypatch, None)
    save(checkpoints, 15, processor)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000015"]

    def rename(self: Path, target: Path) -> Path:
        if target.suffix == ".deleted":
            raise PermissionError(1, "not permitted")
        return really_rename(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    save(checkpoints, 20, processor)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000015", "step-00000020"]
    assert "step-00000015 is kept" in caplog.text


def test_the_disk_has_every_file_and_folder_before_the_checkpoint_has_its_name(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def fsync(handle: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        really_sync(handle)

    def rename(self: Path, target: Path) -> Path:
        done.append("renamed")
        return really_rename(self, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    checkpoints = Checkpoints(config_of(tmp_path), RANKS)
    save(checkpoints, 5, processor)
    whole, partial = checkpoints.folder / "step-00000005", checkpoints.folder / "step-00000005.partial"
    written = {str(partial / path.relative_to(whole)) for path in whole.rglob("*")}
    assert written | {str(partial)} == set(done[: done.index("renamed")])
    assert done.index(str(partial / "stoker.json")) > done.index(str(partial / "deepspeed" / "weights.pt"))
    assert done[-2:] == ["renamed", str(checkpoints.folder)]


def test_one_rank_of_each_machine_has_the_disk_take_what_its_ranks_wrote(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, local_rank, syncs in ((3, 1, False), (2, 0, True)):
        ranks = Ranks(rank=rank, world_size=4, local_rank=local_rank, device=torch.device("cpu"))
        checkpoints = Checkpoints(config_of(tmp_path), ranks)
        synced: list[int] = []
        monkeypatch.setattr("os.fsync", synced.append)
        (checkpoints.folder / "step-00000005.partial").mkdir(parents=True, exist_ok=True)
        shutil.rmtree(checkpoints.folder / "step-00000005.partial" / "deepspeed", ignore_errors=True)
        save(checkpoints, 5, processor)
        assert bool(synced) == syncs


def test_what_to_resume_from(tmp_path: Path, processor: Processor) -> None:
    save(Checkpoints(config_of(tmp_path), RANKS), 5, processor)
    save(Checkpoints(config_of(tmp_path), RANKS), 10, processor)
    assert Checkpoints(config_of(tmp_path, resume=None), RANKS).find() is None
    older = Checkpoints(config_of(tmp_path, resume=str(tmp_path / "checkpoints" / "step-00000005")), RANKS).find()
    assert older is not None
    assert older.cursor.step == 5
    with pytest.raises(
        ConfigError, match=r"trainer\.checkpoint\.resume is '/nowhere': there is no /nowhere/stoker\.json"
    ):
        Checkpoints(config_of(tmp_path, resume="/nowhere"), RANKS).find()


@pytest.mark.parametrize(("resume", "how"), [("auto", ""), (None, " with trainer.checkpoint.resume=auto")])
def test_the_way_back_is_said(resume: str | None, how: str, tmp_path: Path, processor: Processor) -> None:
    checkpoints, dying = Checkpoints(config_of(tmp_path, resume=resume), RANKS), Engine()
    dying.dies = True
    assert checkpoints.resume_hint.endswith("the same command starts anew")
    save(checkpoints, 5, processor)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 10, processor, dying)
    folder = tmp_path / "checkpoints" / "step-00000005"
    assert checkpoints.resume_hint == f"the newest checkpoint is {folder}, and the same command{how} resumes from it"


@pytest.mark.long
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the state of a checkpoint"),
        ('{"format": 1}', "format 1, this program reads 2"),
        ("[]", "not the state"),
    ],
)
def test_a_state_that_cannot_be_read(tmp_path: Path, processor: Processor, text: str, message: str) -> None:
    checkpoints = Checkpoints(config_of(tmp_path), RANKS)
    save(checkpoints, 5, processor)
    (checkpoints.folder / "step-00000005" / "stoker.json").write_text(text)
    for resume in ("auto", None, str(checkpoints.folder / "step-00000005")):
        with pytest.raises(DataError, match=rf"{message}.*delete its folder to do without it"):
            Checkpoints(config_of(tmp_path, resume=resume), RANKS).find()


@pytest.mark.long
def test_a_neighbour_that_is_damaged_during_the_run_does_not_end_it(
    tmp_path: Path, processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(config_of(tmp_path, keep=1), RANKS)
    save(checkpoints, 5, processor)
    (checkpoints.folder / "step-00000005" / "stoker.json").write_text("{")
    save(checkpoints, 10, processor)
    save(checkpoints, 15, processor)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000005", "step-00000015"]
    assert "a checkpoint is left alone: " in caplog.text
    assert "step-00000005" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("global_batch_size", 16, "made with global_batch_size 16, this run has 8"),
        ("zero_stage", 2, "made with zero_stage 2, this run has 3"),
        ("precision", "bf16", "made with precision bf16, this run has fp32"),
        (
            "world_size",
            4,
            "made by 4 ranks, this run has 1: start as many, or convert it with trainer.checkpoint.universal=true",
        ),
    ],
)
def test_a_run_that_differs_is_refused_in_words(
    tmp_path: Path, processor: Processor, name: str, value: object, message: str
) -> None:
    checkpoints = Checkpoints(config_of(tmp_path), RANKS)
    save(checkpoints, 5, processor)
    path = checkpoints.folder / "step-00000005" / "stoker.json"
    state = cast("dict[str, Any]", json.loads(path.read_text()))
    path.write_text(json.dumps({**state, name: value}))
    found = checkpoints.find()
    assert found is not None
    with pytest.raises(ConfigError, match=message):
        checkpoints.check(found, {"plan": "p"})


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "now", "change"),
    [
        ({"codec": "aaaa"}, {"codec": "bbbb"}, "codec aaaa -> bbbb"),
        (
            {"manifest/train/0": "aaaa"},
            {"manifest/train/0": "aaaa", "manifest/train/1": "bbbb"},
            "manifest/train/1 none -> bbbb",
        ),
        ({"manifest/train/0": "aaaa"}, {}, "manifest/train/0 aaaa -> none"),
    ],
)
def test_other_data_is_refused(
    tmp_path: Path, processor: Processor, before: dict[str, str], now: dict[str, str], change: str
) -> None:
    checkpoints = Checkpoints(config_of(tmp_path), RANKS)
    checkpoints.save(Engine(), Cursor(step=5), before, processor)
    found = checkpoints.find()
    assert found is not None
    with pytest.raises(RefusedError, match=f"another meaning of it \\({change}\\)"):
        checkpoints.check(found, now)


def test_what_changes_no_training_row_is_only_said(
    tmp_path: Path, processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(config_of(tmp_path), RANKS)
    checkpoints.save(Engine(), Cursor(step=5), {"image_libraries": "simplejpeg 1", "codec": "c"}, processor)
    found = checkpoints.find()
    assert found is not None
    checkpoints.check(found, {"image_libraries": "simplejpeg 2", "codec": "c", "manifest/val/0": "v"})
    assert "image_libraries simplejpeg 1 -> simplejpeg 2, manifest/val/0 none -> v" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "PytorchStreamWriter failed"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(
    error: Exception, reason: str, tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(config_of(tmp_path), RANKS)
    save(checkpoints, 5, processor)

    def fails(*_: Any, **__: Any) -> None:
        raise error

    engine = Engine()
    monkeypatch.setattr(engine, "save_checkpoint", fails)
    with pytest.raises(HostError, match=rf"step-00000010 cannot be written \(.*{reason}.*\): make room there, or name"):
        save(checkpoints, 10, processor, engine)
    found = checkpoints.find()
    assert found is not None
    assert (found.cursor.step, checkpoints.newest) == (5, checkpoints.folder / "step-00000005")


def test_a_bug_while_saving_keeps_its_traceback(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes differ")

    engine = Engine()
    monkeypatch.setattr(engine, "save_checkpoint", fails)
    with pytest.raises(RuntimeError, match="shapes differ"):
        save(Checkpoints(config_of(tmp_path), RANKS), 5, processor, engine)
